"""Attention of one decode step: one query a slot, keys in the cache, and the gated prefix branch.

With few slots, several programs share the keys of one; the last of them to finish adds up the shares.

Letters: B slots, H query heads, G key/value heads, D head size, S cache length, K prompt length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_adapter.model.kernels.decode_products import starts_early

KEYS = 64
"""Keys that a program looks at in one go."""


class Shares:
    """Where programs that share one text's keys leave their parts: with few slots, many share one.

    Args:
        n_slots: B.
        heads: query heads, key/value heads (H, G).
        head_dim: D.
        length: the cache's (S).
        device: a CUDA device.
    """

    def __init__(
        self, n_slots: int, heads: tuple[int, int], head_dim: int, length: int, device: torch.device
    ) -> None:
        wanted = 2 * _multiprocessors(device) // (n_slots * heads[1])
        most = triton.next_power_of_2(triton.cdiv(length, KEYS))
        self.splits = min(triton.next_power_of_2(max(1, wanted) + 1) // 2, most, 64)
        shape = (n_slots, heads[1], self.splits, heads[0] // heads[1])
        self.partial = torch.empty(*shape, head_dim, device=device)  # fp32 [B, G, splits, H/G, D]
        self.weight = torch.empty(*shape, device=device)  # log of each part's softmax denominator
        self.early = starts_early(device)
        self.arrived = torch.zeros(n_slots, heads[1], dtype=torch.int32, device=device)


def attend(
    q: Tensor,
    cache: tuple[Tensor, Tensor],
    position: Tensor,
    prefix: tuple[Tensor, Tensor, Tensor] | None,
    shares: Shares,
    y: Tensor,
) -> None:
    """Attend to all keys up to each slot's position, and add the gated prefix branch.

    Args:
        q: rotated queries ``[B, H, D]``.
        cache: the layer's keys and values ``[B, G, S, D]``.
        position: of the newest key ``[B]``.
        prefix: the prompt's keys and values ``[G, K, D]`` and the strength of each channel, fp32
            ``[H, D]``; None for a layer without prefix.
        shares: for the parts of long texts.
        y: is given the result ``[B, H, D]``.
    """
    B, H, D = q.shape
    G, S = cache[0].shape[1:3]
    prompt = prefix[0].shape[1] if prefix else 0
    _attention_kernel[B * G, shares.splits](
        q, *cache, position, *(prefix or (q, q, q)), y,
        shares.partial, shares.weight, shares.arrived, S, D**-0.5,
        H=H, G=G, D=D, HEADS=max(16, triton.next_power_of_2(H // G)), KEYS=KEYS,
        K=prompt, K_PADDED=max(16, triton.next_power_of_2(prompt)), SPLITS=shares.splits, EARLY=shares.early,
        num_warps=4, num_stages=3, launch_pdl=shares.early,
    )  # fmt: skip


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, position_ptr, pk_ptr, pv_ptr, strength_ptr, y_ptr,
    partial_ptr, weight_ptr, arrived_ptr, S, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    K: tl.constexpr, K_PADDED: tl.constexpr, SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns the query heads of one slot and group, and one of SPLITS shares of the keys.

    The last program of a slot and group to arrive adds up the shares.
    """
    GROUP: tl.constexpr = H // G
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair = tl.program_id(0)
    head = tl.arange(0, HEADS)
    real = head < GROUP
    d = tl.arange(0, D)
    channel = (pair * GROUP + head)[:, None] * D + d[None, :]  # of queries and results
    q = tl.load(q_ptr + channel, mask=real[:, None], other=0.0)
    length = tl.load(position_ptr + pair // G).to(tl.int32) + 1
    own = tl.cdiv(tl.cdiv(length, KEYS), SPLITS) * KEYS
    begin = tl.program_id(1) * own
    at = pair.to(tl.int64) * S * D
    y, weight = _attend_keys(
        q, k_ptr + at, v_ptr + at, begin, tl.minimum(begin + own, length), scale, D, KEYS
    )
    last = True
    if SPLITS > 1:
        share = (pair * SPLITS + tl.program_id(1)) * GROUP + head
        tl.store(partial_ptr + share[:, None] * D + d[None, :], y, mask=real[:, None])
        tl.store(weight_ptr + share, weight, mask=real)
        tl.debug_barrier()  # all of this program's stores come before it is counted
        last = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel") == SPLITS - 1
    if last:
        if SPLITS > 1:
            tl.store(arrived_ptr + pair, 0)
            y = _joined(partial_ptr, weight_ptr, pair, head, real, D, GROUP, SPLITS)
        if K > 0:
            strength = (pair % G * GROUP + head)[:, None] * D + d[None, :]
            strength = tl.load(strength_ptr + strength, mask=real[:, None], other=0.0)
            prompt = pair % G * K * D
            y += strength * _attend_prompt(q, pk_ptr + prompt, pv_ptr + prompt, scale, D, K, K_PADDED)
        tl.store(y_ptr + channel, y, mask=real[:, None])


@triton.jit
def _attend_keys(q, k_ptr, v_ptr, begin, end, scale, D: tl.constexpr, KEYS: tl.constexpr):
    """Return the attention of ``q [HEADS, D]`` over keys ``begin`` to ``end``, and its weight's logarithm."""
    d = tl.arange(0, D)
    top = tl.full((q.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    y = tl.zeros((q.shape[0], D), tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        seen = key < end
        place = key[:, None] * D + d[None, :]
        k = tl.load(k_ptr + place, mask=seen[:, None], other=0.0)
        v = tl.load(v_ptr + place, mask=seen[:, None], other=0.0)
        score = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        p = tl.exp(score - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(p, 1)
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None])
        top = higher
    weight = tl.where(total > 0, top + tl.log(total), float("-inf"))  # an empty share weighs nothing
    return y / tl.where(total > 0, total, 1.0)[:, None], weight


@triton.jit
def _joined(
    partial_ptr, weight_ptr, pair, head, real, D: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr
):
    """Return the sum of the shares ``[HEADS, D]``, each by its weight. They lie in L2: no stale L1 line."""
    splits = pair * SPLITS + tl.arange(0, SPLITS)
    place = splits[:, None] * GROUP + head[None, :]
    weight = tl.load(weight_ptr + place, mask=real[None, :], other=0.0, cache_modifier=".cg")
    top = tl.max(weight, 0)
    total = tl.sum(tl.exp(weight - top[None, :]), 0)
    y = tl.zeros((head.shape[0], D), tl.float32)
    for split in range(SPLITS):
        share = (pair * SPLITS + split) * GROUP + head
        factor = tl.exp(tl.load(weight_ptr + share, mask=real, other=0.0, cache_modifier=".cg") - top) / total
        place_of_part = share[:, None] * D + tl.arange(0, D)[None, :]
        part = tl.load(partial_ptr + place_of_part, mask=real[:, None], other=0.0, cache_modifier=".cg")
        y += factor[:, None] * part
    return y


@triton.jit
def _attend_prompt(q, pk_ptr, pv_ptr, scale, D: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr):
    """Return the attention of ``q [HEADS, D]`` over the prompt's K keys."""
    key = tl.arange(0, K_PADDED)
    place = key[:, None] * D + tl.arange(0, D)[None, :]
    pk = tl.load(pk_ptr + place, mask=(key < K)[:, None], other=0.0)
    pv = tl.load(pv_ptr + place, mask=(key < K)[:, None], other=0.0)
    score = tl.where((key < K)[None, :], tl.dot(q, tl.trans(pk)) * scale, float("-inf"))
    p = tl.exp(score - tl.max(score, 1)[:, None])
    return tl.dot((p / tl.sum(p, 1)[:, None]).to(pv.dtype), pv)
