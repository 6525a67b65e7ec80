"""The kernels of attention's gradients.

The queries' kernel computes what the prefix's gradient needs too, as partial sums per query tile; others sum
these, and the keys' partial sums. See `attention` for what they compute.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lit_adapter.model.kernels.attention_forward import (
    kept_weights,
    kernel,
    load_queries,
    prefix_weights,
    rotated_back,
    sees,
    strength_of,
)


@kernel
def query_gradient_kernel(
    q_at, k_at, v_at, o_at, do_at, lse_at, delta_at, dq_at, cos_at, sin_at,
    prompt_at, strength_at, dprompt_at, dstrength_at,
    place, first, preamble_start, preamble_end, key_from, key_tile,
    n_queries, n_keys, q_stride, kv_stride, o_stride, dq_stride, prompt_stride, n_prompt, seed,
    scale, softmax_scale,
    GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, BY_TOKEN: tl.constexpr, UNROTATED: tl.constexpr, DROPOUT: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    """Compute partial gradients of the prefix and, if ROW, the gradients of the queries."""
    m, h = tl.program_id(0), tl.program_id(1)
    g, H = h // GROUP, tl.num_programs(1)
    n, live, i, low, preamble_low, preamble_high = load_queries(
        place, first, preamble_start, preamble_end, m, n_queries, M
    )
    d = tl.arange(0, D)
    q = tl.load(q_at + n[:, None] * q_stride + (h * D + d)[None, :], mask=live[:, None], other=0.0)
    prefix_q = q
    if UNROTATED:  # before the other tiles take the registers
        prefix_q = rotated_back(q.to(tl.float32), cos_at, sin_at, i, live, D, M, True).to(q.dtype)
    o_offset = n[:, None] * o_stride + (h * D + d)[None, :]
    do = tl.load(do_at + o_offset, mask=live[:, None], other=0.0)
    dq = tl.zeros([M, D], tl.float32)
    delta = tl.zeros([M], tl.float32)
    if ROW:
        o = tl.load(o_at + o_offset, mask=live[:, None], other=0.0)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if ROWS > 0:
        r = tl.arange(0, ROWS)
        at = prompt_at + (r * prompt_stride)[:, None] + (g * D + d)[None, :]
        pk = tl.load(at, mask=(r < n_prompt)[:, None], other=0.0)
        pv = tl.load(at + H // GROUP * D, mask=(r < n_prompt)[:, None], other=0.0)
        strength = strength_of(strength_at, h, n_prompt, BY_TOKEN, D, ROWS)
        share = prefix_weights(prefix_q, pk, n_prompt, scale, ROWS)
        narrow = share.to(pv.dtype)
        if DROPOUT > 0:
            kept = kept_weights(seed, h, n, n_queries, DROPOUT, ROWS)
            narrow = (share * kept).to(pv.dtype)
        summed = tl.dot(tl.trans(narrow), do)  # [ROWS, D], from which the gradients of pv and c follow
        if BY_TOKEN:
            tl.store(dstrength_at + (m * H + h) * ROWS + r, tl.sum(summed * pv.to(tl.float32), 1))
        else:
            tl.store(dstrength_at + (m * H + h) * D + d, tl.sum(summed * pv.to(tl.float32), 0))
        part = dprompt_at + ((m * 2 * H + h) * ROWS + r)[:, None] * D + d[None, :]
        tl.store(part + H * ROWS * D, summed * strength, mask=(r < n_prompt)[:, None])
        dshare = tl.dot(do, tl.trans((pv.to(tl.float32) * strength).to(pv.dtype)))
        if DROPOUT > 0:
            dshare *= kept
        prefix_delta = tl.sum(share * dshare, 1)
        delta -= prefix_delta  # what is left of o is the row's own attention
        dshare = (share * (dshare - prefix_delta[:, None])).to(pv.dtype)
        dpk = tl.dot(tl.trans(dshare), prefix_q) * softmax_scale
        tl.store(part, dpk, mask=(r < n_prompt)[:, None])
        if ROW and not UNROTATED:
            dq = tl.dot(dshare, pk)
    if ROW:
        tl.store(delta_at + h * n_queries + n, delta, mask=live)
        lse = tl.load(lse_at + h * n_queries + n, mask=live, other=0.0)
        for step in range(tl.load(key_from + m), tl.load(key_from + m + 1)):
            j = tl.load(key_tile + step) * N + tl.arange(0, N)
            inside = (j < n_keys)[:, None]
            kv_offset = j[:, None] * kv_stride + (g * D + d)[None, :]
            k = tl.load(k_at + kv_offset, mask=inside, other=0.0)
            v = tl.load(v_at + kv_offset, mask=inside, other=0.0)
            score = tl.dot(q, tl.trans(k)) * scale
            seen = sees(j[None, :], i[:, None], low[:, None], preamble_low[:, None], preamble_high[:, None])
            weight = tl.where(seen, tl.exp2(score - lse[:, None]), 0.0)
            dscore = weight * (tl.dot(do, tl.trans(v)) - delta[:, None])
            dq += tl.dot(dscore.to(k.dtype), k)
        dq = rotated_back(dq * softmax_scale, cos_at, sin_at, i, live, D, M)
        if UNROTATED:  # the gradient of the prefix's scores is that of unrotated queries
            pk = tl.load(at, mask=(r < n_prompt)[:, None], other=0.0)
            dq += tl.dot(dshare, pk) * softmax_scale
        dq_ptr = dq_at + n[:, None] * dq_stride + (h * D + d)[None, :]
        tl.store(dq_ptr, dq.to(dq_at.dtype.element_ty), mask=live[:, None])


@kernel
def key_gradient_kernel(
    q_at, k_at, v_at, do_at, lse_at, delta_at, dk_at, dv_at, sums_at, cos_at, sin_at,
    place, first, preamble_start, preamble_end, query_tile, part_tile, part_from, part_slot,
    n_queries, n_keys, q_stride, kv_stride, o_stride, dkv_stride, scale, softmax_scale,
    GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of keys and values over the query heads that share them, or one partial sum."""
    part, g = tl.program_id(0), tl.program_id(1)
    j = tl.load(part_tile + part) * N + tl.arange(0, N)
    inside = j < n_keys
    d = tl.arange(0, D)
    kv_offset = j[:, None] * kv_stride + (g * D + d)[None, :]
    k = tl.load(k_at + kv_offset, mask=inside[:, None], other=0.0)
    v = tl.load(v_at + kv_offset, mask=inside[:, None], other=0.0)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    start, end = tl.load(part_from + part), tl.load(part_from + part + 1)
    for h in range(g * GROUP, (g + 1) * GROUP):
        for step in range(start, end):
            n, live, i, low, preamble_low, preamble_high = load_queries(
                place, first, preamble_start, preamble_end, tl.load(query_tile + step), n_queries, M
            )
            column = (h * D + d)[None, :]
            q = tl.load(q_at + n[:, None] * q_stride + column, mask=live[:, None], other=0.0)
            do = tl.load(do_at + n[:, None] * o_stride + column, mask=live[:, None], other=0.0)
            lse = tl.load(lse_at + h * n_queries + n, mask=live, other=0.0)
            delta = tl.load(delta_at + h * n_queries + n, mask=live, other=0.0)
            score = tl.dot(k, tl.trans(q)) * scale
            seen = sees(j[:, None], i[None, :], low[None, :], preamble_low[None, :], preamble_high[None, :])
            weight = tl.where(seen, tl.exp2(score - lse[None, :]), 0.0)
            dv += tl.dot(weight.to(do.dtype), do)
            dscore = weight * (tl.dot(v, tl.trans(do)) - delta[None, :])
            dk += tl.dot(dscore.to(q.dtype), q)
    dk *= softmax_scale
    slot = tl.load(part_slot + part)
    if slot < 0:
        _store_key_gradient(dk, dv, dk_at, dv_at, cos_at, sin_at, j, inside, g, dkv_stride, D, N)
    else:
        at = sums_at + (slot * tl.num_programs(1) + g) * 2 * N * D
        at += tl.arange(0, N)[:, None] * D + d[None, :]
        tl.store(at, dk)
        tl.store(at + N * D, dv)


