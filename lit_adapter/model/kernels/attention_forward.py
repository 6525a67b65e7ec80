"""The kernel of attention's forward pass, and what it shares with those of the gradients.

See `attention` for what they compute.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import triton
import triton.language as tl

from lit_adapter.model.kernels.entry import Entry
from lit_adapter.model.tiles import TilePlan

VARYING = ("n_queries", "n_keys", "n_prompt", "n_tiles", "seed")
PLAN = tuple(field.name for field in fields(TilePlan))


def kernel(function: Any) -> Any:
    """Compile once for all rows, whose lengths and plan addresses all differ."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    compiled = triton.jit(
        do_not_specialize=[name for name in names if name in VARYING],
        do_not_specialize_on_alignment=[name for name in names if name in PLAN],
    )
    return Entry(compiled(function))


@triton.jit
def load_queries(place, first, preamble_start, preamble_end, m, n_queries, TILE: tl.constexpr):
    """Return a tile's queries: numbers, which of them are real, positions, and limits of what they see."""
    n = m * TILE + tl.arange(0, TILE)
    live = n < n_queries
    # Surplus queries of a tile have position -1, which sees nothing.
    return (
        n,
        live,
        tl.load(place + n, mask=live, other=-1),
        tl.load(first + n, mask=live, other=0),
        tl.load(preamble_start + n, mask=live, other=0),
        tl.load(preamble_end + n, mask=live, other=0),
    )


@triton.jit
def sees(j, i, low, preamble_low, preamble_high):
    """Return whether queries at ``i`` see keys at ``j``; the two broadcast."""
    return (j <= i) & ((j >= low) | ((j >= preamble_low) & (j < preamble_high)))


@triton.jit
def rotated_back(
    x, cos_at, sin_at, place, live, D: tl.constexpr, ROWS: tl.constexpr, INVERSE: tl.constexpr = False
):
    """Return the gradient ``x [ROWS, D]`` rotated by the opposite angles of its positions ``place``.

    If INVERSE, return what gave ``x`` when it was rotated: yarn's rotation lengthens, so this shortens.
    Rows that are not ``live`` are rotated by no angle.
    """
    HALF: tl.constexpr = D // 2
    at = place[:, None] * HALF + tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_at + at, mask=live[:, None], other=1.0)
    sin = tl.load(sin_at + at, mask=live[:, None], other=0.0)
    if INVERSE:
        shrink = 1.0 / (cos * cos + sin * sin)
        cos, sin = cos * shrink, sin * shrink
    a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))
    turned = tl.join(a * cos + b * sin, b * cos - a * sin)
    return tl.reshape(tl.permute(turned, (0, 2, 1)), (ROWS, D))


