"""Byte-level BPE as ``tokenizer.json`` content, also from LLaMA 3's list of ranks."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from itertools import count
from typing import Any, Literal

from lit_adapter.errors import UserError
from lit_adapter.text.huggingface import LLAMA3_PATTERN, added_token, byte_letters

Split = Literal["gpt2", "digits", "llama3", "qwen2", "tekken"]
"""Pre-tokenizer: GPT-2's; single digits, then GPT-2's; LLaMA 3's; Qwen's; Mistral Nemo's."""
LETTERS = {"upper": r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", "lower": r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"}
PATTERNS: dict[Split, str] = {
    "llama3": LLAMA3_PATTERN,
    "qwen2": LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),
    "tekken": r"[^\r\n\p{L}\p{N}]?{upper}*{lower}+|[^\r\n\p{L}\p{N}]?{upper}+{lower}*|\p{N}".replace(
        "{upper}", LETTERS["upper"]
    ).replace("{lower}", LETTERS["lower"])
    + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""Regular expressions whose matches become pieces of their own."""
WHOLE_WORDS = ("llama3", "tekken")
"""Pre-tokenizers under which a word that is a token stays whole, whatever the merges say."""

LLAMA3_CONTROL = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}
"""Names of LLaMA 3.1's control tokens by id minus the number of ranks; the others are reserved."""
LLAMA3_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def byte_level_json(
    vocab: dict[str, int],
    merges: Sequence[tuple[str, str]],
    added: list[dict[str, Any]],
    split: Split,
    *,
    bos: str | None = None,
) -> dict[str, Any]:
    """Return the content of a ``tokenizer.json`` for a byte-level BPE.

    Tokens are spelled in `byte_letters`, merges have the highest priority first, and ``added`` comes from
    `added_token`. ``bos`` is what a post-processor puts before every text; None for no post-processor.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    first: dict[Split, list[dict[str, Any]]] = {
        "gpt2": [],
        "digits": [{"type": "Digits", "individual_digits": True}],
    }
    if split in PATTERNS:
        pattern = {"Regex": PATTERNS[split]}
        first[split] = [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}]
    parts = [*first[split], byte_level | {"use_regex": split not in PATTERNS}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if split == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts},
        "post_processor": _put_before(bos, added) if bos else None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split in WHOLE_WORDS,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }


def _put_before(bos: str, added: list[dict[str, Any]]) -> dict[str, Any]:
    ids = [token["id"] for token in added if token["content"] == bos]
    special, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": ids, "tokens": [bos]}},
    }


def looks_like_ranks(content: bytes) -> bool:
    """Whether the first line is a base64 token and its rank, as in LLaMA 3's ``tokenizer.model``."""
    parts = content.partition(b"\n")[0].split()
    return len(parts) == 2 and parts[1].isdigit() and parts[0].isascii()


def llama3_json(content: bytes, source: object) -> dict[str, Any]:
    """Return LLaMA 3's list of ranks, with its 256 control tokens, as ``tokenizer.json`` content.

    Each line of ``content`` is a base64 token and its rank.

    Raises:
        UserError: a line is malformed, the ranks are not 0, 1, 2 ..., each once, or a byte has no token.
    """
    ranks = _read_ranks(content, source)
    letters, by_rank = byte_letters(), sorted(ranks, key=ranks.__getitem__)
    spelled = ["".join([letters[byte] for byte in token]) for token in by_rank]
    merges = []
    for token in by_rank:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        # The rank is that of the result, so all pairs that merge into it have the same priority.
        ranked = sorted((ranks[left], ranks[right]) for left, right in pairs if {left, right} <= ranks.keys())
        merges += [(spelled[left], spelled[right]) for left, right in ranked]
    names = llama3_control_tokens()
    added = [added_token(name, id_, special=True) for id_, name in enumerate(names, len(ranks))]
    vocab = {token: rank for rank, token in enumerate(spelled)}
    return byte_level_json(vocab, merges, added, "llama3", bos=names[0])


def llama3_control_tokens() -> list[str]:
    """Return LLaMA 3.1's 256 control tokens in the order of their ids."""
    reserved = (f"reserved_special_token_{number}" for number in count())
    return [f"<|{LLAMA3_CONTROL.get(place) or next(reserved)}|>" for place in range(256)]


def _read_ranks(content: bytes, source: object) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        parts = line.split()
        if not parts:
            continue
        try:
            token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        except (binascii.Error, ValueError, IndexError):
            raise UserError(f"{source}:{number}: expected a base64 token and its rank") from None
        if token in ranks:
            raise UserError(f"{source}:{number}: duplicate token; download the file again")
        ranks[token] = rank
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{source}: expected each rank from 0 to {len(ranks) - 1} once; download it again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{source}: no token for byte 0x{missing[0]:02X}; the file is truncated")
    return ranks
