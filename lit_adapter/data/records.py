"""Instruction records: read, checked, counted, split and compared. No torch.

A malformed record is refused with its line. Two flaws common in real data are only counted: records with an
empty output, which are skipped since they have nothing to learn, and duplicates, which are kept.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_adapter.config import Columns
from lit_adapter.data.formats import TABLES, Row, json_type, rows_of
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


@dataclass(frozen=True)
class Records(Sequence[Record]):
    """Records, and counts of what reading them found.

    Raises:
        UserError: there is no record.
    """

    rows: tuple[Record, ...]
    source: str
    """The file or Hub data set, by the user's name for it."""
    n_empty_output: int = 0
    """Number of records skipped because their output is empty or white space."""
    n_duplicate: int = field(init=False)
    """Number of records that repeat an earlier one; they are kept."""
    sha256: str = field(init=False)
    """Hash of the texts in order; independent of file format, line ends and column names."""

    def __post_init__(self) -> None:
        if not self.rows:
            why = f"all {self.n_empty_output} have an empty output" if self.n_empty_output else "it is empty"
            raise UserError(
                f"{self.source}: no usable record: {why}; expected records of instruction, input and output"
            )
        digest = hashlib.sha256()
        for row in self.rows:
            for text in (row.instruction, row.input, row.output):
                content = text.encode()
                # The length in front keeps ("ab", "c") and ("a", "bc") apart.
                digest.update(len(content).to_bytes(8, "little") + content)
        object.__setattr__(self, "n_duplicate", len(self.rows) - len(set(self.rows)))
        object.__setattr__(self, "sha256", digest.hexdigest())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]


def read_records(
    source: str | Path, *, columns: Columns = DEFAULT_COLUMNS, name: str | None = None
) -> Records:
    """Read a JSON (array), JSONL, CSV, TSV or Parquet file of records; the suffix tells which.

    Columns not in ``columns`` are ignored. Messages call the file ``name``, by default its path.

    Raises:
        UserError: the file cannot be read, is malformed or not UTF-8, or has no record; a field is missing,
            not a string or not valid Unicode, or an instruction is empty. Names file and line.
    """
    path, name = Path(source), name or str(source)
    rows: list[Record] = []
    n_empty = 0
    found = rows_of(path, name, (columns.instruction, columns.input, columns.output))
    for line, values, instruction, input in tasks_of(found, columns, name):
        output = _text(values, columns.output, name, line, f"{OPTION}.output")
        if output.strip():
            rows.append(Record(instruction, input, output, name, line))
        else:
            n_empty += 1
    return Records(tuple(rows), name, n_empty)


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


def merge(parts: Sequence[Records], source: str) -> Records:
    """Return the records of several files as one, in order."""
    rows = tuple(row for part in parts for row in part.rows)
    return Records(rows, source, sum(part.n_empty_output for part in parts))


def split(records: Records, *, val_size: int | float, seed: int) -> tuple[Records, Records]:
    """Split into (train, validation), at random by ``seed``; both keep the order of the file.

    ``val_size`` is the number of validation records or, below 1, their fraction. Records skipped while
    reading are counted on the training side. The split is the same on every Python version.

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
    # Only Random.random() gives the same numbers on every Python version; shuffle() may not.
    draw = random.Random(seed).random
    keys = [draw() for _ in range(total)]
    chosen = set(sorted(range(total), key=keys.__getitem__)[:count])
    sides = [
        tuple(row for i, row in enumerate(records.rows) if (i in chosen) is side) for side in (False, True)
    ]
    train = Records(sides[0], f"{records.source} (train)", records.n_empty_output)
    return train, Records(sides[1], f"{records.source} (validation)")


def overlap(train: Records, val: Records) -> int:
    """Return how many validation records are also training records, word for word."""
    seen = set(train.rows)
    return sum(row in seen for row in val.rows)
