"""Atomic, durable writes: a file appears whole or not at all.

A file is written under a temporary name in the same folder (a rename is atomic only within one file system),
synced, and renamed over the old one. A crash leaves the old file and perhaps a ``.NAME.*.tmp``, which `sweep`
or the next write of that file removes. A lock marks a temporary file that is still being written.
"""

from __future__ import annotations

import glob
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lit_adapter.files.locks import is_locked, lock, unlock
from lit_adapter.files.paths import existing_folder, write_target
from lit_adapter.files.space import write_error

TEMPORARY_SUFFIX = ".tmp"
LEFTOVER_SECONDS = 60
"""Age from which an unlocked temporary file is a leftover; a younger one may be about to be locked."""
UMASK = os.umask(0o077)  # it can be read only by setting it
"""The user's umask; `tempfile` ignores it."""
os.umask(UMASK)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def durable_path(path: Path, needed: int | None = None, *, make_folder: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; on success sync it and rename it to ``path``.

    The error message says that ``needed`` bytes are needed; by default, as many as had been written.

    Raises:
        UserError: ``path`` names a pipe or device, its folder cannot be written, or does not exist and
            ``make_folder`` is false, or the disk is full.
    """
    try:
        path = write_target(Path(path))
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        _remove(path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY_SUFFIX}"), LEFTOVER_SECONDS)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    temporary = Path(name)
    try:
        lock(descriptor)
        yield temporary
        temporary.chmod(0o666 & ~UMASK)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if needed is None and temporary.exists():
            needed = temporary.stat().st_size
        raise write_error(path, error, needed) from error
    finally:
        unlock(descriptor)
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, *, make_folder: bool = True) -> None:
    """Write ``content`` to ``path``, whole or not at all; ``make_folder`` also makes a missing folder."""
    with durable_path(path, len(content), make_folder=make_folder) as temporary:
        temporary.write_bytes(content)


def append_bytes(path: Path, content: bytes) -> None:
    """Append to a file, durably; a part that was written before the disk was full is removed.

    Raises:
        UserError: the file cannot be written.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        with suppress(OSError):  # half a line would only fill the disk
            os.truncate(path, size)
        raise write_error(path, error, needed=len(content)) from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path``, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_writable(folder: Path) -> None:
    """Check that files can be created in ``folder``, or where it would be created; leave nothing behind.

    Raises:
        WriteError: they cannot.
    """
    place = existing_folder(folder)
    try:
        with tempfile.TemporaryFile(prefix=".probe.", suffix=TEMPORARY_SUFFIX, dir=place) as file:
            file.write(b"\0")
    except OSError as error:
        raise write_error(folder, error) from error


def is_temporary(path: Path, name: str) -> bool:
    """Whether ``path`` is a temporary file of a write of ``name``, running or killed."""
    return path.name.startswith(f".{name}.") and path.name.endswith(TEMPORARY_SUFFIX)


def sweep(folder: Path) -> int:
    """Remove what killed writes left behind in ``folder`` and below; return how many files."""
    return _remove(folder.rglob(f".*{TEMPORARY_SUFFIX}"), 0)


def _remove(temporaries: Iterable[Path], seconds: float) -> int:
    removed = 0
    for path in temporaries:
        with suppress(OSError):  # another process may have removed it first
            if path.is_file() and time.time() - path.stat().st_mtime >= seconds and not is_locked(path):
                path.unlink()
                removed += 1
    return removed
