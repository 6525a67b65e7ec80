"""Instruction records: read and checked, counted, split and compared. No torch.

What is malformed is refused with its line. What real data is known to hold is kept or skipped, and
counted: records with an empty output have nothing to learn and are skipped; duplicates are kept.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_adapter.config import Columns
from lit_adapter.data.formats import READERS, Row, check_regular, json_type
from lit_adapter.errors import UserError, nearest, shorten

DEFAULT_COLUMNS = Columns()


@dataclass(frozen=True, slots=True)
class Record:
    """One task. Two records are equal when their texts are, wherever they came from."""

    instruction: str
    input: str
    output: str
    file: str = field(default="", compare=False)
    """The file's name, one string shared by all its records."""
    line: int = field(default=0, compare=False)
    """Where the record starts: a line, or for Parquet a row, counted from 1."""

    @property
    def origin(self) -> str:
        """Return ``file:line``, for messages."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Records(Sequence[Record]):
    """Records and what reading them noticed.

    Raises:
        UserError: there is no record.
    """

    rows: tuple[Record, ...]
    source: str
    """The file or Hub data set, as the user named it."""
    n_empty_output: int = 0
    """Records left out because their output is empty or white space."""
    n_duplicate: int = field(init=False)
    """Records that repeat an earlier one; they are kept."""
    sha256: str = field(init=False)
    """Of the texts in order; it does not depend on file format, line ends or column names."""

    def __post_init__(self) -> None:
        if not self.rows:
            why = (
                f"all {self.n_empty_output} have an empty output" if self.n_empty_output else "it holds none"
            )
            raise UserError(
                f"{self.source}: no usable record: {why}; expected records of instruction, input and output"
            )
        object.__setattr__(self, "n_duplicate", len(self.rows) - len(set(self.rows)))
        object.__setattr__(self, "sha256", _content_sha256(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.rows)


def _content_sha256(rows: Iterable[Record]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for text in (row.instruction, row.input, row.output):
            content = text.encode()
            # The length in front keeps ("ab", "c") and ("a", "bc") apart.
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def read_records(
    source: str | Path, *, columns: Columns = DEFAULT_COLUMNS, name: str | None = None
) -> Records:
    """Read a JSON (array), JSONL, CSV or Parquet file of records; the suffix tells which.

    Args:
        source: the file.
        columns: what the file calls the fields; other columns are ignored.
        name: what messages call the file; its path if left out.

    Raises:
        UserError: not a readable file, malformed, not UTF-8, a field that is missing, not text or not
            valid Unicode, an empty instruction, or no record at all; names file and line.
    """
    path, name = Path(source), name or str(source)
    rows: list[Record] = []
    n_empty, saw_input = 0, False
    for line, values in rows_of(path, name, (columns.instruction, columns.input, columns.output)):
        record = _record(values, columns, name, line)
        saw_input = saw_input or columns.input in values
        if record.output.strip():
            rows.append(record)
        else:
            n_empty += 1
    if rows and not saw_input and columns.input != DEFAULT_COLUMNS.input:
        raise UserError(f"{name}: no record has the input column {shorten(columns.input)}; correct its name")
    return Records(tuple(rows), name, n_empty)


def rows_of(path: Path, name: str, wanted: Iterable[str]) -> Iterator[Row]:
    """Yield the rows of a file; its suffix tells the format.

    Args:
        path: the file.
        name: what messages call it.
        wanted: columns that will be looked at.

    Raises:
        UserError: not a readable file, or malformed; names file and line.
    """
    check_regular(path, name)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        kind = f"the suffix '{path.suffix}'" if path.suffix else "no suffix"
        raise UserError(f"{name}: {kind} names no format read here; expected {', '.join(READERS)}")
    return reader(path, name, wanted)


def _record(values: Mapping[str, Any], columns: Columns, name: str, line: int) -> Record:
    advice = "add it, or name the column that holds it"
    instruction, input = task_of(values, columns, name, line, advice)
    return Record(instruction, input, _text(values, columns.output, name, line, advice), name, line)


def task_of(
    values: Mapping[str, Any], columns: Columns, name: str, line: int, advice: str
) -> tuple[str, str]:
    """Return a row's instruction and input.

    Args:
        values: the row.
        columns: what it calls them.
        name: of the file, for messages.
        line: of the row.
        advice: what to do where there is no instruction.

    Raises:
        UserError: one is missing, not text or not valid Unicode, or the instruction is empty.
    """
    instruction = _text(values, columns.instruction, name, line, advice)
    # Data sets write "no input" as an absent key, as null, or as an empty text.
    given = values.get(columns.input) is not None
    input = _text(values, columns.input, name, line, advice) if given else ""
    if not instruction.strip():
        raise UserError(
            f"{name}:{line}: {shorten(columns.instruction)} is empty; write the task, or remove it"
        )
    return instruction, input


def _text(values: Mapping[str, Any], key: str, name: str, line: int, advice: str) -> str:
    if key not in values:
        present = list(values)
        found = ", ".join(map(shorten, present[:6])) or "none"
        raise UserError(
            f"{name}:{line}: key {shorten(key)} is missing (found: {found}); {advice}{nearest(key, present)}"
        )
    value = values[key]
    if not isinstance(value, str):
        raise UserError(f"{name}:{line}: {shorten(key)} is {json_type(value)}; expected a string")
    if not value.isascii():
        _check_unicode(value, key, name, line)
    return value


def _check_unicode(value: str, key: str, name: str, line: int) -> None:
    """Refuse half of a surrogate pair here: tokenizers would fail on it later, without a line."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name}:{line}: {shorten(key)} holds {value[error.start]!r}, half of a character "
            f"(a lone surrogate, character {error.start + 1}); write the whole character, or remove it"
        ) from None


def merge(parts: Sequence[Records], source: str) -> Records:
    """Return the records of several files as one, in order."""
    rows = tuple(row for part in parts for row in part.rows)
    return Records(rows, source, sum(part.n_empty_output for part in parts))


def split(records: Records, *, val_size: int | float, seed: int) -> tuple[Records, Records]:
    """Split into (train, validation), chosen by ``seed``; both keep the order of the file.

    The records left out before the split are on the training side's count.

    Args:
        records: what to split.
        val_size: how many validation records, or, below 1, which fraction of the records.
        seed: the same seed and records give the same split, on every Python version.

    Raises:
        UserError: not a count or a fraction, or no record would be left on one side.
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
    # Only Random.random() promises the same numbers on every Python version; shuffle() does not.
    draw = random.Random(seed).random
    keys = [draw() for _ in range(total)]
    chosen = set(sorted(range(total), key=keys.__getitem__)[:count])
    sides = [
        tuple(row for i, row in enumerate(records.rows) if (i in chosen) is side) for side in (False, True)
    ]
    train = Records(sides[0], f"{records.source} (train)", records.n_empty_output)
    return train, Records(sides[1], f"{records.source} (validation)")


def overlap(train: Records, val: Records) -> int:
    """Return how many validation records also stand in the training records, word for word."""
    seen = set(train.rows)
    return sum(row in seen for row in val.rows)
