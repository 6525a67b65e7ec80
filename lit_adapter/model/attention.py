"""Who may see whom, asked in one place for packed rows, plain batches and caches.

A `View` carries positions and answers the attention of one forward pass. The rule for packed rows: with
every token's segment (its record) and preamble (a shared segment that its record continues),

    query q sees key k  if  k <= q  and  (segment[q] == segment[k]  or  segment[k] == preamble[q])

so that many records share a row without padding, and the template text they all start with is computed
once per row; positions restart for each record and go on from its shared preamble's length.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]


@dataclass(eq=False)
class PackedRow:
    """Records laid end to end in one row, and the positions whose next token is learned.

    ``ids``, ``position``, ``segment`` and ``preamble`` are ``[T]``; ``target_index`` (into the row) and
    ``target_id`` are ``[M]``. A token whose record has no preamble has its own segment there.
    Segments are contiguous and numbered in order; a shared preamble comes before its records.
    """

    ids: Tensor
    position: Tensor
    segment: Tensor
    preamble: Tensor
    target_index: Tensor
    target_id: Tensor

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ``ids``, ``position``, ``target_index`` and ``target_id`` on a device, in one transfer."""
        parts = (self.ids, self.position, self.target_index, self.target_id)
        joined = _moved(torch.cat(parts), device)
        ids, position, target_index, target_id = joined.split([len(part) for part in parts])
        return ids, position, target_index, target_id


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """Bring ``x`` from the CPU to a device; from pinned memory the host does not wait for its other work."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


class View(Protocol):
    """What a forward pass needs to know beside the hidden states."""

    recompute: bool
    """Whether blocks keep their input alone for the backward pass and compute the rest again there."""

    @property
    def rotation(self) -> KeyValue:
        """Cosines and sines of all positions, ``[B, T, D/2]``."""

    def rotation_at(self, query_positions: Tensor) -> KeyValue:
        """Cosines and sines of the positions ``query_positions [M]``."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None) -> Tensor:
        """Return attention ``[B, H, T, D]`` of rotated ``q`` over ``k, v [B, G, T, D]``."""

    def prefix_kv(self, layer: int) -> KeyValue | None:
        """Return the layer's ready prefix keys and values, or None to project them now."""


class BaseView:
    """What all views share: rotation by position, and no ready prefixes."""

    recompute = False
    """Whether blocks keep their input alone for the backward pass and compute the rest again there."""

    def __init__(self, rotation: KeyValue) -> None:
        self.rotation = rotation

    def rotation_at(self, query_positions: Tensor) -> KeyValue:
        """Return cosines and sines of the positions ``query_positions [M]``."""
        cos, sin = self.rotation
        return cos[:, query_positions], sin[:, query_positions]

    def prefix_kv(self, layer: int) -> KeyValue | None:
        """Let the layer project its prefix now: while training it changes with every step."""
        return None


class BlockView(BaseView):
    """A view that does not ask a block's modules to attend, but computes the block itself."""

    @abstractmethod
    def block(self, block: Any, x: Tensor, query_positions: Tensor | None) -> Tensor:
        """Return the block's output for ``x [1, T, C]``, or for its ``query_positions [M]`` only."""


class CausalView(BaseView):
    """A plain batch ``[B, T]`` of equally long texts."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None) -> Tensor:
        """Attend causally; the last layer may ask for some positions only."""
        return attend_causally(q, k, v, query_positions)


def attend_causally(q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None) -> Tensor:
    """Return causal attention of all positions, or of ``query_positions [M]``, which ``q`` holds."""
    if query_positions is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    seen = query_positions[:, None] >= torch.arange(k.shape[-2], device=k.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


@dataclass
class SegmentGroup:
    """Segments of similar length, padded to a rectangle for one attention call."""

    query: Tensor  # [S, L] which of the given queries
    key: Tensor  # [S, E] row positions of the keys: shared preamble, then the segment itself
    sight: Tensor  # [S, 1, 1, L, E] 0 where a query sees a key, else minus infinity, both exact in bf16
    real: Tensor  # [n] which entries of the flattened `query` are not padding


class SegmentView(BaseView):
    """A packed row, attended segment by segment: exact, and without work for pairs that see nothing.

    Segments of similar length are gathered into one rectangle per call, so that a row of many short
    records costs a few calls. Made for CPUs; the plan is built once per row and serves every layer.
    """

    def __init__(self, row: PackedRow, rotation: KeyValue, *, recompute: bool = False) -> None:
        super().__init__(rotation)
        self.recompute = recompute
        device = rotation[0].device
        self.all_queries = _groups(row, list(range(len(row.ids))), device)
        self.target_queries = _groups(row, row.target_index.tolist(), device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None) -> Tensor:
        """Attend within segments; ``query_positions`` can only be the row's own targets."""
        groups = self.all_queries if query_positions is None else self.target_queries
        if not groups:  # a row without targets: q, empty like its result, keeps the graph whole for DDP
            return q + 0 * (k.sum() + v.sum())
        q = q * q.shape[-1] ** -0.5
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, heads, D]
        parts = [_attend_rectangle(q, k, v, group) for group in groups]
        places = torch.cat([group.query.flatten()[group.real] for group in groups])
        y = torch.empty_like(q).index_copy(0, places, torch.cat(parts))
        return y.transpose(0, 1)[None]


