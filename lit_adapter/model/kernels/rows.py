"""The operations on tokens between the matrix products: norms, rotation, SwiGLU, and their gradients.

A result that a matrix product reads next is returned in the form that the product takes; see `Operand`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_adapter.model.kernels.entry import Entry
from lit_adapter.model.kernels.sizes import ceil_div, power_of_two, row_stride, whole_row
from lit_adapter.model.matrices import Operand, Quantised

ELEMENTS = 1024
"""Channels of SwiGLU that one program handles, unless the result needs one scale for a whole row."""

WARPS = 16
"""Warps of a multiprocessor that compute the gradient of a trained norm."""


@triton.jit
def _scale_of(y):
    return tl.maximum(tl.max(tl.abs(y)), 1e-12) / 448.0


@triton.jit
def _store(out_at, scale_at, y, t, at, mask, QUANTISE: tl.constexpr):
    if QUANTISE:
        scale = _scale_of(y)
        tl.store(scale_at + t, scale)
        y = y / scale
    tl.store(out_at + at, y.to(out_at.dtype.element_ty), mask=mask)


@Entry
@triton.jit
def _quantise_kernel(x_at, out_at, scale_at, stride, C, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    x = tl.load(x_at + t * stride + c, mask=c < C, other=0.0).to(tl.float32)
    _store(out_at, scale_at, x, t, t * C + c, c < C, True)


@Entry
@triton.jit(do_not_specialize=["seed"])
def _dropout_kernel(x_at, y_at, seed, C, DROPOUT: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    x = tl.load(x_at + t * C + c, mask=c < C, other=0.0)
    y = tl.where(tl.rand(seed, t * C + c) < DROPOUT, 0.0, x.to(tl.float32) / (1.0 - DROPOUT))
    tl.store(y_at + t * C + c, y.to(y_at.dtype.element_ty), mask=c < C)


@Entry
@triton.jit(do_not_specialize=["T"])
def _norm_kernel(
    x_at, plus_at, sum_at, twin_at, weight_at, below_at, y_at, scale_at, rstd_at, T, C, weight_stride, eps,
    ADD: tl.constexpr, QUANTISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    if t < T:
        x = tl.load(x_at + t * C + c, mask=c < C, other=0.0).to(tl.float32)
        if ADD:
            x += tl.load(plus_at + t * C + c, mask=c < C, other=0.0).to(tl.float32)
            x = x.to(sum_at.dtype.element_ty)
            tl.store(sum_at + t * C + c, x, mask=c < C)
            tl.store(twin_at + t * C + c, x, mask=c < C)
            x = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x) / C + eps)
        weight = tl.load(weight_at + t * weight_stride + c, mask=c < C, other=0.0)
        y = (x * rstd).to(x_at.dtype.element_ty) * weight
        _store(y_at, scale_at, y.to(tl.float32), t, t * C + c, c < C, QUANTISE)
        tl.store(rstd_at + t, rstd)
    else:
        below = tl.load(below_at + (t - T) * C + c, mask=c < C, other=0.0).to(tl.float32)
        _store(y_at, scale_at, below, t, t * C + c, c < C, QUANTISE)


@triton.jit
def _norm_gradient(
    dy_at, x_at, weight, rstd, beside_at, again_at, dx_at, out_at, scale_at, t, C,
    AGAIN: tl.constexpr, QUANTISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of token ``t``, and return its part of the weight's, fp32 ``[BLOCK]``."""
    c = tl.arange(0, BLOCK)
    at = t * C + c
    x = tl.load(x_at + at, mask=c < C, other=0.0).to(tl.float32)
    dy = tl.load(dy_at + at, mask=c < C, other=0.0).to(tl.float32)
    beside = tl.load(beside_at + at, mask=c < C, other=0.0).to(tl.float32)
    weighted = dy * weight
    along = tl.sum(weighted * x) * rstd * rstd / C
    dx = (weighted - x * along) * rstd + beside
    tl.store(dx_at + at, dx.to(dx_at.dtype.element_ty), mask=c < C)
    if QUANTISE:
        _store(out_at, scale_at, dx, t, at, c < C, True)
    normalised = (x * rstd).to(x_at.dtype.element_ty).to(tl.float32)
    if AGAIN:
        tl.store(again_at + at, (normalised * weight).to(again_at.dtype.element_ty), mask=c < C)
    return dy * normalised


