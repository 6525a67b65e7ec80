"""Whether the start of an answer can still become a given JSON value.

An answer that is generated token by token need not be finished once it cannot: scoring by equal JSON values
then takes a fraction of the time. In doubt (escapes, incomplete nested values) the result is that it can.
"""

from __future__ import annotations

import json
import re
from typing import Any

_WHITE = re.compile(r"[ \t\n\r]*")
_SCALAR = re.compile(r"[-+.\w]*")


class _OverError(Exception):
    """The text has ended before the value has: it may still become right."""


class _WrongError(Exception):
    """No continuation can make it right."""


def can_become(text: str, value: Any) -> bool:
    """Whether some continuation of ``text`` is JSON of this value, whatever its key order and white space."""
    try:
        at = _value(text, _skip(text, 0), value)
        return _WHITE.fullmatch(text, at) is not None
    except _OverError:
        return True
    except _WrongError:
        return False


def _skip(text: str, at: int) -> int:
    """Return the place after white space."""
    found = _WHITE.match(text, at)
    return found.end() if found else at


def _expect(text: str, at: int, characters: str) -> str:
    """Return the character at a place, which must be one of these."""
    if at >= len(text):
        raise _OverError
    if text[at] not in characters:
        raise _WrongError
    return text[at]


def _value(text: str, at: int, value: Any) -> int:
    """Return the place after a value, which must be the one given."""
    if isinstance(value, dict):
        return _object(text, at, value)
    if isinstance(value, list):
        return _array(text, at, value)
    if isinstance(value, str):
        return _string(text, at, [value])[1]
    return _scalar(text, at, value)


def _object(text: str, at: int, value: dict[str, Any]) -> int:
    _expect(text, at, "{")
    left, at = dict(value), _skip(text, at + 1)
    while left:
        key, at = _string(text, at, list(left))
        at = _skip(text, at)
        _expect(text, at, ":")
        at = _skip(text, _value(text, _skip(text, at + 1), left.pop(key)))
        _expect(text, at, "," if left else "}")
        at = _skip(text, at + 1) if left else at
    _expect(text, at, "}")
    return at + 1


def _array(text: str, at: int, value: list[Any]) -> int:
    _expect(text, at, "[")
    at = _skip(text, at + 1)
    for number, item in enumerate(value):
        if number:
            _expect(text, at, ",")
            at = _skip(text, at + 1)
        at = _skip(text, _value(text, at, item))
    _expect(text, at, "]")
    return at + 1


def _string(text: str, at: int, allowed: list[str]) -> tuple[str, int]:
    """Return a string, which must be one of those allowed, and the place after it."""
    _expect(text, at, '"')
    end = _end_of_string(text, at + 1)
    begun = text[at + 1 : end]
    if end >= len(text):
        if "\\" not in begun and not any(each.startswith(begun) for each in allowed):
            raise _WrongError
        raise _OverError
    try:
        found = json.loads(f'"{begun}"')
    except ValueError:
        raise _WrongError from None
    if found not in allowed:
        raise _WrongError
    return found, end + 1


def _end_of_string(text: str, at: int) -> int:
    """Return the place of the quote that ends a string, or the end of the text."""
    while at < len(text) and text[at] != '"':
        at += 2 if text[at] == "\\" else 1
    return min(at, len(text))


def _scalar(text: str, at: int, value: Any) -> int:
    """Return the place after a number, true, false or null; 21 is not 21.0."""
    found = _SCALAR.match(text, at)
    end = found.end() if found else at
    if end >= len(text):
        # A float has several spellings, everything else one.
        if not isinstance(value, float) and not json.dumps(value).startswith(text[at:]):
            raise _WrongError
        raise _OverError
    try:
        given = json.loads(text[at:end])
    except ValueError:
        raise _WrongError from None
    if json.dumps(given) != json.dumps(value):
        raise _WrongError
    return end
