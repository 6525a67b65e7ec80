"""Packed batches: the records of one optimizer step, one after another in rows, without padding.

(seed, step) alone decides what a step learns: its records are the next ``batch_size`` of the epoch's
permutation. How they are divided into rows, and which process computes which row, changes speed and
memory but not the step: loss is a sum over targets, divided by the number of targets of the whole step.

A preamble is the text that a template puts before every record. It is found in the data as the longest common
start of the prompts that use the same variant of the template. A row contains it once, before the records
that continue it. A record's last token is only a target: nothing is predicted from it, so it is not in the
row.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from lit_adapter.data.encode import Encoded
from lit_adapter.data.mixing import EpochOrder
from lit_adapter.data.streaming import Place
from lit_adapter.errors import UserError
from lit_adapter.model.attention import PackedRow
from lit_adapter.text.conversation import ANSWER, CONTEXT

SHORTEST_PREAMBLE = 4
"""Tokens below which a preamble is not worth a segment of its own."""
FIRST_BLOCK, BLOCK = 100, 10_000
"""Records whose starts are compared together, or whose targets are counted together."""


@dataclass
class StepBatch:
    """One process's rows of one optimizer step."""

    rows: list[PackedRow]
    records: list[list[int]]
    """The records in each row, by index."""
    n_targets: int
    """Targets of the whole step, over all rows of all processes."""
    n_tokens: int
    """Tokens of the whole step's records, the preamble counted for every record."""
    step: int
    place: Place | None = None
    """For a stream: where the records after the step are read from."""


def shared_preambles(encoded: Encoded) -> dict[int, NDArray[np.int32]]:
    """Return the preambles: the longest common start of the uncut records' prompts, by template variant."""
    preambles: dict[int, NDArray[np.int32]] = {}
    for variant in np.unique(encoded.variant).tolist():
        members = np.flatnonzero((encoded.variant == variant) & encoded.whole)
        if len(members) < 2:
            continue
        preamble = encoded.record(members[0])[: encoded.n_prompt[members[0]]]
        for block in _blocks(members):
            shortest = min(len(preamble), int(encoded.n_prompt[block].min()))
            same = _starts(encoded, block, shortest) == preamble[:shortest]
            preamble = preamble[: int(same.all(axis=0).argmin()) if not same.all() else shortest]
            if len(preamble) < SHORTEST_PREAMBLE:
                break
        if len(preamble) >= SHORTEST_PREAMBLE:
            preambles[variant] = preamble
    return preambles


