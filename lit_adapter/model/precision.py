"""Where arithmetic is done wider than the tensors it serves."""

from torch import Tensor, float64


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or as it is where it is wider already."""
    return x if x.dtype == float64 else x.float()
