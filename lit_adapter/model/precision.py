"""Floating-point types: their names in files, and widening where arithmetic needs more precision."""

from torch import Tensor, bfloat16, float16, float32, float64

FLOATS = {"F32": float32, "F16": float16, "BF16": bfloat16}
"""The types of weights by the names that safetensors and GGUF files use."""
FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in fp32; fp64 stays fp64."""
    return x if x.dtype == float64 else x.float()