def _blocks(records: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Divide records into blocks whose starts are compared together; most preambles end in the first one."""
    starts = [0, *range(FIRST_BLOCK, len(records), BLOCK)]
    return np.split(records, starts[1:]) if len(records) else []


def _starts(encoded: Encoded, records: NDArray[np.int64], length: int) -> NDArray[np.int32]:
    """Return the first tokens of records that have ``length`` or more ``[records, length]``."""
    return encoded.ids[encoded.start[records, None] + np.arange(length)]


class Packer:
    """Packs records into rows of at most ``row_tokens`` tokens; ``mask_prompt`` learns answers only.

    Preambles are those of `shared_preambles`, or empty to pack every record whole.

    Raises:
        UserError: a record is longer than a row.
    """

    def __init__(
        self, encoded: Encoded, preambles: dict[int, NDArray[np.int32]], *, mask_prompt: bool, row_tokens: int
    ) -> None:
        self.encoded, self.preambles = encoded, preambles
        self.mask_prompt, self.row_tokens = mask_prompt, row_tokens
        self.n_preamble = self._preamble_lengths()
        self.n_own = encoded.length - 1 - self.n_preamble
        """Tokens that each record adds to a row: all but its preamble and its last token ``[records]``."""
        longest = int(encoded.length.max(initial=1)) - 1
        if row_tokens < longest:
            raise UserError(
                f"optim.row_tokens is {row_tokens}, but the longest record takes {longest} tokens of a row; "
                f"raise it to {longest} or lower data.max_length"
            )

    def _preamble_lengths(self) -> NDArray[np.int32]:
        """Return the length of the preamble that each record continues; 0 if it continues none."""
        found = np.zeros(len(self.encoded), np.int32)
        for variant, preamble in self.preambles.items():
            # A record cut to length has lost its start; a preamble must not reach into an answer.
            may = self.encoded.whole & (self.encoded.n_prompt >= len(preamble))
            for block in _blocks(np.flatnonzero(may & (self.encoded.variant == variant))):
                same = (_starts(self.encoded, block, len(preamble)) == preamble).all(axis=1)
                found[block[same]] = len(preamble)
        return found

    def n_targets(self, records: NDArray[np.int64]) -> int:
        """Return how many tokens of ``records`` are learned."""
        blocks = np.array_split(records, max(1, len(records) // BLOCK))
        return sum(len(self._learned(block)[0]) for block in blocks)

    def _learned(self, records: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the learned tokens of records: the place in ``records``, and that in the record.

        A record's first token is never learned: nothing predicts it.
        """
        length = self.encoded.length[records].astype(np.int64)
        which = np.repeat(np.arange(len(records)), length)
        place = np.arange(length.sum()) - np.repeat(length.cumsum() - length, length)
        kinds = self.encoded.kinds[self.encoded.start[records][which] + place]
        learned = (kinds >= (ANSWER if self.mask_prompt else CONTEXT)) & (place > 0)
        return which[learned], place[learned]

    def assign(self, records: NDArray[np.int64], n_processes: int = 1) -> list[list[int]]:
        """Divide ``records`` into as few rows as they fit in; their number is a multiple of ``n_processes``.

        Each record, longest first, goes into the emptiest row: rows become nearly equal in length, so that
        processes hardly wait for each other.
        """
        own = self.n_own[records]
        order = np.argsort(-own, kind="stable")
        capacity = self.row_tokens - self._shared_length(records.tolist())
        n_rows = min(max(1, int(own.sum()) // max(capacity, 1)), len(records))
        n_rows = -(-n_rows // n_processes) * n_processes
        while True:
            rows: list[list[int]] = [[] for _ in range(n_rows)]
            filled = [0] * n_rows
            for position in order.tolist():
                row = filled.index(min(filled))
                rows[row].append(int(records[position]))
                filled[row] += int(own[position])
            if all(self.row_length(row) <= self.row_tokens for row in rows):
                return rows
            n_rows += n_processes

    def row_length(self, records: list[int]) -> int:
        """Return the number of tokens of a row with these records."""
        return self._shared_length(records) + int(self.n_own[records].sum())

    def _shared_length(self, records: list[int]) -> int:
        shared = {
            int(self.encoded.variant[r]): int(self.n_preamble[r]) for r in records if self.n_preamble[r]
        }
        return sum(shared.values())

    def row(self, records: list[int]) -> PackedRow:
        """Pack ``records`` into one row."""
        segments = self._segments(records)
        index, token, _ = self._targets(segments)
        return PackedRow(*map(torch.from_numpy, (*_tokens(segments), index, token)))

    def target_records(self, records: list[int]) -> NDArray[np.int64]:
        """Return which record each target of ``row(records)`` belongs to ``[M]``."""
        return self._targets(self._segments(records))[2]

    def _segments(self, records: list[int]) -> list[_Segment]:
        """Return a row's segments: records without a preamble, then each preamble and its records."""
        has_preamble = self.n_preamble[records] > 0
        variants = np.where(has_preamble, self.encoded.variant[records], -1)
        segments: list[_Segment] = []
        preamble, last_variant = None, -1
        for variant, record in sorted(zip(variants.tolist(), records, strict=True)):
            if variant != last_variant:
                preamble, last_variant = len(segments), variant
                segments.append(_Segment(self.preambles[variant]))
            n_preamble = int(self.n_preamble[record])
            own = self.encoded.record(record)[n_preamble:-1]
            segments.append(_Segment(own, n_preamble, preamble, record))
        if not any(len(segment.ids) for segment in segments):
            segments.append(_Segment(np.zeros(1, dtype=np.int32)))  # a row needs a token
        for before, segment in pairwise(segments):
            segment.start = before.start + len(before.ids)
        return segments

    def _targets(self, segments: list[_Segment]) -> tuple[NDArray[np.int64], ...]:
        """Return the row's indices whose next token is learned, ascending, those tokens, and their records.

        Each is ``[M]``.
        """
        rows = [
            (s.record, s.position, s.start, 0 if s.preamble is None else segments[s.preamble].start)
            for s in segments
            if s.record is not None
        ]
        records, n_preamble, start, preamble_start = np.array(rows, np.int64).reshape(-1, 4).T
        which, place = self._learned(records)
        predicting = place - 1
        n_preamble, start, preamble_start = (values[which] for values in (n_preamble, start, preamble_start))
        # A preamble's tokens predict for every record that continues it.
        index = predicting + np.where(predicting < n_preamble, preamble_start, start - n_preamble)
        token = self.encoded.ids[self.encoded.start[records][which] + place]
        order = np.argsort(index, kind="stable")
        return index[order], token[order].astype(np.int64), records[which][order]


@dataclass
class _Segment:
    """A preamble, or a record's own tokens without the last."""

    ids: NDArray[np.int32]
    position: int = 0
    """Position of its first token, for RoPE."""
    preamble: int | None = None
    """Index of the segment that it continues."""
    record: int | None = None
    """The record, or None for a preamble."""
    start: int = 0
    """Index of its first token in the row."""


def _tokens(segments: list[_Segment]) -> tuple[NDArray[np.int64], ...]:
    """Return the row's ids, positions, segment numbers and preamble numbers, each ``[T]``."""
    length = np.array([len(segment.ids) for segment in segments])
    number = np.cumsum(length > 0) - 1  # segments without tokens are not counted
    continued = [i if segment.preamble is None else segment.preamble for i, segment in enumerate(segments)]
    start = np.array([segment.start for segment in segments])
    return (
        np.concatenate([segment.ids for segment in segments]).astype(np.int64),
        np.arange(length.sum()) - np.repeat(start - [segment.position for segment in segments], length),
        np.repeat(number, length),
        np.repeat(number[continued], length),
    )


class TrainingSteps(torch.utils.data.Dataset):
    """The optimizer steps of a run; item s is this process's share of step s.

    Raises:
        UserError: there are fewer records than ``batch_size``.
    """

    def __init__(
        self,
        packer: Packer,
        *,
        batch_size: int,
        order: EpochOrder,
        rank: int = 0,
        n_processes: int = 1,
    ) -> None:
        self.packer, self.batch_size, self.order = packer, batch_size, order
        self.rank, self.n_processes = rank, n_processes
        n_records = len(packer.encoded)
        if n_records < batch_size:
            raise UserError(
                f"optim.batch_size is {batch_size}, but there are only {n_records} training records; "
                f"lower it to {n_records} or less"
            )
        self.steps_per_epoch = n_records // batch_size
        self._shuffled = -1, np.empty(0, dtype=np.int64)  # the last epoch used, and its records

    def records(self, step: int) -> NDArray[np.int64]:
        """Return the records of a step: its slice of the epoch's."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, self.order.epoch(epoch)
        return self._shuffled[1][batch * self.batch_size : (batch + 1) * self.batch_size]

    def __getitem__(self, step: int) -> StepBatch:
        return share_of_step(self.packer, self.records(step), step, self.rank, self.n_processes)


class ValidationSteps(torch.utils.data.Dataset):
    """The held-out records in order, ``batch_size`` at a time; item s is this process's share of batch s."""

    def __init__(self, packer: Packer, *, batch_size: int, rank: int = 0, n_processes: int = 1) -> None:
        self.packer, self.batch_size = packer, batch_size
        self.rank, self.n_processes = rank, n_processes

    def __len__(self) -> int:
        return -(-len(self.packer.encoded) // self.batch_size)

    def __getitem__(self, step: int) -> StepBatch:
        if step >= len(self):
            raise IndexError(step)
        first = step * self.batch_size
        records = np.arange(first, min(first + self.batch_size, len(self.packer.encoded)))
        return share_of_step(self.packer, records, step, self.rank, self.n_processes)


def share_of_step(
    packer: Packer, records: NDArray[np.int64], step: int, rank: int, n_processes: int
) -> StepBatch:
    """Pack a step's records and return the rows that process ``rank`` computes."""
    rows = packer.assign(records, n_processes)
    mine = rows[rank::n_processes]
    return StepBatch(
        rows=[packer.row(row) for row in mine],
        records=mine,
        n_targets=packer.n_targets(records),
        n_tokens=int(packer.encoded.length[records].sum()),
        step=step,
    )
