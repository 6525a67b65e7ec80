"""Products of the newest tokens of a few texts with the weights, each with what surrounds it.

Such a step is bound by reading weights. What follows a product (rotation, cache write, SiLU or residual) is
computed by the product's own kernel, and for a single text so is the RMSNorm before it: a layer with its
attention takes five launches, for several texts seven. A program owns ROWS rows of one weight and as many of
a second one (or of the same one, half a head or half a matrix further on). On compute capability 9 a launch
begins while the one before it ends.

Tensors are contiguous and on one CUDA device.

Letters: B texts, C width, M width of the MLP, H query heads, G key/value heads, D head size, S cache length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_adapter.model.kernels.entry import Entry
from lit_adapter.model.kernels.sizes import ceil_div, power_of_two, whole_row

MOST_TEXTS = 32
"""Texts whose hidden states fit a program's registers beside its weights."""


@dataclass(frozen=True)
class Tiling:
    """How a product is divided among programs."""

    rows: int
    """Rows of either weight that a program owns."""
    depth: int
    """Columns that a program reads at a time."""
    warps: int
    stages: int = 1
    """Such reads in flight."""
    splits: int = 1
    """Programs that share the columns of the same rows."""


# The best of 15 to 40 tried for each on an H200, in the step of LLaMA 7B.
ONE_NORMED = Tiling(rows=2, depth=256, warps=2)
"""For a single text, whose product norms it."""
ONE_ADDED = Tiling(rows=4, depth=512, warps=8)
"""For a single text whose product is added to the residual."""
SEVERAL_QKV = Tiling(rows=16, depth=256, warps=2, stages=3)
"""For several texts' queries, keys and values."""
SEVERAL_WIDE = Tiling(rows=64, depth=64, warps=8, stages=4)
"""For several texts and a weight of many rows: the MLP's gate and up, the output layer."""
SEVERAL_ADDED = Tiling(rows=64, depth=128, warps=4, stages=3, splits=4)
"""For several texts whose product is added to the residual: few rows, so programs share columns."""


