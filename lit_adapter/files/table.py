"""Tables of numbers that may be larger than the memory: appended on disk, then mapped.

A table is a folder: a file for each column, and ``about.json`` with its key, the sizes and checksums of the
columns, and whether it is complete. Committed values survive a kill, and writing continues after them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import BytesIO
from os import fsync
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lit_adapter.errors import WriteError
from lit_adapter.files.locks import one_at_a_time
from lit_adapter.files.read import file_state
from lit_adapter.files.space import write_error
from lit_adapter.files.write import sync_folder, write_json
from lit_adapter.streams import Say

VERSION = 1
ABOUT = "about.json"
SECONDS = 2.0
"""Seconds between commits: the most that a killed writer loses."""
BLOCK = 1 << 20
Schema = Mapping[str, DTypeLike]
"""The type of each column's values."""


@dataclass(frozen=True)
class Table:
    """A complete table."""

    columns: dict[str, NDArray]
    """Mapped read-only, or in memory if they could not be written."""
    notes: dict[str, Any]
    """Notes of its writer, as JSON values."""


class TableWriter:
    """Appends to the columns of a table, after the values that an interrupted writer committed to ``folder``.

    Without a folder the columns are kept in memory.

    Raises:
        WriteError: the folder or a file cannot be written.
    """

    def __init__(self, folder: Path | None, key: str, schema: Schema) -> None:
        self.folder, self.key = folder, key
        self._types = {name: np.dtype(kind) for name, kind in schema.items()}
        about = _read_about(folder, key, schema) if folder is not None else None
        self.notes: dict[str, Any] = about["notes"] if about else {}
        """The notes of the interrupted writer's last commit."""
        self.n_bytes: dict[str, int] = about["bytes"] if about else dict.fromkeys(schema, 0)
        self._crc32: dict[str, int] = about["crc32"] if about else dict.fromkeys(schema, 0)
        self.has_committed = about is not None
        self._files: dict[str, BinaryIO] = {}
        self._last_commit = time.monotonic()
        self._open_files = ExitStack()

    def __enter__(self) -> TableWriter:
        try:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
            for name, size in self.n_bytes.items():
                self._files[name] = self._open_files.enter_context(self._open(name))
                self._files[name].truncate(size)
                self._files[name].seek(size)
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # an error of a full disk, which is already reported
            self._open_files.close()

    def _open(self, name: str) -> BinaryIO:
        if self.folder is None:
            return BytesIO()
        path = self.folder / name
        path.touch()
        return path.open("r+b")

    def _failed(self, error: OSError) -> WriteError:
        assert self.folder is not None, "memory does not fail"
        return write_error(self.folder, error, sum(self.n_bytes.values()))

    def length(self, name: str) -> int:
        """Return the number of values in a column."""
        return self.n_bytes[name] // self._types[name].itemsize

    def append(self, columns: Mapping[str, NDArray]) -> None:
        """Append values to columns.

        Raises:
            WriteError: the disk is full, or fails.
        """
        for name, values in columns.items():
            content = np.ascontiguousarray(values, self._types[name]).tobytes()
            try:
                self._files[name].write(content)
            except OSError as error:
                raise self._failed(error) from error
            self.n_bytes[name] += len(content)
            self._crc32[name] = zlib.crc32(content, self._crc32[name])

    def commit(self, notes: dict[str, Any], *, complete: bool = False) -> None:
        """Make appended values durable, with ``notes``, if `SECONDS` have passed or they are ``complete``.

        Raises:
            WriteError: the disk is full, or fails.
        """
        if self.folder is None or not (complete or time.monotonic() - self._last_commit > SECONDS):
            return
        try:
            for file in self._files.values():
                file.flush()
                fsync(file.fileno())
            sync_folder(self.folder)
        except OSError as error:
            raise self._failed(error) from error
        about = {
            "version": VERSION,
            "key": self.key,
            "notes": notes,
            "bytes": self.n_bytes,
            "crc32": self._crc32,
            "complete": complete,
            "seen": _seen(self.folder, self._types) if complete else None,
        }
        _write_about(self.folder, about)
        self.has_committed, self._last_commit = True, time.monotonic()

    def finish(self, notes: dict[str, Any]) -> Table:
        """Complete the table.

        Raises:
            WriteError: as `commit`.
        """
        self.commit(notes, complete=True)
        if self.folder is not None:
            return Table(_mapped(self.folder, self._types, self.n_bytes), notes)
        contents = {name: file.getvalue() for name, file in self._files.items() if isinstance(file, BytesIO)}
        return Table({name: np.frombuffer(contents[name], self._types[name]) for name in contents}, notes)


