"""Sequences: groups of limited size, and the common start of two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def grouped(items: Iterable[T], size: Callable[[T], int], most: int) -> list[list[T]]:
    """Divide ``items`` into consecutive groups with a total size of at most ``most``.

    An item that is larger is a group of its own. Without items there is one empty group.
    """
    groups: list[list[T]] = [[]]
    total = 0
    for item in items:
        if groups[-1] and total + size(item) > most:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += size(item)
    return groups


def n_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the common start of two sequences."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
