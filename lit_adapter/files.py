"""Durable files: whatever we write appears whole or not at all.

A file is written under a temporary name in the SAME folder (a rename is atomic only within one file
system), flushed, synced, and renamed over the old one. A crash leaves the old file and perhaps a
``.name.*.tmp`` leftover, which `sweep` removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError

TEMPORARY_SUFFIX = ".tmp"


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def durable_path(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success sync it and rename it to ``path``.

    Args:
        path: where the file goes.
        needed: its size in bytes where known, for the message; else what was written when it failed.

    Raises:
        UserError: the folder cannot be written, the disk is full (needed and free bytes are named), or a
            pipe or device has this name.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        # The rename would put a file in the place of the device itself, for every program: /dev/null.
        raise UserError(f"{path}: a pipe, socket or device; name a regular file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error, needed=_size(temporary) if needed is None else needed) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    with durable_path(path, needed=len(content)) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path``, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_error(path: Path, error: OSError, needed: int | None = None) -> UserError:
    """Say in one line why ``path`` could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if not full:
        return UserError(f"{path}: cannot write: {error.strerror or error}; choose a writable place")
    free = shutil.disk_usage(existing_parent(path)).free
    size = f"needs {needed:,} bytes, " if needed is not None else ""
    return UserError(
        f"{path}: cannot write: {error.strerror} ({size}{free:,} bytes free); "
        "free some space or choose another place; the earlier file is unchanged"
    )


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above ``path`` that exists."""
    folder = Path(path).absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def sweep(folder: Path) -> int:
    """Remove what killed writes left behind in ``folder`` and below; return how many files."""
    leftovers = [path for path in folder.rglob(f".*{TEMPORARY_SUFFIX}") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: missing, unreadable, not UTF-8, or not JSON; names the file and the place.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: file not found") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
