"""Consecutive things, as many together as fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def grouped(items: Iterable[T], size: Callable[[T], int], most: int) -> list[list[T]]:
    """Cut ``items`` into groups of ``most`` together or less; one that is larger stands alone.

    There is one group at least, which is empty where there are no items.
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
