"""Reading small files; what cannot be read is reported in one line."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError

MAX_JSON_BYTES = 2**28
"""Most bytes of a JSON file; configurations, indexes and vocabularies are far smaller."""


@contextmanager
def reading(name: Path | str) -> Iterator[None]:
    """Turn an OSError about a file, which the message calls ``name``, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{name}: cannot read: {error.strerror or error}") from None


def read_text(path: Path) -> str:
    """Read a text file without the byte order mark it may start with.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        with reading(path):
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing, unreadable, larger than `MAX_JSON_BYTES`, not UTF-8 or not JSON.
    """
    try:
        found = path.stat()
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # a pipe would wait for a writer
            raise UserError(f"{path}: cannot read: a pipe, socket or device")
        if found.st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: {found.st_size:,} bytes of JSON; expected {MAX_JSON_BYTES:,} or less")
        return json.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(f"{path}: file not found") from None
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file; a UserError says that it cannot be read, is not JSON, or does not hold an object."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object")
    return raw


def refuse_stand_in(path: Path) -> None:
    """Refuse what git or a server may have left in place of a large file.

    Raises:
        UserError: the file is empty, a Git LFS pointer, or a web page.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        start = stream.read(512)
    if not start.strip():
        raise UserError(f"{path}: the file is empty; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer, not the file itself; run 'git lfs pull' there")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path}: is a web page, not the file itself; fetch it again")


def file_state(path: Path) -> list[int]:
    """Return what shows, without reading it, that a file was replaced or written again."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
