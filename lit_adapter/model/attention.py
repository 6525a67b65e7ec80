"""Which keys a query sees, in packed rows and plain batches; caches have their views in `cache`.

A `View` is one forward pass. In a packed row every token has a segment (its record) and a preamble (the
segment that its record continues), and

    query q sees key k  if  k <= q  and  (segment[q] == segment[k]  or  segment[k] == preamble[q])

so that many records share a row without padding, and the template text that they all start with is
computed once per row. The positions of a record continue those of its preamble. In a layer with a window of
W, a query sees only keys with  position[k] > position[q] - W.  An adapter's prefix has no positions, so no
window hides it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from lit_adapter.model.llama import Attention, Block

KeyValue = tuple[Tensor, Tensor]


@dataclass(eq=False)
class PackedRow:
    """Records placed end to end in one row, and the positions whose next token is learned.

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
        joined = moved(torch.cat(parts), device)
        ids, position, target_index, target_id = joined.split([len(part) for part in parts])
        return ids, position, target_index, target_id


def moved(x: Tensor, device: torch.device) -> Tensor:
    """Copy ``x`` from the CPU to a device, without waiting for other work of a GPU."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


class View(Protocol):
    """One forward pass over a model: what an executor makes, and what runs each of its blocks."""

    def run(self, block: Block, x: Tensor, query_positions: Tensor | None) -> Tensor:
        """Return the block's output for ``x [B, T, C]``, or for its ``query_positions [M]`` only."""


class BaseView:
    """The views of the modules executor: the positions, and which keys each query sees.

    Args:
        rotation: cosines and sines of all positions, ``[B, T, D/2]``.
        recompute: keep only the input of each block for the backward pass, and compute the rest again there.
    """

    def __init__(self, rotation: KeyValue, *, recompute: bool = False) -> None:
        self.rotation, self.recompute = rotation, recompute

    @abstractmethod
    def attend(
        self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None
    ) -> Tensor:
        """Return attention ``[B, H, T, D]`` of rotated ``q`` over ``k, v [B, G, T, D]``."""

    def rotation_at(self, query_positions: Tensor | None) -> KeyValue:
        """Return cosines and sines of ``query_positions [M]``, or of all."""
        if query_positions is None:
            return self.rotation
        cos, sin = self.rotation
        return cos[:, query_positions], sin[:, query_positions]

    def run(self, block: Block, x: Tensor, query_positions: Tensor | None) -> Tensor:
        """Run the block's modules."""
        if self.recompute:
            return checkpoint(block.compute, x, self, query_positions, use_reentrant=False)
        return block.compute(x, self, query_positions)

    def attend_prefix(
        self, attention: Attention, rotated: Tensor, unrotated: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Attend to the layer's own prefix, projected now: while training it changes with every step."""
        prefix = attention.prefix
        if prefix is None or not prefix.active:
            return None
        return prefix(rotated, unrotated, *attention.project_kv(prefix.prompt.to(rotated.device, dtype)))


class CausalView(BaseView):
    """A plain batch ``[B, T]`` of equally long texts."""

    def attend(
        self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None
    ) -> Tensor:
        """Attend causally; the last layer may ask for some positions only."""
        return attend_causally(q, k, v, query_positions, attention.window)


def attend_causally(
    q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None, window: int | None
) -> Tensor:
    """Return causal attention of all positions, or of ``query_positions [M]``, which ``q`` holds."""
    T = k.shape[-2]
    window = window if window is not None and window < T else None
    if query_positions is None and window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    place = torch.arange(T, device=k.device)
    query = (place if query_positions is None else query_positions)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees(query, place, window), enable_gqa=True)


def sees(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Return whether queries see keys of the same text, by their positions, which broadcast."""
    return key <= query if window is None else (key <= query) & (key > query - window)


@dataclass
class SegmentGroup:
    """Segments of similar length, padded to a rectangle for one attention call."""

    query: Tensor  # [S, L] which of the given queries
    key: Tensor  # [S, E] row positions of the keys: shared preamble, then the segment itself
    # [S, 1, 1, L, E] 0 where a query sees a key, else minus infinity, both exact in bf16. None for long texts
    # without a preamble: a kernel that knows them to be causal skips half of the pairs.
    sight: Tensor | None
    real: Tensor  # [n] which entries of the flattened `query` are not padding


_Plan = tuple[list[SegmentGroup], list[SegmentGroup]]


class SegmentView(BaseView):
    """A packed row, attended segment by segment: exact, and without work for pairs that are not visible.

    Segments of similar length are gathered into one rectangle per call, so that a row of many short
    records takes a few calls. Made for CPUs. The plan is made once per row and used by every layer; layers
    with a window have another.
    """

    def __init__(self, row: PackedRow, rotation: KeyValue, *, recompute: bool = False) -> None:
        super().__init__(rotation, recompute=recompute)
        self.row, self.device = row, rotation[0].device
        self._plans: dict[int | None, _Plan] = {}

    def plan(self, window: int | None) -> _Plan:
        """Return the attention calls of all queries, and those of the targets, in layers with a window."""
        if window not in self._plans:
            wanted = (list(range(len(self.row.ids))), self.row.target_index.tolist())
            every, targets = (_groups(self.row, queries, self.device, window) for queries in wanted)
            self._plans[window] = every, targets
        return self._plans[window]

    @property
    def planned(self) -> list[SegmentGroup]:
        """The attention calls that were planned so far."""
        return [group for plan in self._plans.values() for groups in plan for group in groups]

    def attend(
        self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None
    ) -> Tensor:
        """Attend within segments; ``query_positions`` can only be the row's own targets."""
        groups = self.plan(attention.window)[query_positions is not None]
        if not groups:  # no targets: an empty result that keeps k and v in the graph, as DDP needs
            return q + 0 * (k.sum() + v.sum())
        q = q * q.shape[-1] ** -0.5
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, heads, D]
        parts = [_attend_rectangle(q, k, v, group) for group in groups]
        places = torch.cat([group.query.flatten()[group.real] for group in groups])
        y = torch.empty_like(q).index_copy(0, places, torch.cat(parts))
        return y.transpose(0, 1)[None]


