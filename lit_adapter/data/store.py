"""Records kept on disk, and read one by one from there: memory does not grow with their number.

Files are read once, whatever their format, into a table: each record's texts, where they came from, and their
digest. The table is keyed by the content of the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_adapter.config import Columns
from lit_adapter.data.formats import check_regular
from lit_adapter.data.records import Record, Records, digests_of, of_texts, records_of
from lit_adapter.errors import UserError
from lit_adapter.files.read import file_sha256, reading
from lit_adapter.files.table import Table, TableWriter, kept_table
from lit_adapter.progress import count_progress

VERSION = 1
CHUNK = 1000
"""Records that are written together."""
SCHEMA = {"texts": np.uint8, "end": np.int64, "line": np.int64, "file": np.int32, "digests": np.uint64}
"""Texts as JSON, one after another; where each record's end; two numbers a digest."""


@dataclass(frozen=True)
class Source:
    """A file of records, and its name in messages."""

    path: Path
    name: str


def stored_records(
    files: Sequence[Source],
    source: str,
    columns: Columns,
    *,
    cache: Path | None,
    say: Callable[[str], None] = lambda line: None,
) -> Records:
    """Return the records of files as one, in order, from the folder ``cache`` if they are there already.

    Raises:
        UserError: as `read_records`.
    """
    states = [_state(file) for file in files]
    key = _key(files, columns)
    folder = cache / f"records-{key[:32]}" if cache is not None else None

    def fill(writer: TableWriter) -> dict[str, Any]:
        notes = _read_into(writer, files, columns)
        for file, before in zip(files, states, strict=True):
            if _state(file) != before:
                raise UserError(f"{file.name}: has changed while it was read; start again")
        return notes

    table = kept_table(folder, key, SCHEMA, fill, what="records", doing="reads the data", say=say)
    rows = StoredRows(table, tuple(file.name for file in files))
    return Records(rows, source, table.notes["n_empty_output"], table.columns["digests"].reshape(-1, 2))


def _state(file: Source) -> tuple[int, int, int]:
    check_regular(file.path, file.name)
    status = file.path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _key(files: Sequence[Source], columns: Columns) -> str:
    parts: list[Any] = [VERSION, astuple(columns)]
    for file in files:
        with reading(file.path):
            parts.append([file.name, file.path.suffix.lower(), file_sha256(file.path)])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read_into(writer: TableWriter, files: Sequence[Source], columns: Columns) -> dict[str, Any]:
    """Read all files into a table; return its notes."""
    n_empty = 0
    for number, file in enumerate(files):
        records = records_of(file.path, file.name, columns)
        with count_progress(f"reading {file.name}") as advance:
            while rows := list(islice(records, CHUNK)):
                kept = [row for row in rows if not row.is_empty]
                n_empty += len(rows) - len(kept)
                writer.append(_columns(kept, number, writer.length("texts")))
                advance(len(rows))
    return {"n_empty_output": n_empty}


def _columns(rows: Sequence[Record], file: int, start: int) -> dict[str, NDArray]:
    texts = [json.dumps(row.texts, ensure_ascii=False).encode() for row in rows]
    return {
        "texts": np.frombuffer(b"".join(texts), np.uint8),
        "end": start + np.cumsum([*map(len, texts)], dtype=np.int64),
        "line": np.array([row.line for row in rows], np.int64),
        "file": np.full(len(rows), file, np.int32),
        "digests": digests_of(rows),
    }


class StoredRows(Sequence[Record]):
    """The records of a table; each is read when it is asked for."""

    def __init__(self, table: Table, names: tuple[str, ...]) -> None:
        self._columns, self._names = table.columns, names

    def __len__(self) -> int:
        return len(self._columns["end"])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self._columns["end"][index - 1] if index else 0
        texts = json.loads(self._columns["texts"][start : self._columns["end"][index]].tobytes())
        file, line = (int(self._columns[name][index]) for name in ("file", "line"))
        return of_texts(texts, file=self._names[file], line=line)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))
