"""Records: read, counted, split and compared. No torch.

A malformed record is refused with its line. Two flaws common in real data are only counted: records with
nothing to learn, such as an empty output, which are skipped, and duplicates, which are kept.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_adapter.config import Columns
from lit_adapter.data.reading import records_of
from lit_adapter.data.recognise import Recognised
from lit_adapter.data.record import AnyRecord, Record
from lit_adapter.data.tasks import DEFAULT_COLUMNS
from lit_adapter.errors import UserError


@dataclass(frozen=True)
class Records(Sequence[AnyRecord]):
    """Records, and counts of what reading them found.

    Raises:
        UserError: there is no record.
    """

    rows: tuple[AnyRecord, ...]
    source: str
    """The file or Hub data set, by the user's name for it."""
    n_empty_output: int = 0
    """Number of records skipped because their output is empty or white space, or nothing is to be learned."""
    formats: tuple[Recognised, ...] = ()
    """What was recognised in the sources."""
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
            for text in row.texts:
                content = text.encode()
                # The length in front keeps ("ab", "c") and ("a", "bc") apart.
                digest.update(len(content).to_bytes(8, "little") + content)
        object.__setattr__(self, "n_duplicate", len(self.rows) - len(set(self.rows)))
        object.__setattr__(self, "sha256", digest.hexdigest())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    @property
    def tasks(self) -> list[Record]:
        """The instruction records among them."""
        return [row for row in self.rows if isinstance(row, Record)]


def read_records(
    path: str | Path,
    *,
    columns: Columns = DEFAULT_COLUMNS,
    name: str | None = None,
    wanted: str = "auto",
    source: int = 0,
) -> Records:
    """Read a JSON (array), JSONL, CSV, TSV or Parquet file of records; the suffix tells which.

    Columns not in ``columns`` are ignored. Messages call the file ``name``, by default its path. ``wanted``
    is the format of its records (`records_of`), ``source`` their number among several sources.

    Raises:
        UserError: the file cannot be read, is malformed or not UTF-8, or has no record; a field is missing,
            not a string or not valid Unicode, or an instruction is empty; a conversation is malformed; a
            record is of another format than the first one. Names file, line and turn.
    """
    name = name or str(path)
    formats: list[Recognised] = []
    every = list(records_of(Path(path), name, columns, wanted, source=source, recognised=formats.append))
    rows = tuple(row for row in every if not row.is_empty)
    return Records(rows, name, len(every) - len(rows), tuple(formats))


def merge(parts: Sequence[Records], source: str) -> Records:
    """Return the records of several files as one, in order."""
    rows = tuple(row for part in parts for row in part.rows)
    formats = dict.fromkeys(known for part in parts for known in part.formats)
    return Records(rows, source, sum(part.n_empty_output for part in parts), tuple(formats))


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
    train = Records(sides[0], f"{records.source} (train)", records.n_empty_output, records.formats)
    return train, Records(sides[1], f"{records.source} (validation)")


def overlap(train: Records, val: Records) -> int:
    """Return how many validation records are also training records, word for word."""
    seen = set(train.rows)
    return sum(row in seen for row in val.rows)
