"""Attention over a packed row with the gated prefix in the same pass, and their gradients.

Per query tile, with q already rotated and c the prefix's strength,

    o = softmax(q k^T / sqrt(D) where seen) v  +  softmax(q pk^T / sqrt(D)) (c * pv)

where c differs by channel or by prompt token. If unrotated queries attend to the prefix, q is rotated back
for the second term. The prefix branch is computed while the queries are in registers, so that it reads and
writes no tensor of the row's size. The backward pass recomputes the attention weights from the log-sum-exp
(arXiv 2205.14135) and the prefix's contribution to ``o`` from the prompt, so that only q, k, v, o are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_adapter.model.kernels.entry import Entry
from lit_adapter.model.kernels.sizes import ceil_div, power_of_two
from lit_adapter.model.tiles import KEY_TILE, OWNED_KEYS, QUERY_TILE, VISITING_TILE, TilePlan

LOG2_E = 1.4426950408889634

LENGTHS = ("n_queries", "n_keys", "n_prompt", "n_tiles")
PLAN = tuple(field.name for field in fields(TilePlan))


def _kernel(function: Any) -> Any:
    """Compile once for all rows, whose lengths and plan addresses all differ."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    compiled = triton.jit(
        do_not_specialize=[name for name in names if name in LENGTHS],
        do_not_specialize_on_alignment=[name for name in names if name in PLAN],
    )
    return Entry(compiled(function))


@dataclass
class Prefix:
    """A layer's projected prompt and its strength."""

    kv: Tensor
    """Keys and values, joined, ``[K, 2 G D]``; rows may be strided."""
    strength: Tensor
    """c(g) for every channel, fp32 ``[H, D]``, or for every prompt token ``[H, K]``."""
    by_token: bool = False
    """Whether ``strength`` is that of prompt tokens."""
    unrotated: bool = False
    """Whether queries attend to the prompt as they were before rotation."""


@triton.jit
def _load_queries(place, first, preamble_start, preamble_end, m, n_queries, TILE: tl.constexpr):
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
def _sees(j, i, low, preamble_low, preamble_high):
    """Return whether queries at ``i`` see keys at ``j``; the two broadcast."""
    return (j <= i) & ((j >= low) | ((j >= preamble_low) & (j < preamble_high)))


@triton.jit
def _rotated_back(x, cos_at, sin_at, place, live, D: tl.constexpr, ROWS: tl.constexpr):
    """Return the gradient ``x [ROWS, D]`` rotated by the opposite angles of its positions ``place``."""
    HALF: tl.constexpr = D // 2
    at = place[:, None] * HALF + tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_at + at, mask=live[:, None], other=0.0)
    sin = tl.load(sin_at + at, mask=live[:, None], other=0.0)
    a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))
    turned = tl.join(a * cos + b * sin, b * cos - a * sin)
    return tl.reshape(tl.permute(turned, (0, 2, 1)), (ROWS, D))


