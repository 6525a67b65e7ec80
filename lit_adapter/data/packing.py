"""Global batches, packed: the records of one optimizer step laid end to end in rows, without padding.

What a step learns is decided by (seed, step) alone: its records are the next ``batch_size`` of the
epoch's permutation. How they are cut into rows, and which process computes which row, changes speed and
memory but not the step: loss is a sum over targets, divided by the number of targets of the whole step.

The text that a template puts before every record is found from the data, as the longest common start of
the prompts of each of the template's texts. It is laid once per row; its records continue it. A record's
last token is a target and never an input: nothing is predicted from it, so it takes no place in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from lit_adapter.data.encode import Encoded
from lit_adapter.errors import UserError
from lit_adapter.model.attention import PackedRow

SHORTEST_PREAMBLE = 4
"""Tokens below which sharing a common start is not worth a segment."""


@dataclass
class StepBatch:
    """One process's rows of one optimizer step."""

    rows: list[PackedRow]
    records: list[list[int]]
    """Indices of the records in each row."""
    n_targets: int
    """Targets of the whole step, over all rows of all processes."""
    n_tokens: int
    """Tokens of the whole step's records, a shared start counted with every record."""
    step: int


def shared_preambles(encoded: Encoded) -> dict[int, NDArray[np.int32]]:
    """Return the longest common start of the whole records' prompts, by variant of the template."""
    preambles: dict[int, NDArray[np.int32]] = {}
    for variant in np.unique(encoded.variant).tolist():
        members = np.flatnonzero((encoded.variant == variant) & encoded.whole)
        if len(members) < 2:
            continue
        preamble = encoded.record(members[0])[: encoded.n_prompt[members[0]]]
        for index in members[1:]:
            other = encoded.record(index)[: min(len(preamble), encoded.n_prompt[index])]
            same = preamble[: len(other)] == other
            preamble = preamble[: len(other) if same.all() else int(same.argmin())]
            if len(preamble) < SHORTEST_PREAMBLE:
                break
        if len(preamble) >= SHORTEST_PREAMBLE:
            preambles[variant] = preamble
    return preambles


class Packer:
    """Lays records into rows.

    Args:
        encoded: the records.
        preambles: shared starts by variant, from `shared_preambles`; empty to lay every record whole.
        mask_prompt: learn answers only.
        row_tokens: longest row.
    """

    def __init__(
        self,
        encoded: Encoded,
        preambles: dict[int, NDArray[np.int32]],
        *,
        mask_prompt: bool,
        row_tokens: int,
    ) -> None:
        self.encoded, self.preambles = encoded, preambles
        self.mask_prompt, self.row_tokens = mask_prompt, row_tokens
        self.n_preamble = np.array(
            [self._preamble_length(index) for index in range(len(encoded))], dtype=np.int64
        )
        self.n_own = encoded.length - 1 - self.n_preamble
        """Tokens that each record adds to a row: all but its preamble and its last token ``[records]``."""
        longest = int(encoded.length.max(initial=1)) - 1
        if row_tokens < longest:
            raise UserError(
                f"optim.row_tokens is {row_tokens}, but a record takes {longest} tokens of a row; "
                f"raise it to {longest} or lower data.max_length"
            )

    def _preamble_length(self, index: int) -> int:
        """Return how many of a record's tokens its shared preamble covers: all of it, or nothing."""
        preamble = self.preambles.get(int(self.encoded.variant[index]))
        # A record cut to length has lost its start, and a preamble must not reach into an answer.
        if preamble is None or not self.encoded.whole[index] or self.encoded.n_prompt[index] < len(preamble):
            return 0
        return len(preamble) if np.array_equal(self.encoded.record(index)[: len(preamble)], preamble) else 0

    def n_targets(self, records: NDArray[np.int64]) -> int:
        """Return how many tokens of ``records`` are learned."""
        first = self.encoded.n_prompt[records] if self.mask_prompt else np.ones(len(records), np.int64)
        return int((self.encoded.length[records] - np.maximum(first, 1)).sum())

    def assign(self, records: NDArray[np.int64], n_processes: int = 1) -> list[list[int]]:
        """Cut ``records`` into as few rows as fit, evenly filled; a multiple of ``n_processes`` of them.

        Longest first, each into the emptiest row: rows end up nearly equal, so that processes wait little.
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
        """Return the tokens of a row that holds ``records``, each shared preamble once."""
        return self._shared_length(records) + int(self.n_own[records].sum())

    def _shared_length(self, records: list[int]) -> int:
        """Return the tokens of the shared preambles that ``records`` continue."""
        shared = {
            int(self.encoded.variant[r]): int(self.n_preamble[r]) for r in records if self.n_preamble[r]
        }
        return sum(shared.values())

    def row(self, records: list[int]) -> PackedRow:
        """Lay ``records`` into one row: each shared preamble, then the records that continue it."""
        parts = self._laid_out(self._order(records))
        ids, position, segment, preamble, target_index, target_id = map(
            torch.from_numpy, (*_tokens(parts), *self._targets(parts))
        )
        return PackedRow(ids, position, segment, preamble, target_index, target_id)

    def _laid_out(self, numbers: list[int]) -> list[_Part]:
        """Return the parts of a row, as `_order` numbers them; a row without any token is given one."""
        parts: list[_Part] = []
        preamble = None
        for number in numbers:
            if number >= len(self.encoded):
                preamble = len(parts)
                parts.append(_Part(self.preambles[number - len(self.encoded)]))
                continue
            ids, n_preamble = self.encoded.record(number), int(self.n_preamble[number])
            parts.append(_Part(ids[n_preamble:-1], n_preamble, preamble if n_preamble else None, number))
        if not any(len(part.ids) for part in parts):
            parts.append(_Part(np.zeros(1, dtype=np.int32)))
        for before, part in pairwise(parts):
            part.start = before.start + len(before.ids)
        return parts

    def _targets(self, parts: list[_Part]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the places whose next token is learned, ascending, and that token ``[M]``."""
        mine = [part for part in parts if part.record is not None]
        preamble_starts = [0 if part.preamble is None else parts[part.preamble].start for part in mine]
        rows = [(part.record, part.position, part.start) for part in mine]
        records, n_preamble, start = np.array(rows, np.int64).reshape(-1, 3).T
        preamble_start = np.array(preamble_starts, np.int64)
        first = self.encoded.n_prompt[records] if self.mask_prompt else np.ones_like(records)
        first = np.maximum(first, 1) - 1  # the token that predicts the first
        count = self.encoded.start[records + 1] - self.encoded.start[records] - 1 - first
        predicting = np.arange(count.sum()) + np.repeat(first - count.cumsum() + count, count)
        n_preamble, start, preamble_start = (
            np.repeat(values, count) for values in (n_preamble, start, preamble_start)
        )
        # The shared preamble's tokens predict for every record that continues it.
        place = predicting + np.where(predicting < n_preamble, preamble_start, start - n_preamble)
        token = self.encoded.ids[np.repeat(self.encoded.start[records], count) + predicting + 1]
        order = np.argsort(place, kind="stable")
        return place[order], token[order].astype(np.int64)

    def _order(self, records: list[int]) -> list[int]:
        """Return what a row of ``records`` is laid out of, in order.

        A number below ``len(encoded)`` is a record; one above it is the shared preamble of a variant. Records
        without a shared preamble come first, then each preamble and the records that continue it.
        """
        variants = [
            int(self.encoded.variant[record]) if self.n_preamble[record] else -1 for record in records
        ]
        found: list[int] = []
        for variant in sorted(set(variants)):
            found += [len(self.encoded) + variant] if variant >= 0 else []
            found += sorted(record for record, own in zip(records, variants, strict=True) if own == variant)
        return found


