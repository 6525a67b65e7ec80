"""Sizes of launches. Triton's functions for them work inside kernels too, and take long for the host."""

from __future__ import annotations


def ceil_div(n: int, size: int) -> int:
    """Return how many tiles of ``size`` hold ``n``."""
    return -(-n // size)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is ``n`` or more."""
    return 1 << max(n - 1, 0).bit_length()


def whole_row(width: int) -> dict[str, int]:
    """Return the options of a launch whose programs take a whole row each: BLOCK, its width, and warps."""
    block = power_of_two(width)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}
