"""The plan of the CUDA attention kernels: which tiles of a packed row contain a visible pair.

A kernel handles a tile of queries and visits only the tiles of keys that one of them sees. These lists,
and what each query sees, are planned on the CPU once per row and used by every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_adapter.model.attention import PackedRow, moved
from lit_adapter.model.config import LlamaConfig

HEAD_SIZES = (16, 32, 64, 128)
"""Head sizes that the kernels compute."""
LONGEST_PROMPT = 64
"""Prompt tokens that fit into the attention kernel's registers together with its queries."""
QUERY_TILE, KEY_TILE = 64, 32
"""Sizes for a program that owns a tile of queries and visits tiles of keys."""
OWNED_KEYS, VISITING_TILE = 64, 32
"""Sizes for a program that owns a tile of keys and visits tiles of queries."""
VISITS = 16
"""Query tiles that one program sums into the gradient of a key tile. A preamble has hundreds of them, and
a single program that summed them all would keep the device waiting."""


def kept_per_token(model: LlamaConfig, size: int) -> int:
    """Return the bytes that a fused block keeps of each token for its backward pass (see `fused`).

    ``size`` is that of a number, in bytes; norms and log-sum-exps are kept in fp32.
    """
    heads = 2 * (model.n_head + model.n_kv_head) * model.head_dim
    return size * (2 * model.n_embd + heads + 2 * model.n_hidden) + 8 * model.n_head


@dataclass
class TilePlan:
    """Attention of some queries over a packed row of T tokens, as int32 tensors on the device.

    Query n is at position ``place[n]`` of the row and sees the positions from ``first[n]`` to itself, and
    those from ``preamble_start[n]`` to below ``preamble_end[n]`` (the preamble its record continues). Both
    ranges are within the window, if there is one.
    """

    n_keys: int
    """Tokens in the row (T)."""
    n_slots: int
    """Partial sums of the gradients of keys and values; see ``part_slot``."""
    place: Tensor
    first: Tensor
    preamble_start: Tensor
    preamble_end: Tensor
    key_from: Tensor
    """Query tile m visits the key tiles ``key_tile[key_from[m] : key_from[m + 1]]``."""
    key_tile: Tensor
    query_tile: Tensor
    """The query tiles that visit each key tile, for one key tile after another."""
    part_tile: Tensor
    """The key tile that part p of this work belongs to."""
    part_from: Tensor
    """Part p covers ``query_tile[part_from[p] : part_from[p + 1]]``."""
    part_slot: Tensor
    """The slot of part p among the partial sums; -1 where its key tile has no other part."""
    sum_tile: Tensor
    """The key tiles that have several parts."""
    sum_from: Tensor
    """The partial sums of ``sum_tile[n]`` are in the slots ``sum_from[n]`` to ``sum_from[n + 1]``."""

    @property
    def n_queries(self) -> int:
        """How many queries there are."""
        return self.place.shape[0]

    @property
    def n_parts(self) -> int:
        """How many parts the gradients of keys and values are divided into."""
        return self.part_tile.shape[0]


def plan_tiles(
    row: PackedRow, query_positions: Tensor | None, device: torch.device, window: int | None = None
) -> TilePlan:
    """Plan the attention of a row.

    Args:
        row: on the CPU.
        query_positions: ascending row positions of the queries ``[M]``; all of the row's if None.
        device: of the kernels.
        window: of the layers that will use the plan.
    """
    segment, preamble = row.segment.numpy(), row.preamble.numpy()
    n_keys = len(segment)
    start = np.flatnonzero(np.diff(segment, prepend=-1))  # of every segment; their numbers are their order
    end = np.append(start[1:], n_keys)
    place = np.arange(n_keys) if query_positions is None else query_positions.numpy()
    own, shared = segment[place], preamble[place]
    first = start[own]
    preamble_start = np.where(shared == own, 0, start[shared])
    preamble_end = np.where(shared == own, 0, end[shared])
    if window is not None:
        unseen = np.maximum(row.position.numpy()[place] + 1 - window, 0)  # from the text's start on
        preamble_start = np.minimum(preamble_start + unseen, preamble_end)
        first = np.maximum(first, place + 1 - window)
    sight = (place, first, preamble_start, preamble_end)
    key_tile, visitor = _visits(own, *sight, VISITING_TILE, OWNED_KEYS)
    query_from, query_tile = _lists(key_tile, visitor, -(-n_keys // OWNED_KEYS))
    key_lists = _lists(*_visits(own, *sight, QUERY_TILE, KEY_TILE)[::-1], -(-len(place) // QUERY_TILE))
    *work, sum_from = _parts(query_from)
    arrays = [*sight, *key_lists, query_tile, *work, sum_from]
    joined = moved(torch.from_numpy(np.concatenate(arrays).astype(np.int32)), device)
    parts = joined.split([len(array) for array in arrays])
    return TilePlan(n_keys, int(sum_from[-1]), *parts)


def _visits(
    segment: NDArray,
    place: NDArray,
    first: NDArray,
    preamble_start: NDArray,
    preamble_end: NDArray,
    size: int,
    key_size: int,
) -> tuple[NDArray, NDArray]:
    """Return the tiles of keys, and the tiles of queries that see something in them, as pairs.

    A pair may occur several times. A matrix of all pairs of tiles would take the host tens of milliseconds
    for a row of 40,000 tokens.
    """
    # One entry for each segment in each tile: from its first token to the last query there, and its preamble.
    tile = np.arange(len(place)) // size
    change = np.flatnonzero((np.diff(tile, prepend=-1) != 0) | (np.diff(segment, prepend=-1) != 0))
    last = place[np.append(change[1:], len(place)) - 1] if len(place) else place
    own = (tile[change], first[change], last)
    has_preamble = change[preamble_start[change] < preamble_end[change]]
    shared = (tile[has_preamble], preamble_start[has_preamble], preamble_end[has_preamble] - 1)
    query_tile, low, high = (np.concatenate(pair) for pair in zip(own, shared, strict=True))
    low, count = low // key_size, high // key_size - low // key_size + 1
    number = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
    return np.repeat(low, count) + number, np.repeat(query_tile, count)


def _lists(owner: NDArray, visitor: NDArray, n_owners: int) -> tuple[NDArray, NDArray]:
    """Return where each owner's list starts, and its visitors, ascending, of one owner after another."""
    width = int(visitor.max(initial=0)) + 1
    pairs = np.sort(owner * width + visitor, kind="stable")  # np.unique takes 60 times as long for long texts
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]
    return np.append(0, np.bincount(pairs // width, minlength=n_owners).cumsum()), pairs % width


def _parts(query_from: NDArray) -> tuple[NDArray, ...]:
    """Divide the work on each key tile into parts of about equal size; see the fields of `TilePlan`."""
    visits = np.diff(query_from)
    most = max(VISITS, 2 * -(-int(query_from[-1]) // max(len(visits), 1)))  # few sums, also for long texts
    count = np.maximum(1, -(-visits // most))
    part_tile = np.repeat(np.arange(len(visits)), count)
    number = np.arange(len(part_tile)) - np.repeat(count.cumsum() - count, count)
    part_from = np.append(query_from[part_tile] + number * most, query_from[-1])
    several = count[part_tile] > 1
    part_slot = np.where(several, several.cumsum() - 1, -1)
    sum_tile = np.flatnonzero(count > 1)
    return part_tile, part_from, part_slot, sum_tile, np.append(0, count[sum_tile].cumsum())