@Entry
@triton.jit
def _norm_gradient_kernel(
    dy_at, x_at, weight_at, rstd_at, beside_at, again_at, dx_at, out_at, scale_at, C,
    AGAIN: tl.constexpr, QUANTISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)
    weight = tl.load(weight_at + c, mask=c < C, other=0.0).to(tl.float32)
    t = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_at + t)
    _norm_gradient(
        dy_at, x_at, weight, rstd, beside_at, again_at, dx_at, out_at, scale_at, t, C, AGAIN, QUANTISE, BLOCK
    )  # fmt: skip


@Entry
@triton.jit(do_not_specialize=["T"])
def _trained_norm_gradient_kernel(
    dy_at, x_at, weight_at, rstd_at, beside_at, again_at, dx_at, out_at, scale_at, sums_at, T, C,
    AGAIN: tl.constexpr, QUANTISE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """P programs own every P-th token each, over which they sum the gradient of the weight."""
    program, P = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    c = tl.arange(0, BLOCK)
    weight = tl.load(weight_at + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    rstd = tl.load(rstd_at + program)
    for t in tl.range(program, T, P, num_stages=STAGES):
        next_rstd = tl.load(rstd_at + t + P, mask=t + P < T, other=0.0)  # a scalar is not loaded ahead
        total += _norm_gradient(
            dy_at, x_at, weight, rstd, beside_at, again_at, dx_at, out_at, scale_at, t, C,
            AGAIN, QUANTISE, BLOCK,
        )  # fmt: skip
        rstd = next_rstd
    tl.store(sums_at + program * C + c, total, mask=c < C)


@Entry
@triton.jit(do_not_specialize=["T"])
def _column_sums_kernel(
    dy_at, y_at, sums_at, dy_stride, y_stride, T, N,
    PART: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK columns of PART tokens."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1).to(tl.int64)
    products = tl.zeros([TILE, BLOCK], tl.float32)
    total = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(0, PART, TILE):
        t = part * PART + start + tl.arange(0, TILE)
        live = (t < T)[:, None] & (n < N)[None, :]
        dy = tl.load(dy_at + t[:, None] * dy_stride + n[None, :], mask=live, other=0.0).to(tl.float32)
        y = tl.load(y_at + t[:, None] * y_stride + n[None, :], mask=live, other=0.0).to(tl.float32)
        products += dy * y
        total += dy
    tl.store(sums_at + part * 2 * N + n, tl.sum(products, 0), mask=n < N)
    tl.store(sums_at + part * 2 * N + N + n, tl.sum(total, 0), mask=n < N)


@Entry
@triton.jit
def _rotate_kernel(x_at, cos_at, sin_at, stride, n_heads, HALF: tl.constexpr, HEADS: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    head, d = tl.arange(0, HEADS), tl.arange(0, HALF)
    cos = tl.load(cos_at + t * HALF + d)[None, :]
    sin = tl.load(sin_at + t * HALF + d)[None, :]
    at = x_at + t * stride + (head * 2 * HALF)[:, None] + d[None, :]
    live = (head < n_heads)[:, None]
    a = tl.load(at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=live, other=0.0).to(tl.float32)
    tl.store(at, (a * cos - b * sin).to(x_at.dtype.element_ty), mask=live)
    tl.store(at + HALF, (b * cos + a * sin).to(x_at.dtype.element_ty), mask=live)


@Entry
@triton.jit
def _swiglu_kernel(gate_up_at, y_at, scale_at, M, QUANTISE: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_at + t * 2 * M + c, mask=c < M, other=0.0).to(tl.float32)
    up = tl.load(gate_up_at + t * 2 * M + M + c, mask=c < M, other=0.0).to(tl.float32)
    _store(y_at, scale_at, gate * tl.sigmoid(gate) * up, t, t * M + c, c < M, QUANTISE)


@Entry
@triton.jit
def _swiglu_gradient_kernel(
    dy_at, gate_up_at, again_at, out_at, scale_at, M,
    AGAIN: tl.constexpr, QUANTISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = t * 2 * M + c
    gate = tl.load(gate_up_at + at, mask=c < M, other=0.0).to(tl.float32)
    up = tl.load(gate_up_at + at + M, mask=c < M, other=0.0).to(tl.float32)
    dy = tl.load(dy_at + t * M + c, mask=c < M, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    dgate, dup = dy * up * share * (1 + gate * (1 - share)), dy * gate * share
    if AGAIN:
        product = gate * share * up
        tl.store(again_at + t * M + c, product.to(again_at.dtype.element_ty), mask=c < M)
    if QUANTISE:
        scale = tl.maximum(_scale_of(dgate), _scale_of(dup))
        tl.store(scale_at + t, scale)
        dgate, dup = dgate / scale, dup / scale
    tl.store(out_at + at, dgate.to(out_at.dtype.element_ty), mask=c < M)
    tl.store(out_at + at + M, dup.to(out_at.dtype.element_ty), mask=c < M)


def _room(T: int, C: int, like: Tensor, quantised: bool) -> tuple[Operand, Tensor, Tensor]:
    """Return an empty operand, its data, and its scales."""
    if not quantised:
        plain = like.new_empty(T, C)
        return plain, plain, plain
    room = Quantised(
        like.new_empty(T, C, dtype=torch.float8_e4m3fn), like.new_empty(T, 1, dtype=torch.float32)
    )
    return room, room.data, room.scale


def quantise(x: Tensor) -> Quantised:
    """Return ``x [T, C]``, whose rows may be strided, in fp8."""
    T, C = x.shape
    _, data, scale = _room(T, C, x, True)
    _quantise_kernel[(T,)](x, data, scale, x.stride(0), C, **whole_row(C))
    return Quantised(data, scale)


def dropout(x: Tensor, share: float, seed: int) -> Tensor:
    """Return ``x [T, C]`` without a ``share`` of its numbers, and the others over ``1 - share``.

    The same ``seed``, below 2**31, drops the same places.
    """
    (T, C), y = x.shape, torch.empty_like(x)
    _dropout_kernel[(T,)](x, y, seed, C, DROPOUT=share, **whole_row(C))
    return y


def norm(
    x: Tensor, weight: Tensor, eps: float, below: Tensor | None, *, quantised: bool = False
) -> tuple[Operand, Tensor]:
    """Normalise tokens.

    Args:
        x: ``[T, C]``.
        weight: of the norm ``[C]``, or of each token ``[T, C]``.
        eps: of the norm.
        below: rows ``[K, C]`` in any precision that are appended to the normalised ones, unchanged.
        quantised: whether the next product takes fp8.

    Returns:
        The RMS norm of ``x`` with ``below`` appended, ``[T + K, C]``, and the reciprocal root mean square of
        ``x``, fp32 ``[T]``.
    """
    T, C = x.shape
    room, data, scale = _room(T if below is None else T + below.shape[0], C, x, quantised)
    rstd = torch.empty(T, dtype=torch.float32, device=x.device)
    _norm_kernel[(data.shape[0],)](
        x, x, x, x, weight, x if below is None else below, data, scale, rstd, T, C,
        row_stride(weight), eps, ADD=False, QUANTISE=quantised, **whole_row(C),
    )  # fmt: skip
    return room, rstd


def add_and_norm(
    x: Tensor, plus: Tensor, weight: Tensor, eps: float, *, quantised: bool, twice: bool
) -> tuple[Tensor, Tensor, Operand, Tensor]:
    """Return ``x + plus``, a copy of it if ``twice``, and what `norm` returns for it."""
    T, C = x.shape
    total = torch.empty_like(x)
    twin = torch.empty_like(x) if twice else total
    room, data, scale = _room(T, C, x, quantised)
    rstd = torch.empty(T, dtype=torch.float32, device=x.device)
    _norm_kernel[(T,)](
        x, plus, total, twin, weight, x, data, scale, rstd, T, C, row_stride(weight), eps,
        ADD=True, QUANTISE=quantised, **whole_row(C),
    )  # fmt: skip
    return total, twin, room, rstd


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    beside: Tensor,
    again: Tensor | None,
    *,
    quantised: bool = False,
) -> tuple[Tensor, Operand, Tensor | None]:
    """Return the gradients of a norm.

    Args:
        dy: gradient of its output ``[T, C]``.
        x: its input ``[T, C]``.
        weight: its weight ``[C]``.
        rstd: from `norm`, ``[T]``.
        beside: the gradient that reaches ``x`` through the residual ``[T, C]``.
        again: receives the norm's output once more ``[T, C]``; may be ``dy``. None: it is not needed.
        quantised: whether the next product takes fp8.

    Returns:
        The gradient of ``x``; the same as an operand; and the gradient of ``weight``, fp32, if it is trained.
    """
    T, C = x.shape
    dx = torch.empty_like(x)
    room, data, scale = _room(T, C, x, True) if quantised else (dx, dx, dx)
    given = (dy, x, weight, rstd, beside, dx if again is None else again, dx, data, scale)
    forms = {"AGAIN": again is not None, "QUANTISE": quantised}
    if not weight.requires_grad:
        _norm_gradient_kernel[(T,)](*given, C, **forms, **whole_row(C))
        return dx, room, None
    sizes, n_multiprocessors = whole_row(C), torch.cuda.get_device_properties(x.device).multi_processor_count
    n_programs = min(T, n_multiprocessors * WARPS // sizes["num_warps"])
    sums = torch.empty(n_programs, C, dtype=torch.float32, device=x.device)
    stages = 3 if C <= 4096 else 2  # tokens in shared memory; 100 KB hold two in fp32 of up to 8192 channels
    _trained_norm_gradient_kernel[(n_programs,)](*given, sums, T, C, STAGES=stages, **forms, **sizes)
    return dx, room, sums.sum(0)


def column_sums(dy: Tensor, y: Tensor) -> Tensor:
    """Return the sums of ``dy y`` and of ``dy`` over tokens, fp32 ``[2, N]``.

    Both are ``[T, N]``; rows may be strided.
    """
    (T, N), part, block = dy.shape, 256, 128
    sums = torch.empty(ceil_div(T, part), 2, N, dtype=torch.float32, device=dy.device)
    _column_sums_kernel[(ceil_div(N, block), len(sums))](
        dy, y, sums, dy.stride(0), y.stride(0), T, N, PART=part, TILE=16, BLOCK=block, num_warps=4
    )
    return sums.sum(0)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, n_heads: int) -> None:
    """Rotate the first ``n_heads`` heads of each token in place.

    ``x`` is ``[T, at least n_heads * D]``; rows may be strided. ``cos`` and ``sin`` are fp32 ``[T, D/2]``.
    """
    half = cos.shape[1]
    _rotate_kernel[(x.shape[0],)](
        x, cos, sin, x.stride(0), n_heads, HALF=half, HEADS=power_of_two(n_heads), num_warps=4
    )


def swiglu(gate_up: Tensor, *, quantised: bool = False) -> Operand:
    """Return ``silu(gate) * up [T, M]`` of joined ``gate_up [T, 2 M]``."""
    T, M = gate_up.shape[0], gate_up.shape[1] // 2
    room, data, scale = _room(T, M, gate_up, quantised)
    _swiglu_kernel[_grid(T, M, quantised)](
        gate_up, data, scale, M, QUANTISE=quantised, **_width(M, quantised)
    )
    return room


def swiglu_backward(dy: Tensor, gate_up: Tensor, again: Tensor | None, *, quantised: bool) -> Operand:
    """Return the gradient of ``gate_up [T, 2 M]``.

    ``again`` receives what `swiglu` returned, ``[T, M]``, unless it is None; it may be ``dy``.
    """
    T, M = dy.shape
    room, data, scale = _room(T, 2 * M, gate_up, quantised)
    _swiglu_gradient_kernel[_grid(T, M, quantised)](
        dy, gate_up, dy if again is None else again, data, scale, M,
        AGAIN=again is not None, QUANTISE=quantised, **_width(M, quantised),
    )  # fmt: skip
    return room


def _width(M: int, quantised: bool) -> dict[str, int]:
    return whole_row(M) if quantised else {"BLOCK": ELEMENTS, "num_warps": 4}


def _grid(T: int, M: int, quantised: bool) -> tuple[int, int]:
    return T, 1 if quantised else ceil_div(M, ELEMENTS)