@triton.jit
def _store_key_gradient(
    dk, dv, dk_at, dv_at, cos_at, sin_at, j, inside, g, dkv_stride, D: tl.constexpr, N: tl.constexpr
):
    dk = rotated_back(dk, cos_at, sin_at, j, inside, D, N)
    at = j[:, None] * dkv_stride + (g * D + tl.arange(0, D))[None, :]
    tl.store(dk_at + at, dk.to(dk_at.dtype.element_ty), mask=inside[:, None])
    tl.store(dv_at + at, dv.to(dv_at.dtype.element_ty), mask=inside[:, None])


@kernel
def sum_key_gradient_kernel(
    sums_at, dk_at, dv_at, cos_at, sin_at, sum_tile, sum_from, n_keys, dkv_stride,
    D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Sum the parts of a key tile that has several, in order."""
    number, g = tl.program_id(0), tl.program_id(1)
    inner = tl.arange(0, N)[:, None] * D + tl.arange(0, D)[None, :]
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    for slot in range(tl.load(sum_from + number), tl.load(sum_from + number + 1)):
        at = sums_at + (slot * tl.num_programs(1) + g) * 2 * N * D + inner
        dk += tl.load(at)
        dv += tl.load(at + N * D)
    j = tl.load(sum_tile + number) * N + tl.arange(0, N)
    _store_key_gradient(dk, dv, dk_at, dv_at, cos_at, sin_at, j, j < n_keys, g, dkv_stride, D, N)


@kernel
def sum_prefix_gradient_kernel(
    dprompt_at, dstrength_at, kv_at, strength_at, q_at, n_tiles, n_prompt, kv_stride, q_stride,
    GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, ZEROS: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """Sum over query tiles; a program owns BLOCK channels of one group's pk or pv, or a head's strengths."""
    H: tl.constexpr = G * GROUP
    block, which = tl.program_id(0), tl.program_id(1)
    if which < 2 * G:
        inner = block * BLOCK + tl.arange(0, BLOCK)
        r, d = inner // D, inner % D
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, n_tiles, TILES):
            m = first + tl.arange(0, TILES)
            for member in range(GROUP):
                head = which // G * H + which % G * GROUP + member  # of the pk of all heads, or of the pv
                at = (m * 2 * H + head)[:, None] * ROWS * D + inner[None, :]
                real = (m < n_tiles)[:, None] & (r < n_prompt)[None, :]
                total += tl.sum(tl.load(dprompt_at + at, mask=real, other=0.0), 0)
        at = kv_at + r * kv_stride + which * D + d
        tl.store(at, total.to(kv_at.dtype.element_ty), mask=r < n_prompt)
        if ZEROS and which < G:
            for member in range(GROUP):
                at = q_at + r * q_stride + (which * GROUP + member) * D + d
                tl.store(at, tl.zeros([BLOCK], q_at.dtype.element_ty), mask=r < n_prompt)
    elif block == 0:
        WIDTH: tl.constexpr = ROWS if BY_TOKEN else D
        n = tl.arange(0, WIDTH)
        head, n_strengths = which - 2 * G, n_prompt if BY_TOKEN else D
        strength = tl.zeros([WIDTH], tl.float32)
        for first in range(0, n_tiles, TILES):
            m = first + tl.arange(0, TILES)
            at = (m * H + head)[:, None] * WIDTH + n[None, :]
            strength += tl.sum(tl.load(dstrength_at + at, mask=(m < n_tiles)[:, None], other=0.0), 0)
        tl.store(strength_at + head * n_strengths + n, strength, mask=n < n_strengths)