def _attend_rectangle(q: Tensor, k: Tensor, v: Tensor, group: SegmentGroup) -> Tensor:
    """Return the output ``[n, H, D]`` of the group's real queries, from scaled ``q``; all ``[T, heads, D]``.

    Written out, because on CPUs the fused kernel's backward pass is several times slower on such short
    segments. In bf16 the scores stay in bf16; softmax computes in fp32 in either case.
    """
    (S, L), E = group.query.shape, group.key.shape[1]
    H, G, D = q.shape[1], k.shape[1], q.shape[2]
    # The backward pass of index_select adds rows in parallel; that of indexing is a serial loop.
    queries = q.index_select(0, group.query.flatten()).view(S, L, G, H // G, D).permute(0, 2, 3, 1, 4)
    keys = k.index_select(0, group.key.flatten()).view(S, E, G, D).permute(0, 2, 3, 1)
    values = v.index_select(0, group.key.flatten()).view(S, E, G, D).transpose(1, 2)
    if L * E > MOST_SCORED or group.sight is None:
        return _attend_fused(queries.flatten(1, 2), keys.mT, values, group)
    score = queries.reshape(S, G, -1, D) @ keys  # [S, G, H/G * L, E]
    score = score.view(S, G, H // G, L, E).add_(group.sight)
    weight = score.softmax(-1, dtype=score.dtype).view(S, G, -1, E)
    y = (weight @ values).view(S, H, L, D).transpose(1, 2).reshape(S * L, H, D)
    return y.index_select(0, group.real)


MOST_SCORED = 512 * 512  # pairs of a segment above which scores are recomputed rather than kept


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, group: SegmentGroup) -> Tensor:
    """Do the same for long segments ``[S, heads, L, D]`` without keeping the score of every pair."""
    sight = None if group.sight is None else group.sight[:, 0].to(q.dtype)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=sight, is_causal=sight is None, enable_gqa=True, scale=1.0
    )
    return y.transpose(1, 2).flatten(0, 1).index_select(0, group.real)


@dataclass
class _Segment:
    """A segment's extent in the row, and that of the shared preamble it continues (empty if none)."""

    start: int
    end: int
    preamble_start: int
    preamble_end: int
    queries: list[tuple[int, int]] = field(default_factory=list)
    """Row position and number of each query in this segment."""

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def is_whole_text(self) -> bool:
        """Whether it continues no preamble, and all its positions are queries."""
        return self.preamble_start == self.preamble_end and len(self.queries) == self.length


def _segments(row: PackedRow) -> list[_Segment]:
    """Return the extent of every segment of a packed row."""
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


def _groups(
    row: PackedRow, wanted: list[int], device: torch.device, window: int | None
) -> list[SegmentGroup]:
    """Plan the attention calls for ascending query positions."""
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
    return [_rectangle(group, device, row.position, window) for group in groups]


def _rectangle(
    group: list[_Segment], device: torch.device, place: Tensor, window: int | None
) -> SegmentGroup:
    """Plan one call; ``place [T]`` is the position of each token of the row in its text."""
    position, valid = _padded([[place for place, _ in s.queries] for s in group])
    query, _ = _padded([[number for _, number in s.queries] for s in group])
    key, real_key = _padded(
        [[*range(s.preamble_start, s.preamble_end), *range(s.start, s.end)] for s in group]
    )
    real = valid.flatten().nonzero().flatten()
    is_long = key.shape[1] ** 2 > MOST_SCORED
    if is_long and window is None and all(segment.is_whole_text for segment in group):
        return SegmentGroup(query.to(device), key.to(device), None, real.to(device))
    seen = (key[:, None, :] <= position[:, :, None]) & real_key[:, None, :]
    if window is not None:
        seen &= place[key][:, None, :] > place[position][:, :, None] - window
    seen |= ~valid[:, :, None]  # padding sees everything, so that no softmax is over nothing
    sight = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, -torch.inf)
    plan = (query, key, sight[:, None, None], real)
    return SegmentGroup(*(part.to(device) for part in plan))


def _padded(lists: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return the lists as one rectangle, and which entries are real."""
    rows = [torch.tensor(values, dtype=torch.long) for values in lists]
    valid = [torch.ones(len(values), dtype=torch.bool) for values in lists]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(valid, batch_first=True)