@triton.jit
def strength_of(strength_at, h, n_prompt, BY_TOKEN: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """Return a head's c(g), fp32 ``[1, D]`` or ``[ROWS, 1]``."""
    if BY_TOKEN:
        r = tl.arange(0, ROWS)
        strength = tl.load(strength_at + h * n_prompt + r, mask=r < n_prompt, other=0.0)[:, None]
    else:
        strength = tl.load(strength_at + h * D + tl.arange(0, D))[None, :]
    return strength


@triton.jit
def prefix_weights(q, pk, n_prompt, scale, ROWS: tl.constexpr):
    """Return softmax(q pk^T / sqrt(D)), fp32, ``[queries, ROWS]``; rows beyond the prompt have weight 0."""
    score = tl.dot(q, tl.trans(pk)) * scale
    score = tl.where((tl.arange(0, ROWS) < n_prompt)[None, :], score, -float("inf"))
    weight = tl.exp2(score - tl.max(score, 1)[:, None])
    return weight / tl.sum(weight, 1)[:, None]


@triton.jit
def kept_weights(seed, h, n, n_queries, DROPOUT: tl.constexpr, ROWS: tl.constexpr):
    """Return what dropout multiplies a head's prefix weights by: 0 or 1 / (1 - p), ``[queries, ROWS]``."""
    at = (h * n_queries + n)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    return tl.where(tl.rand(seed, at) < DROPOUT, 0.0, 1.0 / (1.0 - DROPOUT))


@kernel
def forward_kernel(
    q_at, k_at, v_at, o_at, lse_at, cos_at, sin_at, prompt_at, strength_at,
    place, first, preamble_start, preamble_end, key_from, key_tile,
    n_queries, n_keys, q_stride, kv_stride, o_stride, prompt_stride, n_prompt, seed, scale,
    GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, BY_TOKEN: tl.constexpr, UNROTATED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of queries of one head."""
    m, h = tl.program_id(0), tl.program_id(1)
    g, H = h // GROUP, tl.num_programs(1)
    n, live, i, low, preamble_low, preamble_high = load_queries(
        place, first, preamble_start, preamble_end, m, n_queries, M
    )
    d = tl.arange(0, D)
    q = tl.load(q_at + n[:, None] * q_stride + (h * D + d)[None, :], mask=live[:, None], other=0.0)
    if UNROTATED:  # before the row's own attention takes the registers
        r = tl.arange(0, ROWS)
        at = prompt_at + (r * prompt_stride)[:, None] + (g * D + d)[None, :]
        pk = tl.load(at, mask=(r < n_prompt)[:, None], other=0.0)
        prefix_q = rotated_back(q.to(tl.float32), cos_at, sin_at, i, live, D, M, True).to(q.dtype)
        prefix_weight = prefix_weights(prefix_q, pk, n_prompt, scale, ROWS)
        if DROPOUT > 0:
            prefix_weight *= kept_weights(seed, h, n, n_queries, DROPOUT, ROWS)
        prefix_weight = prefix_weight.to(pk.dtype)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    y = tl.zeros([M, D], tl.float32)
    for step in range(tl.load(key_from + m), tl.load(key_from + m + 1)):
        j = tl.load(key_tile + step) * N + tl.arange(0, N)
        inside = (j < n_keys)[:, None]
        k = tl.load(k_at + j[:, None] * kv_stride + (g * D + d)[None, :], mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k)) * scale
        seen = sees(j[None, :], i[:, None], low[:, None], preamble_low[:, None], preamble_high[:, None])
        score = tl.where(seen, score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing seen so far
        shrink = tl.exp2(top - safe)
        weight = tl.exp2(score - safe[:, None])
        total = total * shrink + tl.sum(weight, 1)
        v = tl.load(v_at + j[:, None] * kv_stride + (g * D + d)[None, :], mask=inside, other=0.0)
        y = y * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
        top = new_top
    total = tl.where(total == 0.0, 1.0, total)
    y = y / total[:, None]
    tl.store(lse_at + h * n_queries + n, top + tl.log2(total), mask=live)
    if ROWS > 0:
        r = tl.arange(0, ROWS)
        at = prompt_at + (r * prompt_stride)[:, None] + (g * D + d)[None, :]
        pk = tl.load(at, mask=(r < n_prompt)[:, None], other=0.0)
        pv = tl.load(at + H // GROUP * D, mask=(r < n_prompt)[:, None], other=0.0)
        if not UNROTATED:
            prefix_weight = prefix_weights(q, pk, n_prompt, scale, ROWS)
            if DROPOUT > 0:
                prefix_weight *= kept_weights(seed, h, n, n_queries, DROPOUT, ROWS)
            prefix_weight = prefix_weight.to(pv.dtype)
        if BY_TOKEN:
            strength = strength_of(strength_at, h, n_prompt, True, D, ROWS)
            y += tl.dot(prefix_weight, (pv.to(tl.float32) * strength).to(pv.dtype))
        else:
            y += tl.dot(prefix_weight, pv) * strength_of(strength_at, h, n_prompt, False, D, ROWS)
    o_ptr = o_at + n[:, None] * o_stride + (h * D + d)[None, :]
    tl.store(o_ptr, y.to(o_at.dtype.element_ty), mask=live[:, None])
