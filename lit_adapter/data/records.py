"""Records: counted, split and compared, in memory or on disk. No torch.

A malformed record is refused with its line. Two flaws common in real data are only counted: records with
nothing to learn, such as an empty output, which are skipped, and duplicates, which are kept by default.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_adapter.config import Columns
from lit_adapter.data.reading import records_of
from lit_adapter.data.recognise import Recognised
from lit_adapter.data.record import AnyRecord, digest_of
from lit_adapter.data.tasks import DEFAULT_COLUMNS, OPTION
from lit_adapter.errors import UserError


def digests_of(rows: Iterable[AnyRecord]) -> NDArray[np.uint64]:
    """Return the digests of records ``[records, 2]``."""
    return np.frombuffer(b"".join(map(digest_of, rows)), np.uint64).reshape(-1, 2)


@dataclass(frozen=True)
class Records(Sequence[AnyRecord]):
    """Records, and counts of what reading them found.

    Raises:
        UserError: there is no record.
    """

    rows: Sequence[AnyRecord]
    """In memory, or read one by one from where they are kept (`store`)."""
    source: str
    """The file or Hub data set, by the user's name for it."""
    n_empty_output: int = 0
    """Number of records skipped because their output is empty or white space, or nothing is to be learned."""
    formats: tuple[Recognised, ...] = ()
    """What was recognised in the sources, each format once."""
    digests: NDArray[np.uint64] = field(
        default_factory=lambda: np.empty((0, 2), np.uint64), compare=False, repr=False
    )
    """The digest of each record's texts ``[records, 2]``; computed if not given."""

    def __post_init__(self) -> None:
        if not len(self.rows):
            nothing = f"all {self.n_empty_output} have an empty output, or no turn to learn"
            why = nothing if self.n_empty_output else "it is empty"
            raise UserError(
                f"{self.source}: no usable record: {why}; expected records of instruction, input and output"
            )
        if not len(self.digests):
            object.__setattr__(self, "digests", digests_of(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    @cached_property
    def sha256(self) -> str:
        """Hash of the texts in order; independent of file format, line ends and column names."""
        return hashlib.sha256(np.ascontiguousarray(self.digests).data).hexdigest()

    @cached_property
    def is_first(self) -> NDArray[np.bool_]:
        """Whether each record does not repeat an earlier one ``[records]``."""
        return first_of(self.digests) == np.arange(len(self))

    @cached_property
    def n_duplicate(self) -> int:
        """Number of records that repeat an earlier one."""
        return int((~self.is_first).sum())

    def choose(self, indices: NDArray[np.int64], source: str, n_empty_output: int = 0) -> Records:
        """Return the records at ``indices`` as records of their own; no text is read."""
        rows, digests = Chosen(self.rows, indices), self.digests[indices]
        return Records(rows, source, n_empty_output, self.formats, digests)


@dataclass(frozen=True)
class Chosen(Sequence[AnyRecord]):
    """The records at ``indices`` of others, read one by one."""

    rows: Sequence[AnyRecord]
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        chosen = self.indices[index]
        return [self.rows[i] for i in chosen.tolist()] if isinstance(index, slice) else self.rows[int(chosen)]

    def sources(self) -> NDArray[np.int64]:
        """Return the number of the source of every record ``[records]``."""
        return source_numbers(self.rows)[self.indices]


def source_numbers(rows: Sequence[AnyRecord]) -> NDArray[np.int64]:
    """Return the number of the source of every record ``[records]``; records on disk are not read for it."""
    known = getattr(rows, "sources", None)
    return known() if known else np.array([row.source for row in rows], np.int64)


def first_of(digests: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the index of the first digest that equals each one ``[records]``."""
    # Different texts with the same first half of the digest are not to be expected below 2**32 records.
    order = np.argsort(digests[:, 0], kind="stable")
    is_new = np.ones(len(order), np.bool_)
    is_new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    found = np.empty(len(order), np.int64)
    found[order] = order[is_new][np.cumsum(is_new) - 1]
    return found


def read_records(path: str | Path, *, columns: Columns = DEFAULT_COLUMNS, option: str = OPTION) -> Records:
    """Read a JSON (array), JSONL, CSV, TSV or Parquet file of records into memory; the suffix tells which.

    Columns not in ``columns`` are ignored. The first record's columns tell the format. ``option`` is the one
    that names the columns, for messages.

    Raises:
        UserError: the file cannot be read, is malformed or not UTF-8, or has no record; a field is missing,
            not a string or not valid Unicode, or an instruction is empty; a conversation is malformed; a
            record is of another format than the first one. Names file, line and turn.
    """
    known, records = records_of(Path(path), str(path), columns, option=option)
    every = list(records)
    rows = tuple(row for row in every if not row.is_empty)
    return Records(rows, str(path), len(every) - len(rows), (known,) if known else ())


def split(records: Records, *, val_size: int | float, seed: int) -> tuple[Records, Records]:
    """Split into (train, validation) like `split_rows`. Records skipped while reading count for train."""
    train, val = split_rows(records, val_size=val_size, seed=seed)
    return (
        records.choose(train, f"{records.source} (train)", records.n_empty_output),
        records.choose(val, f"{records.source} (validation)"),
    )


def split_rows(
    records: Records, *, val_size: int | float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of (train, validation), at random by ``seed``; both keep the order of the file.

    ``val_size`` is the number of validation records or, below 1, their fraction. The split is the same on
    every Python version.

    Raises:
        UserError: ``val_size`` is neither a count nor a fraction, or one side would be empty.
    """
    total = len(records)
    if not (0 < val_size < 1 or val_size == val_size // 1):
        raise UserError(f"val_size is {val_size}; expected a number of records, or a fraction below 1")
    if total == 1 and val_size > 0:
        raise UserError(
            f"{records.source}: the only record cannot be trained on and held out too; add records, or set "
            "data.val_size 0"
        )
    count = round(total * val_size) if 0 < val_size < 1 else int(val_size)
    if not 0 < count < total:
        asked = f"val_size {val_size}" if count == val_size else f"val_size {val_size} ({count} records)"
        raise UserError(
            f"{asked} of the {total} records of {records.source}; "
            f"expected at least 1 record and at most {total - 1} for validation"
        )
    held_out = np.zeros(total, np.bool_)
    held_out[np.argsort(_draws(seed, total), kind="stable")[:count]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _draws(seed: int, count: int) -> NDArray[np.float64]:
    """Return what ``count`` calls of ``random.Random(seed).random`` return, on every version of Python."""
    *words, position = random.Random(seed).getstate()[1]
    generator = np.random.RandomState()
    generator.set_state(("MT19937", np.array(words, np.uint32), position, 0, 0.0))
    return generator.random_sample(count)


def overlap(records: Records, others: Records) -> NDArray[np.bool_]:
    """Return whether each of ``records`` is also among ``others``, word for word ``[records]``."""
    both = np.concatenate([others.digests, records.digests])
    return first_of(both)[len(others) :] < len(others)
