"""Records kept on disk, and read one by one from there: memory does not grow with their number.

Files are read once, whatever their format, into a table: each record's texts, where they came from, and their
digest. The table is keyed by the content of the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_adapter.config import Columns
from lit_adapter.data.formats import check_regular
from lit_adapter.data.reading import records_of
from lit_adapter.data.recognise import Recognised, each_once
from lit_adapter.data.record import AnyRecord, record_of
from lit_adapter.data.records import Records, digests_of
from lit_adapter.errors import UserError
from lit_adapter.files.read import file_sha256, reading
from lit_adapter.files.table import Table, TableWriter, kept_table
from lit_adapter.progress import count_progress
from lit_adapter.streams import Say

VERSION = 2
CHUNK = 1000
"""Records that are written together."""
SCHEMA = {"texts": np.uint8, "end": np.int64, "line": np.int64, "file": np.int32, "digests": np.uint64}
"""Texts as JSON, one after another; where those of each record end; two numbers per digest."""


@dataclass(frozen=True)
class Source:
    """A file of records."""

    path: Path
    name: str
    """What messages call it."""
    number: int = 0
    """Which of the named sources it belongs to."""
    address: str = ""
    """Its address on the Hub, if it is not on this machine."""


def first_of_each(files: Sequence[Source]) -> list[Source]:
    """Return the first file of each named source, in the order of their numbers."""
    first = {file.number: file for file in reversed(files)}
    return [first[number] for number in sorted(first)]


def stored_records(
    files: Sequence[Source],
    source: str,
    columns: Columns,
    wanted: str = "auto",
    *,
    cache: Path | None,
    say: Say = lambda line: None,
) -> Records:
    """Return the records of files as one, in order, from the folder ``cache`` if they are there already.

    ``wanted`` is the format of the records (`records_of`).

    Raises:
        UserError: as `read_records`.
    """
    states = [_state(file) for file in files]
    key = _key(files, columns, wanted)
    folder = cache / f"records-{key[:32]}" if cache is not None else None

    def fill(writer: TableWriter) -> dict[str, Any]:
        notes = _read_into(writer, files, columns, wanted)
        for file, before in zip(files, states, strict=True):
            if _state(file) != before:
                raise UserError(f"{file.name}: has changed while it was read; start again")
        return notes

    table = kept_table(folder, key, SCHEMA, fill, what="records", doing="reads the data", say=say)
    formats = _of_sources(table.notes["formats"], files)
    digests = table.columns["digests"].reshape(-1, 2)
    return Records(StoredRows(table, files), source, table.notes["n_empty_output"], formats, digests)


def _of_sources(notes: Sequence[dict[str, Any]], files: Sequence[Source]) -> tuple[Recognised, ...]:
    """Return the formats in a table's notes, with the numbers of sources in place of those of files."""
    formats = [Recognised(**known) for known in notes]
    return each_once((files[number].number, known) for known in formats for number in known.sources)


def _state(file: Source) -> tuple[int, int, int]:
    check_regular(file.path, file.name)
    status = file.path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _key(files: Sequence[Source], columns: Columns, wanted: str) -> str:
    parts: list[Any] = [VERSION, astuple(columns), wanted]
    for file in files:
        with reading(file.path):
            parts.append([file.name, file.path.suffix.lower(), file_sha256(file.path)])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read_into(writer: TableWriter, files: Sequence[Source], columns: Columns, wanted: str) -> dict[str, Any]:
    """Read all files into a table; return its notes."""
    n_empty = 0
    formats: list[tuple[int, Recognised]] = []
    for number, file in enumerate(files):
        known, records = records_of(file.path, file.name, columns, wanted)
        formats += [(number, known)] if known else []
        with count_progress(f"reading {file.name}") as advance:
            while rows := list(islice(records, CHUNK)):
                kept = [row for row in rows if not row.is_empty]
                n_empty += len(rows) - len(kept)
                writer.append(_columns(kept, number, writer.length("texts")))
                advance(len(rows))
    return {"n_empty_output": n_empty, "formats": [asdict(known) for known in each_once(formats)]}


def _columns(rows: Sequence[AnyRecord], file: int, start: int) -> dict[str, NDArray]:
    texts = [json.dumps(row.texts, ensure_ascii=False).encode() for row in rows]
    return {
        "texts": np.frombuffer(b"".join(texts), np.uint8),
        "end": start + np.cumsum([*map(len, texts)], dtype=np.int64),
        "line": np.array([row.line for row in rows], np.int64),
        "file": np.full(len(rows), file, np.int32),
        "digests": digests_of(rows),
    }


class StoredRows(Sequence[AnyRecord]):
    """The records of a table; each is read when it is asked for."""

    def __init__(self, table: Table, files: Sequence[Source]) -> None:
        self._columns, self._files = table.columns, files

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
        file, line = self._files[self._columns["file"][index]], int(self._columns["line"][index])
        return record_of(texts, file=file.name, line=line, source=file.number)

    def sources(self) -> NDArray[np.int64]:
        """Return the number of the source of every record; no text is read ``[records]``."""
        return np.array([file.number for file in self._files], np.int64)[self._columns["file"]]

    def __iter__(self) -> Iterator[AnyRecord]:
        return (self[index] for index in range(len(self)))
