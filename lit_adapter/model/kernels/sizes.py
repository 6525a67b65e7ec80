"""Launch sizes. Triton's own functions for them also work inside kernels, but are slow on the host."""

from __future__ import annotations

from torch import Tensor


def ceil_div(n: int, size: int) -> int:
    """Return how many tiles of ``size`` hold ``n``."""
    return -(-n // size)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def whole_row(width: int) -> dict[str, int]:
    """Return the launch options of a kernel whose programs handle a whole row each."""
    block = power_of_two(width)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def row_stride(weight: Tensor) -> int:
    """Return the distance between the weights of two rows; 0 if one vector is for all of them."""
    return weight.stride(0) if weight.dim() == 2 and len(weight) > 1 else 0
