"""Instruction records: read, checked, counted, split and compared. No torch.

A malformed record is refused with its line. Two flaws common in real data are only counted: records with an
empty output, which are skipped since they have nothing to learn, and duplicates, which may be dropped later.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_adapter.config import Columns
from lit_adapter.data.formats import TABLES, rows_of
from lit_adapter.data.strict_json import Row, json_type
from lit_adapter.errors import UserError, nearest, shorten

DEFAULT_COLUMNS = Columns()
OPTION = "--data.columns"
"""Names the columns of training data."""


@dataclass(frozen=True, slots=True)
class Record:
    """One task and its answer. Records with the same three texts are equal, wherever they came from."""

    instruction: str
    input: str
    output: str
    file: str = field(default="", compare=False)
    """The file's name; all its records share one string."""
    line: int = field(default=0, compare=False)
    """The line where the record starts, or for Parquet its row, counted from 1."""

    @property
    def origin(self) -> str:
        """Return ``file:line``, for messages."""
        return f"{self.file}:{self.line}"

    @property
    def texts(self) -> tuple[str, ...]:
        """Return all that it says."""
        return self.instruction, self.input, self.output

    @property
    def is_empty(self) -> bool:
        """Whether it has nothing to learn."""
        return not self.output.strip()

    @property
    def digest(self) -> bytes:
        """Return 16 bytes that tell the texts from all others."""
        digest = hashlib.sha256()
        for text in self.texts:
            content = text.encode()
            # The length in front keeps ("ab", "c") and ("a", "bc") apart.
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.digest()[:DIGEST_BYTES]


def of_texts(texts: Sequence[str], *, file: str, line: int) -> Record:
    """Return the record with these `texts`."""
    instruction, input, output = texts
    return Record(instruction, input, output, file, line)


DIGEST_BYTES = 16


def digests_of(rows: Iterable[Record]) -> NDArray[np.uint64]:
    """Return the digests of records ``[records, 2]``."""
    return np.frombuffer(b"".join(row.digest for row in rows), np.uint64).reshape(-1, 2)


@dataclass(frozen=True)
class Records(Sequence[Record]):
    """Records, and counts of what reading them found.

    Raises:
        UserError: there is no record.
    """

    rows: Sequence[Record]
    """In memory, or read one by one from where they are kept (`store`)."""
    source: str
    """The file or Hub data set, by the user's name for it."""
    n_empty_output: int = 0
    """Number of records skipped because their output is empty or white space."""
    digests: NDArray[np.uint64] = field(
        default_factory=lambda: np.empty((0, 2), np.uint64), compare=False, repr=False
    )
    """What tells the texts of each record from others ``[records, 2]``; computed where it is not given."""

    def __post_init__(self) -> None:
        if not len(self.rows):
            why = f"all {self.n_empty_output} have an empty output" if self.n_empty_output else "it is empty"
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
        return Records(Chosen(self.rows, indices), source, n_empty_output, self.digests[indices])


@dataclass(frozen=True)
class Chosen(Sequence[Record]):
    """The records at ``indices`` of others, read one by one."""

    rows: Sequence[Record]
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        chosen = self.indices[index]
        return [self.rows[i] for i in chosen.tolist()] if isinstance(index, slice) else self.rows[int(chosen)]


def first_of(digests: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the index of the first digest that equals each one ``[records]``."""
    # That two texts differ and share the first half of their digests is not expected in 2**32 records.
    order = np.argsort(digests[:, 0], kind="stable")
    is_new = np.ones(len(order), np.bool_)
    is_new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    found = np.empty(len(order), np.int64)
    found[order] = order[is_new][np.cumsum(is_new) - 1]
    return found


def read_records(
    source: str | Path, *, columns: Columns = DEFAULT_COLUMNS, name: str | None = None
) -> Records:
    """Read a JSON (array), JSONL, CSV, TSV or Parquet file of records into memory; the suffix tells which.

    Columns not in ``columns`` are ignored. Messages call the file ``name``, by default its path.

    Raises:
        UserError: the file cannot be read, is malformed or not UTF-8, or has no record; a field is missing,
            not a string or not valid Unicode, or an instruction is empty. Names file and line.
    """
    name = name or str(source)
    every = list(records_of(Path(source), name, columns))
    rows = tuple(row for row in every if not row.is_empty)
    return Records(rows, name, len(every) - len(rows))


def records_of(path: Path, name: str, columns: Columns) -> Iterator[Record]:
    """Yield the records of a file, called ``name`` in messages, also those with an empty output.

    Raises:
        UserError: as `read_records`, except that the file may have no record.
    """
    found = rows_of(path, name, (columns.instruction, columns.input, columns.output))
    for line, values, instruction, input in tasks_of(found, columns, name):
        output = _text(values, columns.output, name, line, f"{OPTION}.output")
        yield Record(instruction, input, output, name, line)


def tasks_of(
    rows: Iterable[Row], columns: Columns, name: str, option: str = OPTION
) -> Iterator[tuple[int, Mapping[str, Any], str, str]]:
    """Yield line number, values, instruction and input of the rows of the file ``name``.

    ``option`` is the one that names ``columns``, for messages.

    Raises:
        UserError: an instruction is missing or empty, a text is not a string or not valid Unicode, or no row
            has the input column, which is not the default one.
    """
    n_rows, saw_input = 0, False
    for line, values in rows:
        yield line, values, *_task_of(values, columns, name, line, option)
        n_rows += 1
        saw_input = saw_input or columns.input in values
    if n_rows and not saw_input and columns.input != DEFAULT_COLUMNS.input:
        raise UserError(f"{name}: no record has the input column {shorten(columns.input)}; correct its name")


def _task_of(
    values: Mapping[str, Any], columns: Columns, name: str, line: int, option: str
) -> tuple[str, str]:
    instruction = _text(values, columns.instruction, name, line, f"{option}.instruction")
    # Data sets express "no input" by an absent key, null or an empty string.
    given = values.get(columns.input) is not None
    input = _text(values, columns.input, name, line, f"{option}.input") if given else ""
    if not instruction.strip():
        raise UserError(
            f"{name}:{line}: {shorten(columns.instruction)} is empty; write the task, or remove the record"
        )
    return instruction, input


def _text(values: Mapping[str, Any], key: str, name: str, line: int, option: str) -> str:
    if key not in values:
        present = list(values)
        found = ", ".join(map(shorten, present[:6])) or "none"
        is_table = Path(name).suffix.lower() in TABLES
        what, header = ("column", ", as the first line is the header") if is_table else ("key", "")
        raise UserError(
            f"{name}:{line}: {what} {shorten(key)} is missing (found: {found}{header}); "
            f"add it, or name the column that holds it with {option}{nearest(key, present)}"
        )
    value = values[key]
    if not isinstance(value, str):
        raise UserError(f"{name}:{line}: {shorten(key)} is {json_type(value)}; expected a string")
    # Tokenizers would fail on lone surrogates later, without a line number.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name}:{line}: {shorten(key)} has {value[error.start]!r}, half of a character "
            f"(a lone surrogate, character {error.start + 1}); write the whole character, or remove it"
        ) from None
    return value


def split(records: Records, *, val_size: int | float, seed: int) -> tuple[Records, Records]:
    """Split into (train, validation) as `split_rows`. Records skipped while reading are those of train."""
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
