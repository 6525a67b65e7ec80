"""Checks of what Python callers pass; a value of the wrong type is refused, naming the parameter."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

from lit_adapter.errors import WrongTypeError, shorten


def of_kind(name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> Any:
    """Return ``value``, if it is an instance of one of ``kinds``.

    Raises:
        WrongTypeError: it is not; ``expected`` says what would be right.
    """
    if not isinstance(value, kinds):
        raise _wrong(name, value, expected)
    return value


def text(name: str, value: Any) -> str:
    """Return a text; a WrongTypeError refuses anything else."""
    checked: str = of_kind(name, value, str, "text (str)")
    return checked


def path(name: str, value: Any) -> Path:
    """Return a path given as text or as a path object; a WrongTypeError refuses anything else."""
    return Path(of_kind(name, value, (str, os.PathLike), "a path (str or os.PathLike)"))


def whole_number(name: str, value: Any) -> int:
    """Return an integer of any library as Python's; a WrongTypeError refuses bool, float and the rest."""
    try:
        plain = _scalar(value)
        if not isinstance(plain, bool):
            return operator.index(plain)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise _wrong(name, value, "a whole number")


def number(name: str, value: Any) -> float:
    """Return a number of any library as Python's float; a WrongTypeError refuses bool, text and the rest."""
    try:
        plain = _scalar(value)
        # float() would also parse a text, and the bytes of any buffer.
        if isinstance(plain, SupportsFloat | SupportsIndex) and not isinstance(plain, bool):
            return float(plain)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise _wrong(name, value, "a number")


def _scalar(value: Any) -> Any:
    """Return the single value of an array or tensor as Python's, so that its type is that of its content."""
    return value.item() if callable(getattr(value, "item", None)) else value


def _wrong(name: str, value: Any, expected: str) -> WrongTypeError:
    plain = value is None or isinstance(value, bool | int | float | str)
    return WrongTypeError(
        f"{name} is {shorten(value) if plain else f'of type {type(value).__name__}'}; expected {expected}"
    )
