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
from lit_adapter.data.trunk_file import TrunkFile
from lit_adapter.errors import UserError
from lit_adapter.model.attention import PackedRow

SHORTEST_HEAD = 4
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


def shared_heads(encoded: Encoded) -> dict[int, NDArray[np.int32]]:
    """Return the longest common start of the whole records' prompts, by variant of the template."""
    heads: dict[int, NDArray[np.int32]] = {}
    for variant in np.unique(encoded.variant).tolist():
        members = np.flatnonzero((encoded.variant == variant) & encoded.whole)
        if len(members) < 2:
            continue
        head = encoded.record(members[0])[: encoded.n_prompt[members[0]]]
        for index in members[1:]:
            other = encoded.record(index)[: min(len(head), encoded.n_prompt[index])]
            same = head[: len(other)] == other
            head = head[: len(other) if same.all() else int(same.argmin())]
            if len(head) < SHORTEST_HEAD:
                break
        if len(head) >= SHORTEST_HEAD:
            heads[variant] = head
    return heads


class Packer:
    """Lays records into rows.

    Args:
        encoded: the records.
        heads: shared starts by variant, from `shared_heads`; empty to lay every record whole.
        mask_prompt: learn answers only.
        row_tokens: longest row.
    """

    def __init__(
        self,
        encoded: Encoded,
        heads: dict[int, NDArray[np.int32]],
        *,
        mask_prompt: bool,
        row_tokens: int,
    ) -> None:
        self.encoded, self.heads = encoded, heads
        self.trunk: TrunkFile | None = None
        """Where the rows' trunk is read from; None to leave it to the model."""
        self.mask_prompt, self.row_tokens = mask_prompt, row_tokens
        self.n_head = np.array([self._head_length(index) for index in range(len(encoded))], dtype=np.int64)
        self.n_own = encoded.length - 1 - self.n_head
        """Tokens that each record adds to a row: neither its shared head nor its last token ``[records]``."""
        longest = int(encoded.length.max(initial=1)) - 1
        if row_tokens < longest:
            raise UserError(
                f"optim.row_tokens is {row_tokens}, but a record takes {longest} tokens of a row; "
                f"raise it to {longest} or lower data.max_length"
            )

    def _head_length(self, index: int) -> int:
        """Return how many of a record's tokens its shared head covers: all of it, or nothing."""
        head = self.heads.get(int(self.encoded.variant[index]))
        # A record cut to length has lost its start, and a head must not reach into an answer.
        if head is None or not self.encoded.whole[index] or self.encoded.n_prompt[index] < len(head):
            return 0
        return len(head) if np.array_equal(self.encoded.record(index)[: len(head)], head) else 0

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
        """Return the tokens of a row that holds ``records``, each shared head once."""
        return self._shared_length(records) + int(self.n_own[records].sum())

    def _shared_length(self, records: list[int]) -> int:
        """Return the tokens of the shared heads that ``records`` continue."""
        shared = {int(self.encoded.variant[r]): int(self.n_head[r]) for r in records if self.n_head[r]}
        return sum(shared.values())

    def row(self, records: list[int]) -> PackedRow:
        """Lay ``records`` into one row: each shared head, then the records that continue it."""
        numbers = self.parts(records)
        parts = self._laid_out(numbers)
        ids, position, segment, head, target_index, target_id = map(
            torch.from_numpy, (*_tokens(parts), *self._targets(parts))
        )
        row = PackedRow(ids, position, segment, head, target_index, target_id)
        if self.trunk is not None:
            row.trunk = self.trunk.read(numbers, len(row.ids))
        return row

    def _laid_out(self, numbers: list[int]) -> list[_Part]:
        """Return what `parts` says that a row is laid out of; one without any token is given one."""
        parts: list[_Part] = []
        head = None
        for number in numbers:
            if number >= len(self.encoded):
                head = len(parts)
                parts.append(_Part(self.heads[number - len(self.encoded)]))
                continue
            ids, n_head = self.encoded.record(number), int(self.n_head[number])
            parts.append(_Part(ids[n_head:-1], n_head, head if n_head else None, number))
        if not any(len(part.ids) for part in parts):
            parts.append(_Part(np.zeros(1, dtype=np.int32)))
        for before, part in pairwise(parts):
            part.start = before.start + len(before.ids)
        return parts

    def _targets(self, parts: list[_Part]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the places whose next token is learned, ascending, and that token ``[M]``."""
        mine = [part for part in parts if part.record is not None]
        head_starts = [0 if part.head is None else parts[part.head].start for part in mine]
        rows = [(part.record, part.position, part.start) for part in mine]
        records, n_head, start = np.array(rows, np.int64).reshape(-1, 3).T
        head_start = np.array(head_starts, np.int64)
        first = self.encoded.n_prompt[records] if self.mask_prompt else np.ones_like(records)
        first = np.maximum(first, 1) - 1  # the token that predicts the first
        count = self.encoded.start[records + 1] - self.encoded.start[records] - 1 - first
        predicting = np.arange(count.sum()) + np.repeat(first - count.cumsum() + count, count)
        n_head, start, head_start = (np.repeat(values, count) for values in (n_head, start, head_start))
        # The shared head's tokens predict for every record that continues it.
        place = predicting + np.where(predicting < n_head, head_start, start - n_head)
        token = self.encoded.ids[np.repeat(self.encoded.start[records], count) + predicting + 1]
        order = np.argsort(place, kind="stable")
        return place[order], token[order].astype(np.int64)

    def parts(self, records: list[int]) -> list[int]:
        """Return what a row of ``records`` is laid out of, in order: numbers into `part_lengths`.

        Records without a shared head come first, then each head and the records that continue it.
        """
        variants = [int(self.encoded.variant[record]) if self.n_head[record] else -1 for record in records]
        found: list[int] = []
        for variant in sorted(set(variants)):
            found += [len(self.encoded) + variant] if variant >= 0 else []
            found += sorted(record for record, own in zip(records, variants, strict=True) if own == variant)
        return found

    @property
    def part_lengths(self) -> NDArray[np.int64]:
        """Tokens that each record's own part takes in a row, then those of each variant's shared head."""
        heads = [len(self.heads.get(variant, ())) for variant in range(max(self.heads, default=-1) + 1)]
        return np.concatenate([self.n_own, np.array(heads, np.int64)])


@dataclass
class _Part:
    """A part of a row: a shared head, or a record's own tokens but the last."""

    ids: NDArray[np.int32]
    position: int = 0
    """Position of its first token."""
    head: int | None = None
    """Which part is the shared head that it continues."""
    record: int | None = None
    start: int = 0
    """Place of its first token in the row."""


def _tokens(parts: list[_Part]) -> tuple[NDArray[np.int64], ...]:
    """Return ids, positions, segments and heads of the parts laid end to end, each ``[T]``."""
    length = np.array([len(part.ids) for part in parts])
    number = np.cumsum(length > 0) - 1  # a part without tokens is no segment
    head = number[[index if part.head is None else part.head for index, part in enumerate(parts)]]
    start = np.array([part.start for part in parts])
    place = np.arange(length.sum())
    return (
        np.concatenate([part.ids for part in parts]).astype(np.int64),
        place - np.repeat(start - [part.position for part in parts], length),
        np.repeat(number, length),
        np.repeat(head, length),
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
