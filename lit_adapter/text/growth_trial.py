"""Tries on short texts how far a tokenizer's replacements let a text grow, in a limited process."""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from lit_adapter.text.limited import serve

MOST = 100
"""Most characters for each one of a text; Unicode's compatibility forms give up to 18."""
REPEATS = 40
"""Enough that a prefix that is added once does not matter."""
COMMON = 'aAz0 \n\t_.!"<\u00e9\u4e00\u2581'
"""Characters of several classes, and of one to three bytes."""
MODEL = {"type": "BPE", "vocab": {}, "merges": []}


def try_growth(parts: dict[str, Any]) -> None:
    """Run a normalizer and pre-tokenizer on what they replace; a text that grows too far fails.

    Raises:
        ValueError: a text grows to more than `MOST` times its length.
    """
    empty: dict[str, Any] = {"added_tokens": [], "post_processor": None, "decoder": None, "model": MODEL}
    backend = tokenizers.Tokenizer.from_str(json.dumps(parts["steps"] | empty))
    for text in (*COMMON, *parts["texts"]):
        grown = given = text * REPEATS
        if backend.normalizer is not None:
            grown = backend.normalizer.normalize_str(given)
        if backend.pre_tokenizer is not None:
            grown = "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(grown))
        if len(grown) > MOST * len(given):
            raise ValueError(f"{len(given)} characters become {len(grown):,}")


if __name__ == "__main__":
    serve(try_growth)
