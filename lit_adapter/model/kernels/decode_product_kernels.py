"""The kernels of `decode_products`, each a product with what surrounds it.

A program owns ROWS rows of one weight and as many of a second one (or of the same one, half a head or half a
matrix further on).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lit_adapter.model.kernels.entry import Entry


@Entry
@triton.jit
def norm_kernel(
    x_ptr, norm_ptr, out_ptr, norm_stride, eps, C: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """A program owns a text."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    weight = tl.load(norm_ptr + tl.program_id(0) * norm_stride + column, mask=column < C, other=0.0)
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
def project_kernel(
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
def gate_up_kernel(
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
def linear_kernel(
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
