"""LLaMA 3 as Meta publishes it: lines of a token in base64 and its rank, named ``tokenizer.model`` too."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError
from lit_adapter.text.huggingface import byte_alphabet

# How Llama 3 cuts a text into words before it merges bytes.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_RESERVED = 256
SETTINGS: dict[str, Any] = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "add_bos_token": True,
}
"""What no file beside the ranks says; `load_tokenizer` adds <|eot_id|> to the stop ids."""
_NAMED = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id",
          7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}  # fmt: skip


def is_tiktoken(path: Path) -> bool:
    """Tell ranks from a sentencepiece model by the first line."""
    with path.open("rb") as stream:
        words = stream.readline(4096).split()
    return len(words) == 2 and words[1].isdigit()


def definition(path: Path) -> dict[str, Any]:
    """Return the ``tokenizer.json`` that is equal to a file of ranks.

    Raises:
        UserError: a line that is not a token and its rank.
    """
    ranks = _read_ranks(path)
    spelling = {byte: character for character, byte in byte_alphabet().items()}
    spell = {token: "".join(spelling[byte] for byte in token) for token in ranks}
    controls = _control_tokens(len(ranks))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": text, **flags} for text, number in controls.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spell[token]: rank for token, rank in ranks.items()},
            "merges": [[spell[left], spell[right]] for left, right in _merges(ranks)],
        },
    }


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number}: expected a token in base64 and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path}: the ranks are not 0 to {len(ranks) - 1}, each once; download it again")
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return every way to make a token of two others, in the order of the tokens' ranks."""
    merges: list[tuple[bytes, bytes]] = []
    for token in sorted(ranks, key=lambda t: ranks[t]):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _control_tokens(first: int) -> dict[str, int]:
    """Return the 256 control tokens that follow the ranks, spelled as Llama 3.1 spells them."""
    names, reserved = [], 0
    for number in range(N_RESERVED):
        if number in _NAMED:
            names.append(f"<|{_NAMED[number]}|>")
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return {name: first + number for number, name in enumerate(names)}