def _attend_rectangle(q: Tensor, k: Tensor, v: Tensor, group: SegmentGroup) -> Tensor:
    """Return the group's real queries' results ``[n, H, D]``, from scaled ``q`` and ``k, v [T, heads, D]``.

    Written out: on CPUs the fused kernel's backward pass is several times slower on such short segments.
    In bf16 the scores stay narrow: softmax is computed in fp32 from them either way, pair by pair.
    """
    (S, L), E = group.query.shape, group.key.shape[1]
    H, G, D = q.shape[1], k.shape[1], q.shape[2]
    # index_select, not indexing: its backward adds rows without index_put's serial loop.
    queries = q.index_select(0, group.query.flatten()).view(S, L, G, H // G, D).permute(0, 2, 3, 1, 4)
    keys = k.index_select(0, group.key.flatten()).view(S, E, G, D).permute(0, 2, 3, 1)
    values = v.index_select(0, group.key.flatten()).view(S, E, G, D).transpose(1, 2)
    if L * E > MOST_SCORED:
        return _attend_fused(queries.flatten(1, 2), keys.mT, values, group)
    score = queries.reshape(S, G, -1, D) @ keys  # [S, G, H/G * L, E]
    score = score.view(S, G, H // G, L, E).add_(group.sight)
    weight = score.softmax(-1, dtype=score.dtype).view(S, G, -1, E)
    y = (weight @ values).view(S, H, L, D).transpose(1, 2).reshape(S * L, H, D)
    return y.index_select(0, group.real)


MOST_SCORED = 512 * 512  # pairs of a segment from which keeping their scores costs more than recomputing them


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, group: SegmentGroup) -> Tensor:
    """Do the same for long segments ``[S, heads, L, D]`` without keeping a score for every pair."""
    sight = group.sight[:, 0].to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=sight, enable_gqa=True, scale=1.0)
    return y.transpose(1, 2).flatten(0, 1).index_select(0, group.real)


@dataclass
class _Segment:
    """A segment's extent in the row, and that of the shared preamble it continues (empty if none)."""

    start: int
    end: int
    preamble_start: int
    preamble_end: int
    queries: list[tuple[int, int]] = field(default_factory=list)
    """Row position and number of each query asked for in this segment."""

    @property
    def length(self) -> int:
        return self.end - self.start


def _segments(row: PackedRow) -> list[_Segment]:
    """Read the extent of every segment off a packed row."""
    change = (row.segment[1:] != row.segment[:-1]).nonzero().flatten() + 1
    starts = [0, *change.tolist()]
    ends = [*starts[1:], len(row.ids)]
    extent = {int(row.segment[start]): (start, end) for start, end in zip(starts, ends, strict=True)}
    found = []
    for number, (start, end) in extent.items():
        preamble = int(row.preamble[start])
        found.append(_Segment(start, end, *(extent[preamble] if preamble != number else (start, start))))
    return found


_SPREAD_ALLOWED = 1.5  # a rectangle's longest segment, as a multiple of its shortest


def _groups(row: PackedRow, wanted: list[int], device: torch.device) -> list[SegmentGroup]:
    """Plan the attention calls for the ascending query positions ``wanted``."""
    segments = _segments(row)
    owner = iter(segments)
    segment = next(owner)
    for number, position in enumerate(wanted):
        while position >= segment.end:
            segment = next(owner)
        segment.queries.append((position, number))
    groups: list[list[_Segment]] = []
    for segment in sorted((s for s in segments if s.queries), key=lambda s: s.length):
        if groups and segment.length <= _SPREAD_ALLOWED * groups[-1][0].length + 8:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return [_rectangle(group, device) for group in groups]


def _rectangle(group: list[_Segment], device: torch.device) -> SegmentGroup:
    position, valid = _padded([[place for place, _ in s.queries] for s in group])
    query, _ = _padded([[number for _, number in s.queries] for s in group])
    key, real_key = _padded(
        [[*range(s.preamble_start, s.preamble_end), *range(s.start, s.end)] for s in group]
    )
    seen = (key[:, None, :] <= position[:, :, None]) & real_key[:, None, :]
    seen |= ~valid[:, :, None]  # padded queries see everything, so that no softmax is empty
    sight = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, -torch.inf)
    plan = (query, key, sight[:, None, None], valid.flatten().nonzero().flatten())
    return SegmentGroup(*(part.to(device) for part in plan))


def _padded(lists: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return the lists as one rectangle, and which entries are real."""
    rows = [torch.tensor(values, dtype=torch.long) for values in lists]
    valid = [torch.ones(len(values), dtype=torch.bool) for values in lists]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(valid, batch_first=True)
