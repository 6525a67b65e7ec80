"""Attention to the keys in the cache and to each slot's own gated prefix, of one query a slot or of several.

Several queries of one slot form a tile, which reads their keys once. With few tiles, several programs share
the keys of one, and one more computes its prefix; the last of them to finish adds up their parts.

Letters: B slots, T tokens, N queries, M tiles, H query heads, G key/value heads, D head size, S cache length,
K prompt length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_adapter.model.kernels.decode_products import starts_early
from lit_adapter.model.kernels.entry import Entry
from lit_adapter.model.kernels.sizes import ceil_div, power_of_two
from lit_adapter.model.prefix import PrefixState

KEYS = 32
"""Keys that a program reads at a time."""
MOST_SPLITS = 64
HEADS = 8
"""Heads that one program rotates or stores."""
ROWS = 16
"""Fewest rows of a matrix product: as many as possible are a tile's queries, with their heads of a group."""


def tile_size(heads: tuple[int, int]) -> int:
    """Return how many queries of one slot form a tile, given query and key/value heads (H, G)."""
    return max(1, ROWS // power_of_two(heads[0] // heads[1]))


class Parts:
    """Where the programs that share one tile's keys leave their parts.

    Args:
        n_tiles: M.
        size: queries of a tile.
        heads: query and key/value heads (H, G).
        head_dim: D.
        length: of the cache (S).
        device: of the tensors.
    """

    def __init__(
        self,
        n_tiles: int,
        size: int,
        heads: tuple[int, int],
        head_dim: int,
        length: int,
        device: torch.device,
    ) -> None:
        self.size = size
        programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
        wanted = max(1, programs // (n_tiles * heads[1]))
        most = power_of_two(ceil_div(length, KEYS))
        self.splits = min(power_of_two(wanted + 1) // 2, most, MOST_SPLITS)
        rows = size * heads[0] // heads[1]
        shape = (n_tiles, heads[1], self.splits + 1, rows)  # one more for the prefix
        self.y = torch.empty(*shape, head_dim, device=device)  # fp32 [M, G, splits + 1, size * H/G, D]
        self.weight = torch.empty(*shape, device=device)  # log of each part's softmax denominator
        self.arrived = torch.zeros(n_tiles, heads[1], dtype=torch.int32, device=device)
        self.early = starts_early(device)


def attend(
    q: Tensor,
    cache: tuple[Tensor, Tensor],
    rotation: tuple[Tensor, Tensor],
    position: Tensor,
    prefix: PrefixState | None,
    source: Tensor,
    parts: Parts,
    y: Tensor,
    window: int | None,
    slot: Tensor | None = None,
) -> None:
    """Attend to all keys up to each query's position, or the last ones, and add the gated prefix branch.

    A query at the cache's last place S - 1 belongs to a parked slot: it sees no key.

    Args:
        q: rotated queries ``[N, H * D]``; rows may be strided.
        cache: the layer's keys and values ``[B, G, S, D]``.
        rotation: cosines and sines of every position of the cache, fp32 ``[S, D/2]``.
        position: of the last key that each query sees ``[N]``.
        prefix: the layer's, a row for each slot: ``k`` and ``v [B, G, K, D]``, ``strength [B, H, 1, D]`` and
            the others as in `PrefixState`, contiguous; None if no slot has one.
        source: the slot whose row of ``prefix`` a slot uses ``[B]``; one row is read for all that are equal.
        parts: room for them; overwritten. The queries of one of its tiles belong to one slot.
        y: receives the result ``[N, H * D]``.
        window: how many keys a query sees at most; None for all.
        slot: of each query ``[N]``; None: the n-th query is that of slot n.
    """
    _, G, S, D = cache[0].shape
    H = y.shape[1] // D
    K = prefix.k.shape[2] if prefix else 0
    some = (prefix.k, prefix.v, prefix.strength, prefix.hidden) if prefix else (q, q, parts.y, parts.y)
    by_token = prefix.by_token if prefix else None
    unrotated = prefix.unrotated if prefix and isinstance(prefix.unrotated, Tensor) else None
    size, group = parts.size, H // G
    n_programs = parts.splits + (K > 0 and parts.splits > 1)
    own_slot = position if slot is None else slot
    _attention_kernel[len(y) // size * G, n_programs](
        q, *cache, *rotation, position, own_slot, *some, parts.y if by_token is None else by_token,
        parts.arrived if unrotated is None else unrotated.view(torch.int8),
        source, y, parts.y, parts.weight, parts.arrived, q.stride(0), S, window or S, D**-0.5,
        QUERIES=size, GROUP=group, G=G, D=D, ROWS=max(ROWS, power_of_two(size * group)), KEYS=KEYS,
        K=K, K_PADDED=max(16, power_of_two(K)), SPLITS=parts.splits, MAPPED=slot is not None,
        WIDTH=power_of_two(size * group * D), BY_TOKEN=by_token is not None, UNROTATED=unrotated is not None,
        EARLY=parts.early,
        num_warps=4, num_stages=3 if parts.splits == 1 else 2, launch_pdl=parts.early,
    )  # fmt: skip


def rotate_and_keep(
    qkv: Tensor, rotation: tuple[Tensor, Tensor], slot: Tensor, position: Tensor, cache: tuple[Tensor, Tensor]
) -> None:
    """Rotate queries and keys in place, and put keys and values into the cache.

    Args:
        qkv: queries, keys and values of each token ``[T, (H + 2 G) * D]``.
        rotation: cosines and sines, fp32 ``[T, D/2]``.
        slot: of each token's text ``[T]``.
        position: of each token in its text ``[T]``.
        cache: the layer's keys and values ``[B, G, S, D]``.
    """
    _, G, S, D = cache[0].shape
    T, n_heads = len(qkv), qkv.shape[1] // D
    _keep_kernel[T, ceil_div(n_heads, HEADS)](
        qkv, *rotation, slot, position, *cache, S, H=n_heads - 2 * G, G=G, HALF=D // 2, HEADS=HEADS
    )


@Entry
@triton.jit
def _keep_kernel(
    qkv_ptr, cos_ptr, sin_ptr, slot_ptr, position_ptr, k_ptr, v_ptr, S,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A program owns HEADS heads of one token."""
    t = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    d = tl.arange(0, HALF)[None, :]
    place = qkv_ptr + (t * (H + 2 * G) + head) * (2 * HALF) + d
    a = tl.load(place, mask=head < H + 2 * G, other=0.0)
    b = tl.load(place + HALF, mask=head < H + 2 * G, other=0.0)
    first, second = a.to(tl.float32), b.to(tl.float32)
    cos, sin = tl.load(cos_ptr + t * HALF + d), tl.load(sin_ptr + t * HALF + d)
    turned = (first * cos - second * sin).to(a.dtype)
    turned_too = (second * cos + first * sin).to(a.dtype)
    tl.store(place, turned, mask=head < H + G)
    tl.store(place + HALF, turned_too, mask=head < H + G)
    row = tl.load(slot_ptr + t) * G * S + tl.load(position_ptr + t)  # of the text's first group
    key = k_ptr + (row + (head - H) * S) * (2 * HALF) + d
    tl.store(key, turned, mask=(head >= H) & (head < H + G))
    tl.store(key + HALF, turned_too, mask=(head >= H) & (head < H + G))
    value = v_ptr + (row + (head - H - G) * S) * (2 * HALF) + d
    tl.store(value, a, mask=(head >= H + G) & (head < H + 2 * G))
    tl.store(value + HALF, b, mask=(head >= H + G) & (head < H + 2 * G))


@Entry
@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, pk_ptr, pv_ptr, strength_ptr, hidden_ptr,
    by_token_ptr, unrotated_ptr, source_ptr, y_ptr, part_ptr, weight_ptr, arrived_ptr, q_stride, S,
    window, scale,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr, SPLITS: tl.constexpr, MAPPED: tl.constexpr,
    WIDTH: tl.constexpr, BY_TOKEN: tl.constexpr, UNROTATED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns a tile's QUERIES with their heads of a group, and one of SPLITS shares of their keys."""
    pair, split = tl.program_id(0), tl.program_id(1)
    n, group = pair // G * QUERIES, pair % G
    row = tl.arange(0, ROWS)
    real = row < QUERIES * GROUP
    head = group * GROUP + row % GROUP
    # Safe before the wait: a step begins with a launch that waits for all of the step before it.
    if QUERIES == 1:
        own_n = n
        place = tl.load(position_ptr + n).to(tl.int32)
        length = tl.where(place == S - 1, 0, place + 1)
        first = tl.maximum(length - window, 0)
        longest, begin = length, first
    else:
        own_n = n + (row // GROUP)[:, None]
        place = tl.load(position_ptr + own_n, mask=real[:, None], other=S - 1).to(tl.int32)
        length = tl.where(place == S - 1, 0, place + 1)
        first = tl.maximum(length - window, 0)
        longest = tl.max(length)
        begin = tl.minimum(tl.min(tl.where(length > 0, first, S)), longest)
    slot = n
    if MAPPED:
        slot = tl.load(slot_ptr + n).to(tl.int32)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    d = tl.arange(0, D)[None, :]
    channel = head[:, None] * D + d
    q = tl.load(q_ptr + own_n * q_stride + channel, mask=real[:, None], other=0.0)
    share = tl.cdiv(tl.cdiv(longest - begin, KEYS), SPLITS) * KEYS
    begin = tl.minimum(begin + split * share, longest)  # a program beyond SPLITS, the prefix's, has no keys
    at = (slot * G + group).to(tl.int64) * S * D
    y, weight = _attend_keys(
        q, k_ptr + at, v_ptr + at, begin, tl.minimum(begin + share, longest), first, length, scale, D, KEYS
    )
    if K > 0:  # noqa: SIM102 (decided when compiling)
        if SPLITS == 1 or split == SPLITS:
            own = tl.load(source_ptr + slot)
            strength = tl.load(strength_ptr + own * G * GROUP * D + channel, mask=real[:, None], other=0.0)
            prompt = (own * G + group).to(tl.int64) * K * D
            prefix_q = q
            if UNROTATED:
                angle = place * (D // 2)
                back = tl.load(unrotated_ptr + own) != 0
                prefix_q = _rotated_back(q, cos_ptr + angle, sin_ptr + angle, back, D, ROWS)
            factor_ptr = by_token_ptr + (own * G * GROUP + head) * K
            y += strength * attend_prompt(
                prefix_q, pk_ptr + prompt, pv_ptr + prompt, hidden_ptr + own * K, factor_ptr, real, scale,
                D, K, K_PADDED, BY_TOKEN,
            )  # fmt: skip
    if SPLITS == 1:
        tl.store(y_ptr + own_n * G * GROUP * D + channel, y, mask=real[:, None])
    else:
        part = (pair * (SPLITS + 1) + split) * QUERIES * GROUP + row
        tl.store(part_ptr + part[:, None] * D + d, y, mask=real[:, None])
        tl.store(weight_ptr + part, weight, mask=real)
        tl.debug_barrier()  # all of this program's stores come before it is counted
        if tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel") == tl.num_programs(1) - 1:
            tl.store(arrived_ptr + pair, 0)
            _join(part_ptr, weight_ptr, y_ptr, pair, G, D, GROUP, QUERIES, K, SPLITS, WIDTH)


@triton.jit
def _attend_keys(
    q, k_ptr, v_ptr, begin, end, first, length, scale, D: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Return the attention of ``q [ROWS, D]`` over keys ``begin`` to ``end``, and its weight's logarithm.

    A row sees keys from its ``first`` on, up to its ``length``.
    """
    d = tl.arange(0, D)
    top = tl.full((q.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    y = tl.zeros((q.shape[0], D), tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        there = (key < end)[:, None]
        place = key[:, None] * D + d[None, :]
        k = tl.load(k_ptr + place, mask=there, other=0.0)
        v = tl.load(v_ptr + place, mask=there, other=0.0)
        seen = (key[None, :] >= first) & (key[None, :] < tl.minimum(length, end))
        score = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet
        p = tl.exp(score - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(p, 1)
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None])
        top = higher
    some = tl.where(total > 0, total, 1.0)
    return y / some[:, None], top + tl.log(some)  # an empty share's weight is 0, its logarithm -inf


@triton.jit
def _rotated_back(q, cos_ptr, sin_ptr, back, D: tl.constexpr, ROWS: tl.constexpr):
    """Return ``q [ROWS, D]``, if ``back``, as it was before its rotation.

    `rotated_back` of `attention_forward` would take about 40 more registers, for an angle of every head.
    """
    HALF: tl.constexpr = D // 2
    channel = tl.arange(0, HALF)[None, :]
    cos = tl.where(back, tl.load(cos_ptr + channel), 1.0)
    sin = tl.where(back, tl.load(sin_ptr + channel), 0.0)
    shrink = 1.0 / (cos * cos + sin * sin)  # yarn's rotation lengthens
    cos, sin = cos * shrink, sin * shrink
    a, b = tl.split(tl.permute(tl.reshape(q.to(tl.float32), (ROWS, 2, HALF)), (0, 2, 1)))
    turned = tl.join(a * cos + b * sin, b * cos - a * sin)
    return tl.reshape(tl.permute(turned, (0, 2, 1)), (ROWS, D)).to(q.dtype)


@triton.jit
def attend_prompt(
    q, pk_ptr, pv_ptr, hidden_ptr, by_token_ptr, real, scale,
    D: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """Return the attention of ``q [HEADS, D]`` over the keys of a prompt that are not hidden, of K.

    If BY_TOKEN, the weights of the ``real`` heads are multiplied by a factor for each key.
    """
    key = tl.arange(0, K_PADDED)
    place = key[:, None] * D + tl.arange(0, D)[None, :]
    pk = tl.load(pk_ptr + place, mask=(key < K)[:, None], other=0.0)
    pv = tl.load(pv_ptr + place, mask=(key < K)[:, None], other=0.0)
    hidden = tl.load(hidden_ptr + key, mask=key < K, other=float("-inf"))
    score = tl.dot(q, tl.trans(pk)) * scale + hidden[None, :]
    p = tl.exp(score - tl.max(score, 1)[:, None])
    p /= tl.sum(p, 1)[:, None]
    if BY_TOKEN:
        own = real[:, None] & (key < K)[None, :]
        p *= tl.load(by_token_ptr[:, None] + key[None, :], mask=own, other=0.0)
    return tl.dot(p.to(pv.dtype), pv)


@triton.jit
def _join(
    part_ptr, weight_ptr, y_ptr, pair, G: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
    QUERIES: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the sum of a tile's and group's parts, each by its weight, and of its prefix.

    Parts are read from L2, where all programs wrote them: a line in L1 could be an older step's.
    """
    channel = tl.arange(0, WIDTH)
    row = channel // D
    real = row < QUERIES * GROUP
    first = pair * (SPLITS + 1) * QUERIES * GROUP
    top = tl.full((WIDTH,), float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        place = weight_ptr + first + split * QUERIES * GROUP + row
        top = tl.maximum(top, tl.load(place, mask=real, other=0.0, cache_modifier=".cg"))
    top = tl.where(top == float("-inf"), 0.0, top)  # without any key all parts are 0
    total = tl.zeros((WIDTH,), tl.float32)
    y = tl.zeros((WIDTH,), tl.float32)
    for split in tl.static_range(SPLITS):
        place = weight_ptr + first + split * QUERIES * GROUP + row
        factor = tl.exp(tl.load(place, mask=real, other=0.0, cache_modifier=".cg") - top)
        part = part_ptr + (first + split * QUERIES * GROUP) * D + channel
        total += factor
        y += factor * tl.load(part, mask=real, other=0.0, cache_modifier=".cg")
    y /= tl.where(total > 0, total, 1.0)
    if K > 0:
        part = part_ptr + (first + SPLITS * QUERIES * GROUP) * D + channel
        y += tl.load(part, mask=real, other=0.0, cache_modifier=".cg")
    n = pair // G * QUERIES + row // GROUP
    own = (n * G + pair % G) * GROUP + row % GROUP
    tl.store(y_ptr + own * D + channel % D, y, mask=real)
