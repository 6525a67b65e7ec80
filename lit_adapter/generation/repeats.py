"""Answers that repeat themselves, as a base without its adapter often does up to the limit of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

FEWEST_COPIES, FEWEST_CHARACTERS = 3, 60
"""Fewest copies in a repeated end, and fewest characters of all copies together."""
REPEATS = " \u2026 repeats"


def until_repeats(pieces: Iterable[str]) -> Iterator[str]:
    """Yield an answer's pieces until its end repeats itself, and then a note that says so."""
    text = ""
    for piece in pieces:
        text += piece
        yield piece
        if _repeats(text):
            yield REPEATS
            return


def _repeats(text: str) -> bool:
    for length in range(1, len(text) // FEWEST_COPIES + 1):
        copies = max(FEWEST_COPIES, math.ceil(FEWEST_CHARACTERS / length))
        if text.endswith(text[-length:] * copies):
            return True
    return False
