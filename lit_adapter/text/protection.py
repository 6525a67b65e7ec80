"""Keeps users' texts from becoming control tokens where a chat template writes them.

A mark, one character, goes into everything that spells a control token, or could complete one. It is taken
out again after the template's own control tokens have been found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from lit_adapter.errors import UserError
from lit_adapter.text.chat import control_pattern
from lit_adapter.text.tokenizer import Tokenizer

_MARKS = [chr(0xE000 + n) for n in range(64)]
"""Characters for private use."""


def _strings(value: Any) -> Iterable[str]:
    """Yield every text in nested values, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def unused_mark(values: Any) -> str:
    """Return a character that no text in nested values contains; a UserError says that all are in use."""
    texts = list(_strings(values))
    found = next((mark for mark in _MARKS if not any(mark in text for text in texts)), None)
    if found is None:
        raise UserError("the conversation holds all of the characters U+E000 to U+E03F; remove one")
    return found


@cache
def _parts(spellings: tuple[str, ...]) -> tuple[set[str], set[str], int]:
    """Return how control tokens may begin and end, and the length of the longest one."""
    heads = {one[:n] for one in spellings for n in range(1, len(one))}
    tails = {one[n:] for one in spellings for n in range(1, len(one))}
    return heads, tails, max(map(len, spellings), default=1)


class Protection:
    """Puts ``mark`` into what spells a control token, or could complete one with what stands beside it."""

    def __init__(self, tokenizer: Tokenizer, mark: str) -> None:
        self.pattern, self.mark = control_pattern(tokenizer), mark
        self.heads, self.tails, self.longest = _parts(tuple(tokenizer.control_tokens))

    def of(self, value: Any) -> Any:
        """Return nested values with all their texts protected."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, Mapping):
            return {self._text(key): self.of(item) for key, item in value.items()}
        return [self.of(item) for item in value] if isinstance(value, list | tuple) else value

    def _text(self, text: str) -> str:
        if self.pattern is None or not text:
            return text
        text = self.pattern.sub(self._broken, text)
        lengths = range(1, min(self.longest, len(text) + 1))
        if any(text[:n] in self.tails for n in lengths):
            text = self.mark + text
        if any(text[-n:] in self.heads for n in lengths):
            text += self.mark
        return text

    def _broken(self, found: re.Match[str]) -> str:
        if len(found[0]) == 1:
            raise UserError(f"a text holds {found[0]!r}, which is a control token of this base; remove it")
        return found[0][0] + self.mark + found[0][1:]
