"""A base's tokenizer as the ``tokenizer.ggml`` keys of a GGUF file, the way back from `gguf_vocabulary`.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError
from lit_adapter.files.read import read_json
from lit_adapter.text.byte_pairs import PATTERNS, Split, llama3_json, looks_like_ranks
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.sentencepiece_model import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    ModelProto,
)
from lit_adapter.text.template import Template
from lit_adapter.text.tokenizer import Tokenizer

PRE_NAMES: dict[Split, str] = {
    "gpt2": "gpt-2",
    "digits": "smollm",
    "llama3": "llama-bpe",
    "qwen2": "qwen2",
    "tekken": "tekken",
}
"""llama.cpp's names of pre-tokenizers."""


def gguf_tokenizer(folder: Path, template: Template, rows: int) -> dict[str, Any]:
    """Return the keys after ``tokenizer.ggml.`` for a base folder.

    Ids up to ``rows``, the embedding's, that stand for no token become unused ones. An answer under
    ``template`` ends with the end-of-turn token.

    Raises:
        UserError: llama.cpp has no tokenizer of this kind.
    """
    tokenizer = load_tokenizer(folder)
    keys = _vocabulary(folder, tokenizer)
    for number in range(len(keys["tokens"]), rows):
        keys["tokens"].append(f"[PAD{number}]")
        keys["token_type"].append(UNUSED)
        if "scores" in keys:
            keys["scores"].append(-1e9)
    return keys | _ids(tokenizer, template)


def _vocabulary(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    path = folder / "tokenizer.model"
    content = path.read_bytes() if path.is_file() else b""
    if content and not looks_like_ranks(content):
        return _pieces(content, tokenizer)
    listed = folder / "tokenizer.json"
    if listed.is_file():
        return _byte_level(read_json(listed), tokenizer, listed)
    return _byte_level(llama3_json(content, path), tokenizer, path)


def _ids(tokenizer: Tokenizer, template: Template) -> dict[str, Any]:
    end = template.end_id(tokenizer)
    ids = {"eos_token_id": tokenizer.eos_id, "add_bos_token": tokenizer.add_bos, "add_eos_token": False}
    if tokenizer.bos_id is not None:
        ids["bos_token_id"] = tokenizer.bos_id
    return ids | ({} if end == tokenizer.eos_id else {"eot_token_id": end})


def _byte_level(raw: dict[str, Any], tokenizer: Tokenizer, path: Path) -> dict[str, Any]:
    model, added = raw["model"], raw.get("added_tokens") or []
    spelled = {id_: text for text, id_ in model["vocab"].items()}
    spelled |= {token["id"]: token["content"] for token in added}
    types = {token["id"]: USER_DEFINED for token in added}
    types |= dict.fromkeys(tokenizer.control_tokens.values(), CONTROL)
    size = max(spelled) + 1
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "model": "gpt2",
        "pre": PRE_NAMES[_split(raw, path)],
        "tokens": [spelled.get(id_, f"[PAD{id_}]") for id_ in range(size)],
        "token_type": [types.get(id_, NORMAL if id_ in spelled else UNUSED) for id_ in range(size)],
        "merges": merges,
    }


def _split(raw: dict[str, Any], path: Path) -> Split:
    """Recognise how texts are split before merging; a text that splits otherwise would get other ids."""
    steps = list(_steps(raw.get("pre_tokenizer") or {}))
    split, normalizer = _known_split(steps), (raw.get("normalizer") or {}).get("type")
    # llama.cpp does not normalise; neither do its own files of Qwen, whose texts mostly are in this form.
    if split is not None and (normalizer is None or (split, normalizer) == ("qwen2", "NFC")):
        return split
    kinds = ", ".join([step["type"] for step in steps]) or "no pre_tokenizer"
    raise UserError(
        f"{path}: splits texts in a way that is unknown here ({kinds}), so it cannot go into a GGUF file; "
        "known are GPT-2's, SmolLM's, LLaMA 3's, Qwen's and Mistral Nemo's, and a tokenizer.model"
    )


def _known_split(steps: list[dict[str, Any]]) -> Split | None:
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last.get("use_regex", True):
        digits = [step["type"] == "Digits" and step["individual_digits"] for step in before]
        return "digits" if digits == [True] else None if before else "gpt2"
    patterns = [step.get("pattern") for step in before]
    return next((name for name, own in PATTERNS.items() if patterns == [{"Regex": own}]), None)


def _steps(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if node.get("type") == "Sequence":
        for inner in node["pretokenizers"]:
            yield from _steps(inner)
    elif node:
        yield node


def _pieces(content: bytes, tokenizer: Tokenizer) -> dict[str, Any]:
    model = ModelProto.FromString(content)
    tokens = [piece.piece for piece in model.pieces]
    types = [int(piece.type) for piece in model.pieces]
    for id_ in range(len(tokens), tokenizer.vocab_size):  # tokens that other files add
        text = tokenizer.piece(id_).decode(errors="replace")
        tokens.append(text or f"[PAD{id_}]")
        types.append(USER_DEFINED if text else UNUSED)
    for text, id_ in tokenizer.control_tokens.items():
        tokens[id_], types[id_] = text, types[id_] if types[id_] == UNKNOWN else CONTROL
    scores = [piece.score for piece in model.pieces]
    unknown = [id_ for id_, kind in enumerate(types) if kind == UNKNOWN]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "token_type": types,
        "scores": [*scores, *[-1e9] * (len(tokens) - len(scores))],
        "unknown_token_id": unknown[0] if unknown else 0,
        "add_space_prefix": bool(model.normalizer_spec.add_dummy_prefix),
        "remove_extra_whitespaces": bool(model.normalizer_spec.remove_extra_whitespaces),
    }