def kept_table(
    folder: Path | None,
    key: str,
    schema: Schema,
    fill: Callable[[TableWriter], dict[str, Any]],
    *,
    what: str,
    doing: str,
    say: Say,
) -> Table:
    """Return the table with this key, from its folder or made by ``fill``, which returns its notes.

    One process at a time makes it. ``say`` gets a line if the one in the folder is damaged and is made again,
    and if it cannot be written: then it is kept in memory. ``what`` names the table in these lines, and
    ``doing`` what another process does. Without a folder, it is made in memory.
    """
    if folder is not None:
        with one_at_a_time(folder, doing=doing):  # a run's processes all need it
            found = read_table(folder, key, schema)
            if found is not None:
                return found
            if _is_damaged(folder, key, schema):
                say(f"{folder}: damaged cache of {what}, or of another version; it is made again")
                shutil.rmtree(folder, ignore_errors=True)
            try:
                return _filled(folder, key, schema, fill)
            except WriteError as error:  # this run goes on; the next one tries again
                shutil.rmtree(folder, ignore_errors=True)
                say(f"{what} are not cached: {error}; $LIT_ADAPTER_CACHE names another folder")
    return _filled(None, key, schema, fill)


def _filled(
    folder: Path | None, key: str, schema: Schema, fill: Callable[[TableWriter], dict[str, Any]]
) -> Table:
    with TableWriter(folder, key, schema) as writer:
        try:
            return writer.finish(fill(writer))
        except BaseException:
            if folder is not None and not writer.has_committed:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def read_table(folder: Path, key: str, schema: Schema) -> Table | None:
    """Return the table in a folder; None if it is missing, not complete, damaged or has another key.

    Contents are compared with their checksums if a file is not the one of the last check (size, times,
    inode).
    """
    about = _read_about(folder, key, schema)
    if about is None or not about["complete"]:
        return None
    seen = _seen(folder, schema)
    if about["seen"] != seen:
        if _has_changed(folder, about):
            return None
        with suppress(WriteError):
            _write_about(folder, about | {"seen": seen})
    return Table(_mapped(folder, schema, about["bytes"]), about["notes"])


def _is_damaged(folder: Path, key: str, schema: Schema) -> bool:
    """Whether a folder holds something that is neither a complete table nor the start of one."""
    try:
        if not (folder / ABOUT).exists():
            return False  # a writer was killed before its first commit
    except OSError:  # a name that the file system refuses
        return False
    about = _read_about(folder, key, schema)
    return about is None or about["complete"] or _has_changed(folder, about)


def _has_changed(folder: Path, about: dict[str, Any]) -> bool:
    """Whether a file of a table is not what its checksum says."""
    return any(_crc32(folder / name, size) != about["crc32"][name] for name, size in about["bytes"].items())


def _write_about(folder: Path, about: dict[str, Any]) -> None:
    write_json(folder / ABOUT, {"checksum": _checksum(about), "about": about})


def _read_about(folder: Path, key: str, schema: Schema) -> dict[str, Any] | None:
    """Return what ``about.json`` says; None if it is missing, damaged, or of another table or version."""
    try:
        whole = json.loads((folder / ABOUT).read_bytes())
        about: dict[str, Any] = whole["about"]
        if whole["checksum"] != _checksum(about) or (about["version"], about["key"]) != (VERSION, key):
            return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return about if about["bytes"].keys() == schema.keys() else None


def _checksum(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _seen(folder: Path, names: Iterable[str]) -> dict[str, list[int]] | None:
    """Return what shows that the files are still the same; None if one is missing."""
    try:
        return {name: file_state(folder / name) for name in names}
    except OSError:
        return None


def _crc32(path: Path, n_bytes: int) -> int | None:
    """Return the checksum of a file's first ``n_bytes``; None if it has fewer. It is not mapped for this."""
    crc32 = 0
    try:
        with path.open("rb") as file:
            while n_bytes and (block := file.read(min(BLOCK, n_bytes))):
                crc32, n_bytes = zlib.crc32(block, crc32), n_bytes - len(block)
    except OSError:
        return None
    return None if n_bytes else crc32


def _mapped(folder: Path, schema: Schema, n_bytes: dict[str, int]) -> dict[str, NDArray]:
    found: dict[str, NDArray] = {}
    for name, kind in schema.items():
        shape = (n_bytes[name] // np.dtype(kind).itemsize,)
        # An empty file cannot be mapped.
        found[name] = np.memmap(folder / name, kind, "r", shape=shape) if n_bytes[name] else np.empty(0, kind)
    return found