@dataclass
class _Part:
    """A part of a row: a shared preamble, or a record's own tokens but the last."""

    ids: NDArray[np.int32]
    position: int = 0
    """Position of its first token."""
    preamble: int | None = None
    """Which part is the shared preamble that it continues."""
    record: int | None = None
    start: int = 0
    """Place of its first token in the row."""


def _tokens(parts: list[_Part]) -> tuple[NDArray[np.int64], ...]:
    """Return ids, positions, segments and preambles of the parts laid end to end, each ``[T]``."""
    length = np.array([len(part.ids) for part in parts])
    number = np.cumsum(length > 0) - 1  # a part without tokens is no segment
    preamble = number[[index if part.preamble is None else part.preamble for index, part in enumerate(parts)]]
    start = np.array([part.start for part in parts])
    place = np.arange(length.sum())
    return (
        np.concatenate([part.ids for part in parts]).astype(np.int64),
        place - np.repeat(start - [part.position for part in parts], length),
        np.repeat(number, length),
        np.repeat(preamble, length),
    )


class TrainingSteps(torch.utils.data.Dataset):
    """The optimizer steps of a whole run; item s is this process's share of step s.

    Raises:
        UserError: fewer records than one global batch.
    """

    def __init__(
        self, packer: Packer, *, batch_size: int, seed: int, rank: int = 0, n_processes: int = 1
    ) -> None:
        self.packer, self.batch_size, self.seed = packer, batch_size, seed
        self.rank, self.n_processes = rank, n_processes
        n_records = len(packer.encoded)
        if n_records < batch_size:
            raise UserError(
                f"optim.batch_size is {batch_size}, but there are only {n_records} training records; "
                f"lower it to {n_records} or less"
            )
        self.steps_per_epoch = n_records // batch_size
        self._shuffled = -1, np.empty(0, dtype=np.int64)  # the last epoch asked for, and its permutation

    def records(self, step: int) -> NDArray[np.int64]:
        """Return the records of step ``step``: its slice of the epoch's permutation."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if self._shuffled[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._shuffled = epoch, generator.permutation(len(self.packer.encoded))
        return self._shuffled[1][batch * self.batch_size : (batch + 1) * self.batch_size]

    def __getitem__(self, step: int) -> StepBatch:
        return share_of_step(self.packer, self.records(step), step, self.rank, self.n_processes)


class ValidationSteps(torch.utils.data.Dataset):
    """The held-out records in order, ``batch_size`` at a time; item s is this process's share."""

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