@triton.jit
def _strength(strength_at, h, n_prompt, BY_TOKEN: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """Return a head's c(g), fp32 ``[1, D]`` or ``[ROWS, 1]``."""
    if BY_TOKEN:
        r = tl.arange(0, ROWS)
        strength = tl.load(strength_at + h * n_prompt + r, mask=r < n_prompt, other=0.0)[:, None]
    else:
        strength = tl.load(strength_at + h * D + tl.arange(0, D))[None, :]
    return strength


@triton.jit
def _prefix_weights(q, pk, n_prompt, scale, ROWS: tl.constexpr):
    """Return softmax(q pk^T / sqrt(D)), fp32, ``[queries, ROWS]``; rows beyond the prompt have weight 0."""
    score = tl.dot(q, tl.trans(pk)) * scale
    score = tl.where((tl.arange(0, ROWS) < n_prompt)[None, :], score, -float("inf"))
    weight = tl.exp2(score - tl.max(score, 1)[:, None])
    return weight / tl.sum(weight, 1)[:, None]


@_kernel
def _forward_kernel(
    q_at, k_at, v_at, o_at, lse_at, cos_at, sin_at, prompt_at, strength_at,
    place, first, preamble_start, preamble_end, key_from, key_tile,
    n_queries, n_keys, q_stride, kv_stride, o_stride, prompt_stride, n_prompt, scale,
    GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, BY_TOKEN: tl.constexpr, UNROTATED: tl.constexpr,
):  # fmt: skip
    m, h = tl.program_id(0), tl.program_id(1)
    g, H = h // GROUP, tl.num_programs(1)
    n, live, i, low, preamble_low, preamble_high = _load_queries(
        place, first, preamble_start, preamble_end, m, n_queries, M
    )
    d = tl.arange(0, D)
    q = tl.load(q_at + n[:, None] * q_stride + (h * D + d)[None, :], mask=live[:, None], other=0.0)
    if UNROTATED:  # before the row's own attention takes the registers
        r = tl.arange(0, ROWS)
        at = prompt_at + (r * prompt_stride)[:, None] + (g * D + d)[None, :]
        pk = tl.load(at, mask=(r < n_prompt)[:, None], other=0.0)
        prefix_q = _rotated_back(q.to(tl.float32), cos_at, sin_at, i, live, D, M).to(q.dtype)
        prefix_weight = _prefix_weights(prefix_q, pk, n_prompt, scale, ROWS).to(pk.dtype)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    y = tl.zeros([M, D], tl.float32)
    for step in range(tl.load(key_from + m), tl.load(key_from + m + 1)):
        j = tl.load(key_tile + step) * N + tl.arange(0, N)
        inside = (j < n_keys)[:, None]
        k = tl.load(k_at + j[:, None] * kv_stride + (g * D + d)[None, :], mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k)) * scale
        seen = _sees(j[None, :], i[:, None], low[:, None], preamble_low[:, None], preamble_high[:, None])
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
            prefix_weight = _prefix_weights(q, pk, n_prompt, scale, ROWS).to(pv.dtype)
        if BY_TOKEN:
            strength = _strength(strength_at, h, n_prompt, True, D, ROWS)
            y += tl.dot(prefix_weight, (pv.to(tl.float32) * strength).to(pv.dtype))
        else:
            y += tl.dot(prefix_weight, pv) * _strength(strength_at, h, n_prompt, False, D, ROWS)
    o_ptr = o_at + n[:, None] * o_stride + (h * D + d)[None, :]
    tl.store(o_ptr, y.to(o_at.dtype.element_ty), mask=live[:, None])


