"""Matrix products of one decode step, each with all that surrounds it: a step is bound by reading weights.

RMSNorm before a product, and rotation, cache write, SiLU or residual after it, are done by the product's
own kernel. A program owns ROWS rows of one weight and as many of a second one (or of the same, half a
head or half a matrix on), for all slots. With one slot, products are sums of vectors; with more, they go
through the matrix units. On compute capability 9, a launch begins while the one before it ends.

Every function takes contiguous tensors of one CUDA device, weights and hidden states in bf16.

Letters: B slots, C width, M width of the MLP, H query heads, G key/value heads, D head size, S cache length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_SLOTS = 64
"""Slots of one program; more are divided among several."""


class Tile(NamedTuple):
    """The part of a product that one program does, and how."""

    rows: int
    """Rows of either weight."""
    depth: int
    """Columns read at a time."""
    slots: int
    warps: int
    stages: int
    early: bool
    """See `starts_early`."""


def tile(n_slots: int, device: torch.device) -> Tile:
    """Return the fastest tile measured for so many slots."""
    early = starts_early(device)
    if n_slots == 1:
        return Tile(rows=4, depth=1024, slots=1, warps=4, stages=1, early=early)
    slots = min(max(16, triton.next_power_of_2(n_slots)), MOST_SLOTS)
    return Tile(rows=16, depth=128, slots=slots, warps=4, stages=4, early=early)


def project(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weights: tuple[Tensor, Tensor, Tensor],
    rotation: tuple[Tensor, Tensor],
    position: Tensor,
    q: Tensor,
    cache: tuple[Tensor, Tensor],
    shape: Tile,
) -> None:
    """Norm, project to queries, keys and values, rotate, and put keys and values into the cache.

    Args:
        x: hidden states ``[B, C]``.
        norm: the norm's weight ``[C]``.
        eps: the norm's.
        weights: of queries ``[H * D, C]``, keys and values ``[G * D, C]``.
        rotation: cosines and sines of the positions, fp32 ``[B, D/2]``.
        position: where the cache is written ``[B]``.
        q: is given the rotated queries ``[B, H, D]``.
        cache: the layer's keys and values ``[B, G, S, D]``.
        shape: a program's part.
    """
    B, C = x.shape
    _, G, S, D = cache[0].shape
    rows = min(shape.rows, D // 2)
    grid = ((q.shape[1] + 2 * G) * (D // 2 // rows), triton.cdiv(B, shape.slots))
    _project_kernel[grid](
        x, norm, *weights, *rotation, position, q, *cache, B, S, eps,
        C=C, H=q.shape[1], G=G, D=D, ROWS=rows, DEPTH=shape.depth, SLOTS=shape.slots, EARLY=shape.early,
        num_warps=shape.warps, num_stages=shape.stages, launch_pdl=shape.early,
    )  # fmt: skip


def gate_up(
    x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor, hidden: Tensor, shape: Tile
) -> None:
    """Norm, and write ``silu(gate x) * up x``.

    Args:
        x: hidden states ``[B, C]``.
        norm: the norm's weight ``[C]``.
        eps: the norm's.
        gate: ``[M, C]``.
        up: ``[M, C]``.
        hidden: is given the result ``[B, M]``.
        shape: a program's part.
    """
    B, C = x.shape
    M = len(gate)
    _gate_up_kernel[triton.cdiv(M, shape.rows), triton.cdiv(B, shape.slots)](
        x, norm, gate, up, hidden, B, M, eps,
        C=C, ROWS=shape.rows, DEPTH=shape.depth, SLOTS=shape.slots, EARLY=shape.early,
        num_warps=shape.warps, num_stages=shape.stages, launch_pdl=shape.early,
    )  # fmt: skip


def linear(
    x: Tensor, weight: Tensor, out: Tensor, shape: Tile, *, norm: Tensor | None = None, eps: float = 0.0
) -> None:
    """Write ``weight norm(x)``; without a norm, add ``weight x`` to what ``out`` holds (the residual).

    Args:
        x: ``[B, C]``.
        weight: ``[N, C]``.
        out: ``[B, N]``.
        shape: a program's part.
        norm: the norm's weight ``[C]``.
        eps: the norm's.
    """
    B, C = x.shape
    N = len(weight)
    half = triton.cdiv(N, 2)
    _linear_kernel[triton.cdiv(half, shape.rows), triton.cdiv(B, shape.slots)](
        x, x if norm is None else norm, weight, out, B, N, half, eps,
        C=C, NORM=norm is not None, ROWS=shape.rows, DEPTH=shape.depth, SLOTS=shape.slots, EARLY=shape.early,
        num_warps=shape.warps, num_stages=shape.stages, launch_pdl=shape.early,
    )  # fmt: skip


def starts_early(device: torch.device) -> bool:
    """Return whether a launch may overlap the end of the one before it."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def _vector_products(
    x_ptr, norm_ptr, first_ptr, second_ptr, first, second, slot, eps,
    C: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Return the products of two sets of weight rows with one slot's states, ``[ROWS, 1]`` each."""
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
    return tl.sum(a, 1)[:, None] * scale, tl.sum(b, 1)[:, None] * scale


