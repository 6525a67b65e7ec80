"""Hugging Face's ``tokenizer.json``, run by the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import tokenizers

from lit_adapter.errors import UserError, shorten
from lit_adapter.text.description import Description, describe
from lit_adapter.text.limited import LimitedError, ask
from lit_adapter.text.tokenizer import CONTROL_SPELLING, Tokenizer

SPACE = "\u2581"
"""A space in sentencepiece vocabularies."""
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class HuggingFaceTokenizer(Tokenizer):
    """A parsed ``tokenizer.json``, byte-level or like sentencepiece.

    Its post-processor is not run: the caller adds BOS and EOS. The parsed file, ``raw``, is modified.

    Raises:
        UserError: the library cannot read the file, its kind is unknown, or it lacks a token that ``about``
            names.
    """

    def __init__(self, raw: dict[str, Any], about: Description, source: object) -> None:
        self._source, self._pieces = str(source), dict[int, bytes]()  # those asked for so far
        try:
            _try_patterns(raw, source)
            _try_growth(raw, source)
            vocabulary = tokenizers.Tokenizer.from_str(json.dumps(raw)).get_vocab()
            _mark_control_tokens(raw, vocabulary, about)
            # Left over from a training run; they would silently cut or pad texts.
            raw["truncation"] = raw["padding"] = None
            self._json = json.dumps(raw)
            continuing = json.dumps(_without_prefix(raw))
            self._continuing_json = None if continuing == self._json else continuing
            self._load()
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{source}: damaged tokenizer ({error!r}); download it again") from None
        except Exception as error:
            # The library raises plain Exception for a file that it cannot read.
            raise UserError(f"{source}: not a readable tokenizer.json: {error}") from None
        added = raw["added_tokens"]
        self.control_tokens = {t["content"]: vocabulary[t["content"]] for t in added if t["special"]}
        self._added = {vocabulary[t["content"]]: t["content"].encode() for t in added}
        self._added |= dict.fromkeys(self.control_tokens.values(), b"")
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._byte_level, self.strips_space = _decoding(raw, source)
        first_only = any(node.get("prepend_scheme") == "first" for node in _nodes(raw["pre_tokenizer"]))
        self.space_after_control = self._continuing_json is not None and not first_only
        spelled_bos = _post_processor_bos(raw, self.control_tokens)
        describe(self, about, bos_id=spelled_bos, eos_id=None, add_bos=spelled_bos is not None, source=source)
        unknown = raw["model"].get("unk_id", vocabulary.get(raw["model"].get("unk_token") or ""))
        self._refuse_leaks(unknown, source)

    def _load(self) -> None:
        self._backend = _backend(self._json)
        self._continuing = _backend(self._continuing_json) if self._continuing_json else self._backend

    def __getstate__(self) -> dict[str, Any]:
        # The library's own pickling loses encode_special_tokens.
        return {k: v for k, v in self.__dict__.items() if k not in ("_backend", "_continuing")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def _refuse_leaks(self, unknown_id: int | None, source: object) -> None:
        """Refuse a tokenizer that turns text into control tokens: every caller relies on this."""
        for spelling, id_ in self.control_tokens.items():
            if id_ != unknown_id and id_ in self._encode_text(spelling, False):
                raise UserError(
                    f"{source}: the text '{spelling}' becomes control token {id_}; "
                    "such tokenizers are not supported"
                )

    def _encode_text(self, text: str, continuation: bool) -> list[int]:
        backend = self._continuing if continuation else self._backend
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust code; its class cannot be imported
                raise
            raise UserError(
                f"{self._source}: the tokenizer gives up on a text of {len(text):,} characters ({error}); "
                "its patterns are damaged or hostile, download it again"
            ) from None

    def piece(self, token: int) -> bytes:
        """Return a token's bytes; none for control tokens and unused ids."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._piece(token)
        return found

    def _piece(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        text = self._backend.id_to_token(token) if 0 <= token < self.vocab_size else None
        if text is None:
            return b""
        if self._byte_level:
            return bytes(BYTE_OF[c] for c in text) if BYTE_OF.keys() >= set(text) else text.encode()
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes.fromhex(text[3:5])
        return text.replace(SPACE, " ").encode()


def byte_letters() -> dict[int, str]:
    """Return the character that stands for each byte in byte-level vocabularies, as in GPT-2.

    Printable Latin-1 bytes stand for themselves; the others get the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


BYTE_OF = {letter: byte for byte, letter in byte_letters().items()}


def _try_patterns(raw: dict[str, Any], source: object) -> None:
    """Refuse regular expressions that take forever on some text; LLaMA 3's own is not tried."""
    parts = (*_nodes(raw.get("normalizer")), *_nodes(raw.get("pre_tokenizer")))
    patterns = [part["pattern"] for part in parts if isinstance(part.get("pattern"), dict)]
    unknown = [
        given for given in (one.get("Regex") for one in patterns) if given not in (None, LLAMA3_PATTERN)
    ]
    try:
        if unknown:
            ask("lit_adapter.text.pattern_trial", unknown)
    except LimitedError as error:
        shown = " or ".join(shorten(pattern) for pattern in unknown)
        raise UserError(f"{source}: the pattern {shown} fails on a short text: {error}") from None


def _try_growth(raw: dict[str, Any], source: object) -> None:
    """Refuse replacements that together make a short text exhaust memory."""
    steps = {name: raw.get(name) for name in ("normalizer", "pre_tokenizer")}
    nodes = [node for step in steps.values() for node in _nodes(step)]
    byte_levels = [node for node in nodes if node.get("type") == "ByteLevel"]
    if len(byte_levels) < 3 and not any(map(_grows, nodes)):
        return
    patterns = [node["pattern"] for node in nodes if isinstance(node.get("pattern"), dict)]
    texts = [pattern["String"] for pattern in patterns if pattern.get("String")]
    letters = "".join(pattern.get("Regex", "")[:200] for pattern in patterns)
    request = {"steps": steps, "texts": list(dict.fromkeys([*texts, *letters]))}
    try:
        ask("lit_adapter.text.growth_trial", request)
    except LimitedError as error:
        raise UserError(f"{source}: its normalizer or pre_tokenizer fails on a short text: {error}") from None


def _grows(node: dict[str, Any]) -> bool:
    """Whether a step may put more than one character in place of one, or before a text."""
    if node.get("type") == "Prepend":
        return len(node["prepend"]) > 1
    if node.get("type") == "Replace":
        return len(node["content"]) > len(node["pattern"].get("String", ""))  # a regex may match nothing
    return node.get("type") == "Precompiled"


def _backend(content: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(content)
    backend.encode_special_tokens = True
    return backend


def _mark_control_tokens(raw: dict[str, Any], vocabulary: dict[str, int], about: Description) -> None:
    """Mark as special the tokens that act as control tokens: BOS, EOS and ``<|...|>``."""
    added = raw["added_tokens"] = list(raw.get("added_tokens") or [])
    listed = {token["content"] for token in added}
    for spelling in dict.fromkeys((about.bos, about.eos)):
        if spelling in vocabulary and spelling not in listed:
            added.append(added_token(spelling, vocabulary[spelling], special=True))
    for token in added:
        named = token["content"] in (about.bos, about.eos)
        token["special"] = bool(token["special"] or named or CONTROL_SPELLING.fullmatch(token["content"]))


def added_token(content: str, id_: int, *, special: bool) -> dict[str, Any]:
    """Return an entry of ``added_tokens``."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id_, "content": content, **flags, "special": special}


def _nodes(part: Any) -> Iterator[dict[str, Any]]:
    """Yield a normalizer, pre-tokenizer, processor or decoder and the members of its sequences."""
    if not isinstance(part, dict):
        return
    yield part
    for key in ("normalizers", "pretokenizers", "decoders", "processors"):
        for inner in part.get(key) or ():
            yield from _nodes(inner)


def _without_prefix(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the same tokenizer without the space that it puts before a text."""
    copy = {key: json.loads(json.dumps(raw.get(key))) for key in ("normalizer", "pre_tokenizer")}
    without = {"prepend": "", "prepend_scheme": "never", "add_prefix_space": False}
    for node in (*_nodes(copy["normalizer"]), *_nodes(copy["pre_tokenizer"])):
        node |= {key: value for key, value in without.items() if key in node}
    return raw | copy


def _decoding(raw: dict[str, Any], source: object) -> tuple[bool, bool]:
    """Return whether tokens are byte-level, and whether decoding drops the first space."""
    decoders = list(_nodes(raw.get("decoder")))
    kinds = {node["type"] for node in decoders} or {node["type"] for node in _nodes(raw["pre_tokenizer"])}
    if "ByteLevel" in kinds:
        return True, False
    spaces = any(node["type"] == "Replace" and node.get("pattern") == {"String": SPACE} for node in decoders)
    if not spaces and "Metaspace" not in kinds:
        raise UserError(
            f"{source}: decoder {', '.join(sorted(kinds)) or 'none'} is unknown; "
            "expected a byte-level or a sentencepiece tokenizer"
        )
    for node in decoders:
        if node["type"] == "Strip" and node.get("start"):
            return False, True
        default = "always" if node.get("add_prefix_space", True) else "never"
        if node["type"] == "Metaspace" and node.get("prepend_scheme", default) != "never":
            return False, True
    return False, False


def _post_processor_bos(raw: dict[str, Any], control: dict[str, int]) -> int | None:
    """Return the id of the control token that the post-processor puts before a text, or None."""
    for node in _nodes(raw.get("post_processor")):
        template = node.get("single") if node["type"] == "TemplateProcessing" else None
        first = template[0].get("SpecialToken") if template else None
        if first:
            return control.get(first["id"])
    return None