@_kernel
def _query_gradient_kernel(
    q_at, k_at, v_at, o_at, do_at, lse_at, delta_at, dq_at, cos_at, sin_at,
    prompt_at, strength_at, dprompt_at, dstrength_at,
    place, first, preamble_start, preamble_end, key_from, key_tile,
    n_queries, n_keys, q_stride, kv_stride, o_stride, dq_stride, prompt_stride, n_prompt,
    scale, softmax_scale,
    GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, BY_TOKEN: tl.constexpr, UNROTATED: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Compute partial gradients of the prefix and, if ROW, the gradients of the queries."""
    m, h = tl.program_id(0), tl.program_id(1)
    g, H = h // GROUP, tl.num_programs(1)
    n, live, i, low, preamble_low, preamble_high = _load_queries(
        place, first, preamble_start, preamble_end, m, n_queries, M
    )
    d = tl.arange(0, D)
    q = tl.load(q_at + n[:, None] * q_stride + (h * D + d)[None, :], mask=live[:, None], other=0.0)
    prefix_q = q
    if UNROTATED:  # before the other tiles take the registers
        prefix_q = _rotated_back(q.to(tl.float32), cos_at, sin_at, i, live, D, M).to(q.dtype)
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
        strength = _strength(strength_at, h, n_prompt, BY_TOKEN, D, ROWS)
        share = _prefix_weights(prefix_q, pk, n_prompt, scale, ROWS)
        narrow = share.to(pv.dtype)
        summed = tl.dot(tl.trans(narrow), do)  # [ROWS, D], from which the gradients of pv and c follow
        if BY_TOKEN:
            tl.store(dstrength_at + (m * H + h) * ROWS + r, tl.sum(summed * pv.to(tl.float32), 1))
        else:
            tl.store(dstrength_at + (m * H + h) * D + d, tl.sum(summed * pv.to(tl.float32), 0))
        part = dprompt_at + ((m * 2 * H + h) * ROWS + r)[:, None] * D + d[None, :]
        tl.store(part + H * ROWS * D, summed * strength, mask=(r < n_prompt)[:, None])
        dshare = tl.dot(do, tl.trans((pv.to(tl.float32) * strength).to(pv.dtype)))
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
            seen = _sees(j[None, :], i[:, None], low[:, None], preamble_low[:, None], preamble_high[:, None])
            weight = tl.where(seen, tl.exp2(score - lse[:, None]), 0.0)
            dscore = weight * (tl.dot(do, tl.trans(v)) - delta[:, None])
            dq += tl.dot(dscore.to(k.dtype), k)
        dq = _rotated_back(dq * softmax_scale, cos_at, sin_at, i, live, D, M)
        if UNROTATED:  # the gradient of the prefix's scores is that of unrotated queries
            pk = tl.load(at, mask=(r < n_prompt)[:, None], other=0.0)
            dq += tl.dot(dshare, pk) * softmax_scale
        dq_ptr = dq_at + n[:, None] * dq_stride + (h * D + d)[None, :]
        tl.store(dq_ptr, dq.to(dq_at.dtype.element_ty), mask=live[:, None])


@_kernel
def _key_gradient_kernel(
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
            n, live, i, low, preamble_low, preamble_high = _load_queries(
                place, first, preamble_start, preamble_end, tl.load(query_tile + step), n_queries, M
            )
            column = (h * D + d)[None, :]
            q = tl.load(q_at + n[:, None] * q_stride + column, mask=live[:, None], other=0.0)
            do = tl.load(do_at + n[:, None] * o_stride + column, mask=live[:, None], other=0.0)
            lse = tl.load(lse_at + h * n_queries + n, mask=live, other=0.0)
            delta = tl.load(delta_at + h * n_queries + n, mask=live, other=0.0)
            score = tl.dot(k, tl.trans(q)) * scale
            seen = _sees(j[:, None], i[None, :], low[None, :], preamble_low[None, :], preamble_high[None, :])
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
    dk = _rotated_back(dk, cos_at, sin_at, j, inside, D, N)
    at = j[:, None] * dkv_stride + (g * D + tl.arange(0, D))[None, :]
    tl.store(dk_at + at, dk.to(dk_at.dtype.element_ty), mask=inside[:, None])
    tl.store(dv_at + at, dv.to(dv_at.dtype.element_ty), mask=inside[:, None])


@_kernel
def _sum_key_gradient_kernel(
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


@_kernel
def _sum_prefix_gradient_kernel(
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


def _sizes(k: Tensor, D: int, H: int, queries: int = QUERY_TILE, keys: int = KEY_TILE) -> dict[str, Any]:
    return {"GROUP": H * D // k.shape[1], "D": D, "M": queries, "N": keys, "num_warps": 4}


@cache
def _registers(device: torch.device, prompt_rows: int) -> int | None:
    """Return how many registers a thread of the forward kernel may use; None leaves it to the compiler.

    With 168, a multiprocessor of a Hopper GPU runs three programs. On other GPUs, or with long prompts,
    spilled registers would cost more than that gains.
    """
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    return 168 if hopper and prompt_rows <= 16 else None


def _prompt_rows(prefix: Prefix | None) -> tuple[int, int]:
    """Return the prompt's length and the size of the tile that holds it; 0 and 0 without a prompt."""
    if prefix is None:
        return 0, 0
    K = prefix.kv.shape[0]
    return K, max(16, power_of_two(K))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor],
    plan: TilePlan,
    D: int,
    prefix: Prefix | None,
) -> tuple[Tensor, Tensor]:
    """Attend over a packed row by its ``plan``, and to the prompt of ``prefix`` if there is one.

    ``q [M, H * D]`` and ``k [T, G * D]`` are rotated, ``v`` has the layout of ``k``; rows may be strided.
    ``rotation`` is the cosines and sines of the row's positions, fp32 ``[T, D/2]``.

    Returns:
        ``o [M, H * D]`` and its log-sum-exp (base 2) ``[H, M]``, fp32.
    """
    H = q.shape[1] // D
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, q.shape[0], dtype=torch.float32, device=q.device)
    n_prompt, prompt_rows = _prompt_rows(prefix)
    some = prefix or Prefix(q, lse)
    _forward_kernel[(ceil_div(q.shape[0], QUERY_TILE), H)](
        q, k, v, o, lse, *rotation, some.kv, some.strength,
        plan.place, plan.first, plan.preamble_start, plan.preamble_end, plan.key_from, plan.key_tile,
        plan.n_queries, plan.n_keys, q.stride(0), k.stride(0), o.stride(0), some.kv.stride(0), n_prompt,
        D**-0.5 * LOG2_E,
        **_sizes(k, D, H), **_form(some, prompt_rows), num_stages=3,
        maxnreg=_registers(q.device, prompt_rows),
    )  # fmt: skip
    return o, lse


