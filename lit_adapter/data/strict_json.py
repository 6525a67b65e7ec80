"""JSON arrays and JSON Lines, read record by record: memory does not grow with the file.

What Python's own reader accepts beyond JSON (NaN, duplicate keys) is refused: guessing could mean training on
something other than what the file says.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

from lit_adapter.errors import UserError, shorten

Row = tuple[int, Mapping[str, Any]]
"""A line number (for Parquet a row number), counted from 1, and the values by column name."""
BLOCK = 1 << 18
"""Characters read at a time."""
_SPACE = re.compile(r"[ \t\r\n]*")


class _RefusedError(ValueError):
    """Accepted by Python's json, but not JSON, or ambiguous."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _RefusedError(f"key {shorten(twice)} appears twice in one object; keep one of them")
    return found


def _refuse_constant(name: str) -> Any:
    raise _RefusedError(f"{name} is not JSON; write a string, or null")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def parse_json(text: str) -> Any:
    """Parse strict JSON: no NaN or Infinity, no key twice in an object.

    Raises:
        ValueError: the text is anything else, has a number that is too long, or is nested too deeply.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise _RefusedError("nested too deeply") from None


def json_type(value: object) -> str:
    """Return JSON's name for the type of ``value``, and for a number also its value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    if type(value) in names:
        return names[type(value)]
    return f"the number {shorten(value)}" if isinstance(value, int | float) else type(value).__name__


def jsonl_rows(lines: Iterable[str], name: str, first: int = 1) -> Iterator[Row]:
    """Yield one object per line; only a line feed ends a line, not U+2028 or U+0085.

    ``first`` is the number of the first of the lines.
    """
    hint = "; each line must hold one whole JSON object"
    is_first = first == 1
    for line, ended in enumerate(lines, start=first):
        window = _Window(ended.removesuffix("\n"), line)
        character = window.next_character()
        if not character:
            continue
        if is_first and character == "[":
            raise UserError(f"{name}:1: starts with '[', a JSON array; rename the file to .json")
        is_first = False
        value = window.value(name, hint)
        if window.next_character():
            raise UserError(f"{name}:{line}:{window.at + 1}: text after the object{hint}")
        yield line, _object(value, name, line)


def json_rows(stream: TextIO, name: str) -> Iterator[Row]:
    """Yield the objects of a JSON array, decoded one by one so that each one's line is known."""
    window = _Window(stream=stream)
    if window.next_character() != "[":
        raise _not_an_array(window, name)
    window.at += 1
    while (character := window.next_character()) != "]":
        if not character:
            raise UserError(f"{name}:{window.place()}: the array has no end; is the file truncated?")
        line = window.line()
        yield line, _object(window.value(name), name, line)
        character, comma = window.next_character(), window.place()
        if character == ",":
            window.at += 1
            if window.next_character() == "]":
                raise UserError(f"{name}:{comma}: not valid JSON: trailing comma; remove it")
        elif character not in ("", "]"):
            raise UserError(f"{name}:{comma}: not valid JSON: expected ',' between records")
    window.at += 1
    if window.next_character():
        raise UserError(f"{name}:{window.place()}: not valid JSON: text after the closing ']'")


def _not_an_array(window: _Window, name: str) -> UserError:
    line = window.line()
    value = window.value(name)
    if isinstance(value, dict) and window.next_character() == "{":
        return UserError(
            f"{name}:{line}: one object after another, without '[' around them: this is JSON Lines; "
            "rename the file to .jsonl"
        )
    keys = f" with the keys {', '.join(map(shorten, list(value)[:6]))}" if isinstance(value, dict) else ""
    return UserError(f"{name}:{line}: the file holds {json_type(value)}{keys}; expected an array of records")


def _object(value: Any, name: str, line: int) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        expected = 'an object such as {"instruction": ..., "output": ...}'
        raise UserError(f"{name}:{line}: a record is {json_type(value)}; expected {expected}")
    return value


class _Window:
    """The part of a text that is being parsed: ``text``, from the index ``at`` on.

    More is read from ``stream`` when it is needed, and what has been parsed is dropped then.
    """

    def __init__(self, text: str = "", line: int = 1, stream: TextIO | None = None) -> None:
        self.text, self.at = text, 0
        self._stream = stream
        self._counted, self._line = 0, line  # the line of the character at an index
        self._before = 0
        """Characters of the first line that have been dropped."""

    def line(self) -> int:
        """Return the line that is being parsed, counted from 1."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def place(self, index: int | None = None) -> str:
        """Return ``line:column`` of an index, by default of what is being parsed."""
        index = self.at if index is None else index
        line = self.line() + self.text.count("\n", self.at, index)
        start = self.text.rfind("\n", 0, index)
        return f"{line}:{index - start + (self._before if start < 0 else 0)}"

    def next_character(self) -> str:
        """Return the next character that is not white space, which is then at ``at``; empty at the end."""
        self.at = _skip(self.text, self.at)
        while self.at == len(self.text) and self._read_more():
            self.at = _skip(self.text, self.at)
        return self.text[self.at : self.at + 1]

    def _read_more(self) -> bool:
        """Read as much again as is left; return whether there was more."""
        if self._stream is None:
            return False
        block = self._stream.read(max(BLOCK, len(self.text) - self.at))
        if block:
            self.line()
            start = self.text.rfind("\n", 0, self.at)
            self._before = self.at - start - 1 if start >= 0 else self._before + self.at
            self.text = self.text[self.at :] + block
            self.at = self._counted = 0
        return bool(block)

    def value(self, name: str, hint: str = "") -> Any:
        """Decode the value at ``at`` and move to its end.

        Raises:
            UserError: it is not valid, or nested too deeply; names the line of the file ``name``.
        """
        while True:
            try:
                value, self.at = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not self._read_more():  # else it may only have been cut in two
                    where = self.place(error.pos)
                    raise UserError(f"{name}:{where}: not valid JSON: {error.msg}{hint}") from None
            except _RefusedError as error:
                raise UserError(f"{name}:{self.line()}: {error}") from None
            except RecursionError:
                what = "nested too deeply; expected a flat object of strings"
                raise UserError(f"{name}:{self.line()}: {what}") from None
            except ValueError:
                digits = f"{sys.get_int_max_str_digits():,}"
                what = f"a number of more than {digits} digits; write it as text"
                raise UserError(f"{name}:{self.line()}: {what}") from None
            else:
                return value


def _skip(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position
