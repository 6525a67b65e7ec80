"""Products of one text's newest token with the weights, each with all that surrounds it.

Such a step is bound by reading weights. RMSNorm before a product, and rotation, cache write, SiLU or
residual after it, are done by the product's own kernel: a layer is five launches with its attention's. A
program owns ROWS rows of one weight and as many of a second one (or of the same, half a head or half a
matrix on). On compute capability 9 a launch begins while the one before it ends.

Every function takes contiguous tensors of one CUDA device.

Letters: C width, M width of the MLP, H query heads, G key/value heads, D head size, S cache length.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_adapter.model.kernels.sizes import ceil_div

ROWS, DEPTH, WARPS = 4, 512, 4
"""Rows of either weight and columns that a program reads at a time, and its warps: the best of 16 tried."""


def starts_early(device: torch.device) -> bool:
    """Return whether a launch may overlap the end of the one before it."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _launch(x: Tensor, rows: int = ROWS) -> dict[str, Any]:
    early = starts_early(x.device)
    return {"ROWS": rows, "DEPTH": DEPTH, "EARLY": early, "num_warps": WARPS, "launch_pdl": early}


def project(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weights: tuple[Tensor, Tensor, Tensor],
    rotation: tuple[Tensor, Tensor],
    position: Tensor,
    q: Tensor,
    cache: tuple[Tensor, Tensor],
) -> None:
    """Norm, project to queries, keys and values, rotate, and put keys and values into the cache.

    Args:
        x: hidden state ``[1, C]``.
        norm: the norm's weight ``[C]``.
        eps: the norm's.
        weights: of queries ``[H * D, C]``, keys and values ``[G * D, C]``.
        rotation: cosines and sines of the position, fp32 ``[1, D/2]``.
        position: where the cache is written ``[1]``.
        q: is given the rotated queries ``[1, H * D]``.
        cache: the layer's keys and values ``[1, G, S, D]``.
    """
    _, G, S, D = cache[0].shape
    H, rows = q.shape[1] // D, min(ROWS, D // 2)
    _project_kernel[((H + 2 * G) * (D // 2 // rows),)](
        x, norm, *weights, *rotation, position, q, *cache, S, eps,
        C=x.shape[1], H=H, G=G, D=D, **_launch(x, rows),
    )  # fmt: skip


def gate_up(x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor, hidden: Tensor) -> None:
    """Norm, and write ``silu(gate x) * up x``.

    Args:
        x: hidden state ``[1, C]``.
        norm: the norm's weight ``[C]``.
        eps: the norm's.
        gate: ``[M, C]``.
        up: ``[M, C]``.
        hidden: is given the result ``[1, M]``.
    """
    M = len(gate)
    _gate_up_kernel[(ceil_div(M, ROWS),)](
        x, norm, gate, up, hidden, M, eps, C=x.shape[1], **_launch(x)
    )  # fmt: skip


def add_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Add ``weight x [1, N]`` to ``out``, the residual; ``x [1, C]``, ``weight [N, C]``."""
    _linear(x, weight, out, None, 0.0)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, out: Tensor) -> None:
    """Write ``weight norm(x) [1, N]`` to ``out``; ``x [1, C]``, ``weight [N, C]``."""
    _linear(x, weight, out, norm, eps)


def _linear(x: Tensor, weight: Tensor, out: Tensor, norm: Tensor | None, eps: float) -> None:
    N = len(weight)
    half = ceil_div(N, 2)
    _linear_kernel[(ceil_div(half, ROWS),)](
        x, x if norm is None else norm, weight, out, N, half, eps,
        C=x.shape[1], NORM=norm is not None, **_launch(x),
    )  # fmt: skip


@triton.jit
def _products(
    x_ptr, norm_ptr, first_ptr, second_ptr, first, second, eps,
    C: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Return rows ``first`` and ``second`` of two weights times the (normed) state, ``[ROWS]`` each.

    The norm's own factor is known at the end of the rows and multiplied in there.
    """
    column = tl.arange(0, DEPTH)
    first_part = first_ptr + first.to(tl.int64)[:, None] * C + column[None, :]
    second_part = second_ptr + second.to(tl.int64)[:, None] * C + column[None, :]
    w = tl.load(first_part, mask=(column < C)[None, :], other=0.0)
    u = tl.load(second_part, mask=(column < C)[None, :], other=0.0)
    if EARLY:  # weights may be read while the launch before this one still makes x
        tl.extra.cuda.gdc_wait()
    a = tl.zeros((ROWS, DEPTH), tl.float32)
    b = tl.zeros((ROWS, DEPTH), tl.float32)
    square = tl.zeros((DEPTH,), tl.float32)
    for start in range(0, C, DEPTH):
        following = start + DEPTH + column < C
        next_w = tl.load(first_part + start + DEPTH, mask=following[None, :], other=0.0)
        next_u = tl.load(second_part + start + DEPTH, mask=following[None, :], other=0.0)
        inside = start + column < C
        x = tl.load(x_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            square += x * x
            x *= tl.load(norm_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        a += w.to(tl.float32) * x[None, :]
        b += u.to(tl.float32) * x[None, :]
        w = next_w
        u = next_u
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(square, 0) / C + eps)
    return tl.sum(a, 1) * scale, tl.sum(b, 1) * scale


@triton.jit
def _project_kernel(
    x_ptr, norm_ptr, wq_ptr, wk_ptr, wv_ptr, cos_ptr, sin_ptr, position_ptr, q_ptr, k_ptr, v_ptr, S, eps,
    C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS channels of the first half of a head, and those they are rotated with."""
    HALF: tl.constexpr = D // 2
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0) // (HALF // ROWS)
    channel = tl.program_id(0) % (HALF // ROWS) * ROWS + tl.arange(0, ROWS)
    position = tl.load(position_ptr).to(tl.int64)
    if head < H:
        weight_ptr = wq_ptr
        own = head
        out = q_ptr + own * D
    elif head < H + G:
        weight_ptr = wk_ptr
        own = head - H
        out = k_ptr + (own * S + position) * D
    else:
        weight_ptr = wv_ptr
        own = head - H - G
        out = v_ptr + (own * S + position) * D
    row = own * D + channel
    a, b = _products(
        x_ptr, norm_ptr, weight_ptr, weight_ptr, row, row + HALF, eps, C, True, ROWS, DEPTH, EARLY
    )
    if head < H + G:
        cos = tl.load(cos_ptr + channel)
        sin = tl.load(sin_ptr + channel)
        a, b = a * cos - b * sin, b * cos + a * sin
    tl.store(out + channel, a)
    tl.store(out + channel + HALF, b)


@triton.jit
def _gate_up_kernel(
    x_ptr, norm_ptr, gate_ptr, up_ptr, out_ptr, M, eps,
    C: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS channels of the MLP."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    last = tl.minimum(row, M - 1)
    a, b = _products(x_ptr, norm_ptr, gate_ptr, up_ptr, last, last, eps, C, True, ROWS, DEPTH, EARLY)
    tl.store(out_ptr + row, a / (1.0 + tl.exp(-a)) * b, mask=row < M)


@triton.jit
def _linear_kernel(
    x_ptr, norm_ptr, weight_ptr, out_ptr, N, half, eps,
    C: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS rows of the first half of the weight, and as many of the second half."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.minimum(row, half - 1)
    second = tl.minimum(row + half, N - 1)
    a, b = _products(x_ptr, norm_ptr, weight_ptr, weight_ptr, first, second, eps, C, NORM, ROWS, DEPTH, EARLY)
    in_first = row < half
    in_second = in_first & (row + half < N)
    if not NORM:
        a += tl.load(out_ptr + row, mask=in_first, other=0.0).to(tl.float32)
        b += tl.load(out_ptr + row + half, mask=in_second, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, a, mask=in_first)
    tl.store(out_ptr + row + half, b, mask=in_second)
