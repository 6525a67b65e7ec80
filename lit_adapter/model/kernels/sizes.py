"""Sizes of launches. Triton's functions for them work inside kernels too, and take long for the host."""

from __future__ import annotations


def ceil_div(n: int, size: int) -> int:
    """Return how many tiles of ``size`` hold ``n``."""
    return -(-n // size)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is ``n`` or more."""
    return 1 << max(n - 1, 0).bit_length()
