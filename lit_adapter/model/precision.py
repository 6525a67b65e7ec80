"""Types of numbers: what files call them, and where arithmetic is done wider than the tensors it serves."""

from torch import Tensor, bfloat16, float16, float32, float64

FLOATS = {"F32": float32, "F16": float16, "BF16": bfloat16}
"""The types of weights, as safetensors and GGUF files name them."""
FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or as it is where it is wider already."""
    return x if x.dtype == float64 else x.float()