def starts_early(device: torch.device) -> bool:
    """Return whether a launch may overlap the end of the one before it."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def computes(n_texts: int, head_dim: int, device: torch.device) -> bool:
    """Return whether `Products` can take steps of ``n_texts`` texts.

    Several texts take half a head in tiles of `SEVERAL_QKV`, and need matrix units of compute capability 8.
    """
    fit = n_texts <= MOST_TEXTS and head_dim >= 2 * SEVERAL_QKV.rows
    return n_texts == 1 or (fit and torch.cuda.get_device_capability(device) >= (8, 0))


class Products:
    """The products of the steps of B texts.

    Args:
        x: hidden states ``[B, C]`` of the shape, dtype and device of later ones; `computes` must allow them.
    """

    def __init__(self, x: Tensor) -> None:
        self.n_texts, self.C = x.shape
        self.early = starts_early(x.device)
        properties: Any = torch.cuda.get_device_properties(x.device)
        self.shared_memory = properties.shared_memory_per_block_optin  # of a program, bytes
        self.padded = 1 if self.n_texts == 1 else max(16, power_of_two(self.n_texts))
        self.normed = torch.empty_like(x)
        blocks = ceil_div(self.C, 2 * SEVERAL_ADDED.rows)
        sums = (blocks, SEVERAL_ADDED.splits, 2, SEVERAL_ADDED.rows, self.padded)
        self.sums = torch.empty(sums, device=x.device)  # of programs that share columns, fp32
        self.arrived = torch.zeros(blocks, dtype=torch.int32, device=x.device)

    def project(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        rotation: tuple[Tensor, Tensor],
        position: Tensor,
        q: Tensor,
        cache: tuple[Tensor, Tensor],
    ) -> None:
        """Norm, project to queries, keys and values, rotate, and put keys and values into the cache.

        Args:
            x: hidden states ``[B, C]``.
            norm: the norm's weight ``[C]``; a trained one is in fp32.
            eps: the norm's.
            weights: of queries ``[H * D, C]``, keys and values ``[G * D, C]``.
            biases: of queries ``[H * D]``, keys and values ``[G * D]``; all None without them.
            rotation: cosines and sines of every position of the cache, fp32 ``[S, D/2]``.
            position: of the new tokens ``[B]``.
            q: is given the rotated queries ``[B, H * D]``.
            cache: the layer's keys and values ``[B, G, S, D]``.
        """
        _, G, S, D = cache[0].shape
        H, how = q.shape[1] // D, self._tiling(ONE_NORMED, SEVERAL_QKV)
        rows = min(how.rows, D // 2)
        given = [weight if bias is None else bias for weight, bias in zip(weights, biases, strict=True)]
        _project_kernel[((H + 2 * G) * (D // 2 // rows),)](
            self._ready(x, norm, eps), norm, *weights, *given, *rotation, position, q, *cache, S, eps,
            self.n_texts, C=self.C, H=H, G=G, D=D, BIAS=biases[0] is not None, **self._launch(how, rows),
        )  # fmt: skip

    def gate_up(self, x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor, hidden: Tensor) -> None:
        """Norm, and write ``silu(gate x) * up x``.

        ``x`` and ``norm`` are those of `project`; ``gate`` and ``up [M, C]``; ``hidden [B, M]`` receives the
        result.
        """
        M, how = len(gate), self._tiling(ONE_NORMED, SEVERAL_WIDE)
        _gate_up_kernel[(ceil_div(M, how.rows),)](
            self._ready(x, norm, eps), norm, gate, up, hidden, M, eps, self.n_texts,
            C=self.C, **self._launch(how, how.rows),
        )  # fmt: skip

    def add_linear(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Add ``weight x`` to ``out [B, C]``, the residual; ``x [B, N]``, ``weight [C, N]``."""
        self._linear(x, None, 0.0, weight, out, self._tiling(ONE_ADDED, SEVERAL_ADDED))

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, out: Tensor) -> None:
        """Write ``weight norm(x)`` to ``out [B, N]``; ``x [B, C]``, ``weight [N, C]``."""
        how = self._tiling(ONE_NORMED, SEVERAL_WIDE)
        self._linear(self._ready(x, norm, eps), norm, eps, weight, out, how)

    def _linear(
        self, x: Tensor, norm: Tensor | None, eps: float, weight: Tensor, out: Tensor, how: Tiling
    ) -> None:
        N = len(weight)
        half = ceil_div(N, 2)
        _linear_kernel[ceil_div(half, how.rows), how.splits](
            x, x if norm is None else norm, weight, out, self.sums, self.arrived, N, half, eps, self.n_texts,
            C=x.shape[1], ADD=norm is None, SPLITS=how.splits, **self._launch(how, how.rows),
        )  # fmt: skip

    def _tiling(self, one: Tiling, several: Tiling) -> Tiling:
        return one if self.n_texts == 1 else several

    def _ready(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """Return normed states; those of a single text unchanged, as its product applies the norm itself."""
        if self.n_texts == 1:
            return x
        _norm_kernel[(self.n_texts,)](
            x, norm, self.normed, eps, C=self.C, EARLY=self.early, launch_pdl=self.early, **whole_row(self.C)
        )
        return self.normed

    def _launch(self, how: Tiling, rows: int) -> dict[str, Any]:
        part = 2 * how.depth * (2 * rows + self.padded)  # bytes of what is read at a time
        return {
            "ROWS": rows, "DEPTH": how.depth, "TEXTS": self.padded, "EARLY": self.early,
            "num_warps": how.warps, "num_stages": max(1, min(how.stages, self.shared_memory // part)),
            "launch_pdl": self.early,
        }  # fmt: skip


@Entry
@triton.jit
def _norm_kernel(x_ptr, norm_ptr, out_ptr, eps, C: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    weight = tl.load(norm_ptr + column, mask=column < C, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * C + column
    x = tl.load(x_ptr + at, mask=column < C, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / C + eps)
    tl.store(out_ptr + at, y.to(x_ptr.dtype.element_ty) * weight, mask=column < C)


@triton.jit
def _products(
    x_ptr, norm_ptr, first_ptr, second_ptr, first, second, first_last, second_last, split, eps, n_texts,
    C: tl.constexpr, NORM: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    TEXTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Return ROWS rows of two weights, from ``first`` and ``second``, times the states.

    Both are fp32 ``[ROWS, TEXTS]``. Rows beyond a weight's last, ``first_last`` or ``second_last``, count as
    that one. For several texts, share number ``split`` of SPLITS of the columns is summed over; a single text
    takes all of them, and is normed here if NORM.
    """
    OWN: tl.constexpr = (C + SPLITS * DEPTH - 1) // (SPLITS * DEPTH) * DEPTH
    begin = split * OWN
    row = tl.arange(0, ROWS)
    first_part = first_ptr + tl.minimum(first + row, first_last).to(tl.int64)[:, None] * C
    second_part = second_ptr + tl.minimum(second + row, second_last).to(tl.int64)[:, None] * C
    if TEXTS == 1:
        a, b = _products_of_one(x_ptr, norm_ptr, first_part, second_part, eps, C, NORM, ROWS, DEPTH, EARLY)
        a, b = a[:, None], b[:, None]
    else:
        end = tl.minimum(begin + OWN, C)
        a, b = _products_of_some(
            x_ptr, first_part, second_part, begin, end, n_texts, C, ROWS, DEPTH, TEXTS, EARLY
        )
    return a, b


@triton.jit
def _weights(place, inside):
    """Read what no other program reads, without displacing from the caches what all of them read."""
    return tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _products_of_one(
    x_ptr, norm_ptr, first_part, second_part, eps,
    C: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Return a single text's products, fp32 ``[ROWS]`` each; the norm is known only after the last column."""
    column = tl.arange(0, DEPTH)
    first_part += column[None, :]
    second_part += column[None, :]
    w = _weights(first_part, (column < C)[None, :])
    u = _weights(second_part, (column < C)[None, :])
    if EARLY:  # weights may be read while the launch before this one still makes x
        tl.extra.cuda.gdc_wait()
    a = tl.zeros((ROWS, DEPTH), tl.float32)
    b = tl.zeros((ROWS, DEPTH), tl.float32)
    square = tl.zeros((DEPTH,), tl.float32)
    for start in range(0, C, DEPTH):
        following = start + DEPTH + column < C
        next_w = _weights(first_part + start + DEPTH, following[None, :])
        next_u = _weights(second_part + start + DEPTH, following[None, :])
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
def _products_of_some(
    x_ptr, first_part, second_part, begin, end, n_texts,
    C: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, TEXTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Return the products of several texts, summed over the columns from ``begin`` to ``end``."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    column, text = tl.arange(0, DEPTH), tl.arange(0, TEXTS)
    x_part = x_ptr + text[:, None] * C
    a = tl.zeros((ROWS, TEXTS), tl.float32)
    b = tl.zeros((ROWS, TEXTS), tl.float32)
    for start in range(begin, end, DEPTH):
        at = (start + column)[None, :]
        x = tl.load(x_part + at, mask=(at < end) & (text < n_texts)[:, None], other=0.0)
        w = tl.load(first_part + at, mask=at < end, other=0.0)
        u = tl.load(second_part + at, mask=at < end, other=0.0)
        a = tl.dot(w, tl.trans(x), a)
        b = tl.dot(u, tl.trans(x), b)
    return a, b


@Entry
@triton.jit
def _project_kernel(
    x_ptr, norm_ptr, wq_ptr, wk_ptr, wv_ptr, bq_ptr, bk_ptr, bv_ptr, cos_ptr, sin_ptr, position_ptr,
    q_ptr, k_ptr, v_ptr, S, eps, n_texts,
    C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, TEXTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS channels of the first half of a head, and those they are rotated with."""
    HALF: tl.constexpr = D // 2
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0) // (HALF // ROWS)
    first = tl.program_id(0) % (HALF // ROWS) * ROWS
    text = tl.arange(0, TEXTS)
    live = text < n_texts
    # Safe before the wait: a step begins with a launch that waits for all of the step before it.
    position = tl.load(position_ptr + text, mask=live, other=0).to(tl.int64)
    if head < H:
        weight_ptr = wq_ptr
        bias_ptr = bq_ptr
        own = head
        out = q_ptr + (text.to(tl.int64) * H + own) * D
    elif head < H + G:
        weight_ptr = wk_ptr
        bias_ptr = bk_ptr
        own = head - H
        out = k_ptr + ((text.to(tl.int64) * G + own) * S + position) * D
    else:
        weight_ptr = wv_ptr
        bias_ptr = bv_ptr
        own = head - H - G
        out = v_ptr + ((text.to(tl.int64) * G + own) * S + position) * D
    row, last = own * D + first, own * D + D - 1
    a, b = _products(
        x_ptr, norm_ptr, weight_ptr, weight_ptr, row, row + HALF, last, last, 0, eps, n_texts,
        C, True, 1, ROWS, DEPTH, TEXTS, EARLY,
    )  # fmt: skip
    channel = (first + tl.arange(0, ROWS))[:, None]
    if BIAS:
        a += tl.load(bias_ptr + own * D + channel).to(tl.float32)
        b += tl.load(bias_ptr + own * D + HALF + channel).to(tl.float32)
    if head < H + G:
        cos = tl.load(cos_ptr + position[None, :] * HALF + channel)
        sin = tl.load(sin_ptr + position[None, :] * HALF + channel)
        a, b = a * cos - b * sin, b * cos + a * sin
    tl.store(out[None, :] + channel, a, mask=live[None, :])
    tl.store(out[None, :] + channel + HALF, b, mask=live[None, :])


@Entry
@triton.jit
def _gate_up_kernel(
    x_ptr, norm_ptr, gate_ptr, up_ptr, out_ptr, M, eps, n_texts, C: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, TEXTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS channels of the MLP."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0) * ROWS
    a, b = _products(
        x_ptr, norm_ptr, gate_ptr, up_ptr, first, first, M - 1, M - 1, 0, eps, n_texts,
        C, True, 1, ROWS, DEPTH, TEXTS, EARLY,
    )  # fmt: skip
    row, text = (first + tl.arange(0, ROWS))[:, None], tl.arange(0, TEXTS)[None, :]
    tl.store(out_ptr + text * M + row, a / (1.0 + tl.exp(-a)) * b, mask=(row < M) & (text < n_texts))


@Entry
@triton.jit
def _linear_kernel(
    x_ptr, norm_ptr, weight_ptr, out_ptr, sums_ptr, arrived_ptr, N, half, eps, n_texts,
    C: tl.constexpr, ADD: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, TEXTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS rows of the first half of the weight, and as many of the second half.

    Of programs that share the columns, the last to finish adds up the sums of all, in their order.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    block, split = tl.program_id(0), tl.program_id(1)
    first = block * ROWS
    a, b = _products(
        x_ptr, norm_ptr, weight_ptr, weight_ptr, first, first + half, half - 1, N - 1, split, eps, n_texts,
        C, not ADD, SPLITS, ROWS, DEPTH, TEXTS, EARLY,
    )  # fmt: skip
    if SPLITS == 1:
        _store_linear(a, b, out_ptr, first, N, half, n_texts, ADD, ROWS, TEXTS)
    else:
        place = sums_ptr + block * SPLITS * 2 * ROWS * TEXTS
        place += tl.arange(0, ROWS)[:, None] * TEXTS + tl.arange(0, TEXTS)[None, :]
        tl.store(place + split * 2 * ROWS * TEXTS, a)
        tl.store(place + (split * 2 + 1) * ROWS * TEXTS, b)
        tl.debug_barrier()  # all of this program's stores come before it is counted
        if tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrived_ptr + block, 0)
            a = tl.zeros((ROWS, TEXTS), tl.float32)
            b = tl.zeros((ROWS, TEXTS), tl.float32)
            for other in tl.static_range(SPLITS):  # from L2, where all programs wrote them
                a += tl.load(place + other * 2 * ROWS * TEXTS, cache_modifier=".cg")
                b += tl.load(place + (other * 2 + 1) * ROWS * TEXTS, cache_modifier=".cg")
            _store_linear(a, b, out_ptr, first, N, half, n_texts, ADD, ROWS, TEXTS)


@triton.jit
def _store_linear(
    a, b, out_ptr, first, N, half, n_texts, ADD: tl.constexpr, ROWS: tl.constexpr, TEXTS: tl.constexpr
):
    """Write rows from ``first`` of the first half, and of the second, or add them to what is there."""
    row, text = (first + tl.arange(0, ROWS))[:, None], tl.arange(0, TEXTS)[None, :]
    in_first = (row < half) & (text < n_texts)
    in_second = in_first & (row + half < N)
    place = out_ptr + text * N + row
    if ADD:
        a += tl.load(place, mask=in_first, other=0.0).to(tl.float32)
        b += tl.load(place + half, mask=in_second, other=0.0).to(tl.float32)
    tl.store(place, a, mask=in_first)
    tl.store(place + half, b, mask=in_second)
