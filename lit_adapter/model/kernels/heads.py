"""Head norms: queries and keys of each head are normed and rotated in one pass; and their gradient.

A head's ``D`` numbers are read as two halves: rotary positions rotate pairs of one number from each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_adapter.model.kernels.entry import Entry
from lit_adapter.model.kernels.sizes import ceil_div, power_of_two, row_stride

SUMMED_TOKENS = 8
"""Tokens over which one program sums the gradient of a trained norm."""


@triton.jit
def _halves(x_at, place, n_heads, HALF: tl.constexpr, HEADS: tl.constexpr):
    """Return the two halves of a token's heads, fp32 ``[HEADS, HALF]`` each; ``place`` is where it begins."""
    head, d = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    at = x_at + place + head * 2 * HALF + d
    first = tl.load(at, mask=head < n_heads, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=head < n_heads, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(x_at, place, first, second, n_heads, HALF: tl.constexpr, HEADS: tl.constexpr):
    head, d = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    at = x_at + place + head * 2 * HALF + d
    tl.store(at, first.to(x_at.dtype.element_ty), mask=head < n_heads)
    tl.store(at + HALF, second.to(x_at.dtype.element_ty), mask=head < n_heads)


@triton.jit
def _rstd(first, second, eps, HALF: tl.constexpr):
    return tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]


@Entry
@triton.jit(do_not_specialize=["n_rotated"])
def _norm_kernel(
    x_at, out_at, weight_at, cos_at, sin_at, x_stride, out_stride, weight_stride, n_heads, n_rotated, eps,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A program owns a token."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, HALF)
    first, second = _halves(x_at, t * x_stride, n_heads, HALF, HEADS)
    rstd = _rstd(first, second, eps, HALF)
    weight_at += t * weight_stride
    first *= rstd * tl.load(weight_at + d).to(tl.float32)[None, :]
    second *= rstd * tl.load(weight_at + HALF + d).to(tl.float32)[None, :]
    is_rotated = t + 0 * d < n_rotated
    cos = tl.load(cos_at + t * HALF + d, mask=is_rotated, other=1.0)[None, :]
    sin = tl.load(sin_at + t * HALF + d, mask=is_rotated, other=0.0)[None, :]
    turned, turned_too = first * cos - second * sin, second * cos + first * sin
    _store_halves(out_at, t * out_stride, turned, turned_too, n_heads, HALF, HEADS)


@Entry
@triton.jit(do_not_specialize=["T"])
def _norm_gradient_kernel(
    dy_at, x_at, weight_at, sums_at, dy_stride, x_stride, n_heads, T, eps,
    HALF: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, TRAINED: tl.constexpr,
):  # fmt: skip
    """A program owns TOKENS tokens, over whose heads it sums the gradient of the weight if TRAINED."""
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, HALF)
    weight = tl.load(weight_at + d).to(tl.float32)[None, :]
    weight_too = tl.load(weight_at + HALF + d).to(tl.float32)[None, :]
    total = tl.zeros([HALF], tl.float32)
    total_too = tl.zeros([HALF], tl.float32)
    for t in range(program * TOKENS, tl.minimum(program * TOKENS + TOKENS, T)):
        first, second = _halves(x_at, t * x_stride, n_heads, HALF, HEADS)
        dfirst, dsecond = _halves(dy_at, t * dy_stride, n_heads, HALF, HEADS)
        rstd = _rstd(first, second, eps, HALF)
        first *= rstd
        second *= rstd
        if TRAINED:
            total += tl.sum(dfirst * first, 0)
            total_too += tl.sum(dsecond * second, 0)
        dfirst *= weight
        dsecond *= weight_too
        along = ((tl.sum(dfirst * first, 1) + tl.sum(dsecond * second, 1)) / (2 * HALF))[:, None]
        dfirst, dsecond = (dfirst - first * along) * rstd, (dsecond - second * along) * rstd
        _store_halves(dy_at, t * dy_stride, dfirst, dsecond, n_heads, HALF, HEADS)
    if TRAINED:
        tl.store(sums_at + program * 2 * HALF + d, total)
        tl.store(sums_at + program * 2 * HALF + HALF + d, total_too)


def norm(x: Tensor, weight: Tensor, eps: float, rotation: tuple[Tensor, Tensor] | None, out: Tensor) -> None:
    """Norm the heads of each token, and rotate those of the first tokens.

    Args:
        x: ``[T, heads * D]``; rows may be strided.
        weight: of the norm ``[D]``, or of each token ``[T, D]``.
        eps: of the norm.
        rotation: cosines and sines of the tokens that are rotated, the first, fp32 ``[up to T, D/2]``.
        out: receives the result, in the layout of ``x``; may be ``x``.
    """
    D = weight.shape[-1]
    cos, sin = rotation or (weight, weight)
    n_heads, n_rotated = x.shape[1] // D, len(cos) if rotation else 0
    _norm_kernel[(len(x),)](
        x, out, weight, cos, sin, x.stride(0), out.stride(0), row_stride(weight), n_heads, n_rotated, eps,
        HALF=D // 2, HEADS=power_of_two(n_heads), num_warps=4,
    )  # fmt: skip


def norm_backward_(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """Turn the gradient ``dy`` of unrotated normed heads into that of ``x``, in place.

    Args:
        dy: ``[T, heads * D]``; rows may be strided.
        x: the input of `norm`, in the same layout.
        weight: of the norm ``[D]``.
        eps: of the norm.

    Returns:
        The gradient of ``weight``, fp32, if it is trained.
    """
    (T, width), D, trained = x.shape, len(weight), weight.requires_grad
    n_programs = ceil_div(T, SUMMED_TOKENS)
    sums = torch.empty(n_programs if trained else 0, D, dtype=torch.float32, device=x.device)
    _norm_gradient_kernel[(n_programs,)](
        dy, x, weight, sums, dy.stride(0), x.stride(0), width // D, T, eps,
        HALF=D // 2, HEADS=power_of_two(width // D), TOKENS=SUMMED_TOKENS, TRAINED=trained, num_warps=4,
    )  # fmt: skip
    return sums.sum(0) if trained else None