def _form(prefix: Prefix, prompt_rows: int) -> dict[str, Any]:
    return {"ROWS": prompt_rows, "BY_TOKEN": prefix.by_token, "UNROTATED": prefix.unrotated}


@dataclass
class Gradients:
    """Where `attend_backward` writes the gradients of its inputs, rotated back; rows may be strided."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass
class PrefixGradients:
    """Where `attend_backward` writes the gradients of the prefix; rows may be strided."""

    kv: Tensor
    """For the projected prompt, ``[K, 2 G D]``."""
    q: Tensor | None
    """Query rows ``[K, H D]`` next to ``kv``, to be set to 0: prompts have no queries. None without them."""
    strength: Tensor
    """For c(g), fp32, as in `Prefix`."""


def attend_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor],
    o: Tensor,
    lse: Tensor,
    plan: TilePlan,
    D: int,
    prefix: Prefix | None,
    into: Gradients | None,
    into_prefix: PrefixGradients | None,
) -> None:
    """Compute the gradients of `attend` and of the rotation before it, from what `attend` took and returned.

    ``do``, the gradient of ``o``, is contiguous. ``into`` is None if the gradients of q, k and v are not
    needed; ``into_prefix`` is None without a prefix.
    """
    H, G, n_tiles = q.shape[1] // D, k.shape[1] // D, ceil_div(q.shape[0], QUERY_TILE)
    n_prompt, prompt_rows = _prompt_rows(prefix)
    delta = torch.empty_like(lse)
    dprompt = lse.new_empty(n_tiles, 2, H, prompt_rows, D)
    some = prefix or Prefix(q, lse)
    dstrength = lse.new_empty(n_tiles, H, prompt_rows if some.by_token else D)
    out = into or Gradients(do, do, do)
    scales = (D**-0.5 * LOG2_E, D**-0.5)
    sight = (plan.place, plan.first, plan.preamble_start, plan.preamble_end)
    sizes = _sizes(k, D, H)
    if some.unrotated and D > 64:  # two forms of the queries do not fit the registers of four warps
        sizes["num_warps"] = 8
    _query_gradient_kernel[(n_tiles, H)](
        q, k, v, o, do, lse, delta, out.q, *rotation, some.kv, some.strength, dprompt, dstrength,
        *sight, plan.key_from, plan.key_tile,
        plan.n_queries, plan.n_keys, q.stride(0), k.stride(0), o.stride(0), out.q.stride(0),
        some.kv.stride(0), n_prompt, *scales, **sizes, **_form(some, prompt_rows),
        ROW=into is not None, num_stages=2,
    )  # fmt: skip
    if into is not None:
        n_sums = plan.sum_tile.shape[0]
        sums = lse.new_empty(plan.n_slots, G, 2, OWNED_KEYS, D) if n_sums else lse
        _key_gradient_kernel[(plan.n_parts, G)](
            q, k, v, do, lse, delta, into.k, into.v, sums, *rotation, *sight,
            plan.query_tile, plan.part_tile, plan.part_from, plan.part_slot,
            plan.n_queries, plan.n_keys, q.stride(0), k.stride(0), o.stride(0), into.k.stride(0),
            *scales, **_sizes(k, D, H, VISITING_TILE, OWNED_KEYS), num_stages=1,
        )  # fmt: skip
        _sum_key_gradient_kernel[(n_sums, G)](
            sums, into.k, into.v, *rotation, plan.sum_tile, plan.sum_from,
            plan.n_keys, into.k.stride(0), D=D, N=OWNED_KEYS, num_warps=4,
        )  # fmt: skip
    if into_prefix is not None:
        kv, zeros = into_prefix.kv, into_prefix.q
        block = min(256, prompt_rows * D)
        _sum_prefix_gradient_kernel[(prompt_rows * D // block, 2 * G + H)](
            dprompt, dstrength, kv, into_prefix.strength, kv if zeros is None else zeros,
            n_tiles, n_prompt, kv.stride(0), 0 if zeros is None else zeros.stride(0),
            GROUP=H // G, G=G, D=D, ROWS=prompt_rows, BLOCK=block, TILES=32, ZEROS=zeros is not None,
            BY_TOKEN=some.by_token,
        )  # fmt: skip
