"""Rotary position embedding (arXiv 2104.09864), in the half-split order of Hugging Face checkpoints."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_adapter.model.precision import widen
from lit_adapter.model.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Return the angular frequency of each pair of channels of a head, fp32 ``[head_dim / 2]``."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequency = 1.0 / rope.theta**exponent
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        return _llama3_scaled(frequency, rope)
    if rope.kind == "yarn":
        return _yarn_scaled(frequency, rope)
    return frequency


def _llama3_scaled(frequency: Tensor, rope: RopeConfig) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, and blend between them (Llama 3.1)."""
    turns = rope.original_context_length * frequency / (2 * math.pi)  # full turns in the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return frequency * (blend + (1 - blend) / rope.factor)


def _yarn_scaled(frequency: Tensor, rope: RopeConfig) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, and blend between them by number (2309.00071)."""
    n, length = len(frequency), rope.original_context_length

    def number_of(turns: float) -> float:
        """Return the number of the frequency that makes so many turns in the original context."""
        return n * math.log(length / (turns * 2 * math.pi)) / math.log(rope.theta)

    first, last = number_of(rope.beta_fast), number_of(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * n - 1)
    last = first + 0.001 if last == first else last
    number = torch.arange(n, dtype=torch.float32, device=frequency.device)
    blend = ((number - first) / (last - first)).clamp(0, 1)
    return frequency / rope.factor * blend + frequency * (1 - blend)


def rotation(position: Tensor, inverse_frequency: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for ``position [..., T]``, each fp32 ``[..., T, head_dim / 2]``.

    ``scale`` multiplies them (yarn's attention factor), so that rotated queries and keys grow by it.
    """
    angle = position[..., None] * inverse_frequency
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if scale == 1 else (cos * scale, sin * scale)


def no_rotation(rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the same shape that rotate nothing, for layers without rotary positions."""
    return torch.ones_like(rotation[0]), torch.zeros_like(rotation[1])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [B, H, T, D]`` by ``cos, sin [B, T, D/2]``; computed in fp32, returned in x's dtype."""
    return _Rotated.apply(x, cos, sin)


class _Rotated(torch.autograd.Function):
    """Its backward pass rotates the gradient by the opposite angles, and keeps only cosines and sines."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos[:, None], sin[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos[:, None], -sin[:, None]), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = widen(x)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.empty_like(wide)
    new_first, new_second = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin)
    return turned.to(x.dtype)