@triton.jit
def _matrix_products(
    x_ptr, norm_ptr, first_ptr, second_ptr, first, second, slot, eps,
    C: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, SLOTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Return the products of two sets of weight rows with all slots' states, ``[ROWS, SLOTS]`` each.

    The norm's own factor, a number per slot, is known at the end of the rows and multiplied in there.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
    a = tl.zeros((ROWS, SLOTS), tl.float32)
    b = tl.zeros((ROWS, SLOTS), tl.float32)
    square = tl.zeros((SLOTS,), tl.float32)
    first_row = first_ptr + first.to(tl.int64)[:, None] * C
    second_row = second_ptr + second.to(tl.int64)[:, None] * C
    for start in range(0, C, DEPTH):
        column = start + tl.arange(0, DEPTH)
        inside = column < C
        x = tl.load(x_ptr + slot[None, :] * C + column[:, None], mask=inside[:, None], other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, 0)
            weight = tl.load(norm_ptr + column, mask=inside, other=0.0).to(tl.float32)
            x = (wide * weight[:, None]).to(x.dtype)
        a = tl.dot(tl.load(first_row + column[None, :], mask=inside[None, :], other=0.0), x, a)
        b = tl.dot(tl.load(second_row + column[None, :], mask=inside[None, :], other=0.0), x, b)
    if NORM:
        scale = tl.rsqrt(square / C + eps)[None, :]
        a *= scale
        b *= scale
    return a, b


@triton.jit
def _products(
    x_ptr, norm_ptr, first_ptr, second_ptr, first, second, slot, eps,
    C: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, SLOTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Return rows ``first`` and ``second`` of two weights times the (normed) states of the slots."""
    if SLOTS == 1:
        a, b = _vector_products(
            x_ptr, norm_ptr, first_ptr, second_ptr, first, second, slot, eps, C, NORM, ROWS, DEPTH, EARLY
        )
    else:
        a, b = _matrix_products(
            x_ptr, norm_ptr, first_ptr, second_ptr, first, second, slot,
            eps, C, NORM, ROWS, DEPTH, SLOTS, EARLY,
        )  # fmt: skip
    return a, b


@triton.jit
def _project_kernel(
    x_ptr, norm_ptr, wq_ptr, wk_ptr, wv_ptr, cos_ptr, sin_ptr, position_ptr, q_ptr, k_ptr, v_ptr, B, S, eps,
    C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, SLOTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS channels of the first half of a head, and those they are rotated with."""
    HALF: tl.constexpr = D // 2
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0) // (HALF // ROWS)
    channel = tl.program_id(0) % (HALF // ROWS) * ROWS + tl.arange(0, ROWS)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    real = slot < B
    slot = tl.minimum(slot, B - 1)
    position = tl.load(position_ptr + slot).to(tl.int64)
    if head < H:
        weight_ptr = wq_ptr
        own = head
        out = q_ptr + (slot * H + own).to(tl.int64) * D
    elif head < H + G:
        weight_ptr = wk_ptr
        own = head - H
        out = k_ptr + ((slot * G + own).to(tl.int64) * S + position) * D
    else:
        weight_ptr = wv_ptr
        own = head - H - G
        out = v_ptr + ((slot * G + own).to(tl.int64) * S + position) * D
    row = own * D + channel
    a, b = _products(
        x_ptr, norm_ptr, weight_ptr, weight_ptr, row, row + HALF, slot,
        eps, C, True, ROWS, DEPTH, SLOTS, EARLY,
    )  # fmt: skip
    if head < H + G:
        cos = tl.load(cos_ptr + slot[None, :] * HALF + channel[:, None])
        sin = tl.load(sin_ptr + slot[None, :] * HALF + channel[:, None])
        a, b = a * cos - b * sin, b * cos + a * sin
    place = out[None, :] + channel[:, None]
    tl.store(place, a, mask=real[None, :])
    tl.store(place + HALF, b, mask=real[None, :])


@triton.jit
def _gate_up_kernel(
    x_ptr, norm_ptr, gate_ptr, up_ptr, out_ptr, B, M, eps,
    C: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, SLOTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS channels of the MLP."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    real = (slot < B)[None, :] & (row < M)[:, None]
    slot = tl.minimum(slot, B - 1)
    last = tl.minimum(row, M - 1)
    a, b = _products(
        x_ptr, norm_ptr, gate_ptr, up_ptr, last, last, slot, eps, C, True, ROWS, DEPTH, SLOTS, EARLY
    )
    tl.store(out_ptr + slot[None, :] * M + row[:, None], a / (1.0 + tl.exp(-a)) * b, mask=real)


@triton.jit
def _linear_kernel(
    x_ptr, norm_ptr, weight_ptr, out_ptr, B, N, half, eps,
    C: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, SLOTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS rows of the first half of the weight, and as many of the second half."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    real = slot < B
    slot = tl.minimum(slot, B - 1)
    first = tl.minimum(row, half - 1)
    second = tl.minimum(row + half, N - 1)
    a, b = _products(
        x_ptr, norm_ptr, weight_ptr, weight_ptr, first, second, slot, eps, C, NORM, ROWS, DEPTH, SLOTS, EARLY
    )
    place = out_ptr + slot[None, :].to(tl.int64) * N + row[:, None]
    in_first = real[None, :] & (row < half)[:, None]
    in_second = in_first & (row + half < N)[:, None]
    if not NORM:
        a += tl.load(place, mask=in_first, other=0.0).to(tl.float32)
        b += tl.load(place + half, mask=in_second, other=0.0).to(tl.float32)
    tl.store(place, a, mask=in_first)
    tl.store(place + half, b, mask=in_second)
