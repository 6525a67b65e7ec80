"""Durable files: whatever we write appears whole or not at all.

A file is written under a temporary name in the SAME folder (a rename is atomic only within one file
system), flushed, synced, and renamed over the old one. A crash leaves the old file and perhaps a
``.name.*.tmp`` leftover, which the next write of that file or `sweep` removes; a lock tells it from a file
that another process is writing just now.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError, WriteError

TEMPORARY_SUFFIX = ".tmp"
LEFTOVER_SECONDS = 60
"""Age of an unlocked temporary file from which it is a leftover; a younger one may not be locked yet."""
MOST_LINKS = 40
"""That the system follows, too."""
LARGEST_JSON = 2**28
"""Bytes; configurations, indexes and vocabularies are far smaller."""


def _umask() -> int:
    mask = os.umask(0o077)  # it can be read only by setting it
    os.umask(mask)
    return mask


UMASK = _umask()
"""What the user takes from the rights of new files; temporary ones are made without regard to it."""


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def followed(path: Path) -> Path:
    """Return the file that writing ``path`` replaces: of a link the one that it leads to.

    Raises:
        UserError: a pipe or device, or a link to an open file, as /dev/stdout is.
    """
    target = _end_of_links(path) if path.is_symlink() else path
    if target.exists() and not (target.is_file() or target.is_dir()):
        # The rename would put a file in the place of the device itself, for every program: /dev/null.
        raise UserError(f"{target}: a pipe, socket or device; name a regular file to write")
    return target


def _end_of_links(path: Path) -> Path:
    steps = [path]
    while steps[-1].is_symlink() and len(steps) <= MOST_LINKS:
        steps.append(steps[-1].parent / steps[-1].readlink())
    target = Path(os.path.realpath(path))
    if target.is_relative_to("/dev") or any(step.is_relative_to("/proc") for step in steps[1:]):
        raise UserError(f"{path}: a link to an open file or a device; name a regular file to write")
    return target


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
    path = followed(Path(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY_SUFFIX}"), LEFTOVER_SECONDS)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    temporary = Path(name)
    try:
        _lock(descriptor)
        yield temporary
        temporary.chmod(0o666 & ~UMASK)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error, needed=_size(temporary) if needed is None else needed) from error
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def _lock(descriptor: int, *, wait: bool = False) -> bool:
    """Take the file's lock, which lasts until it is closed; False if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


@contextmanager
def one_at_a_time(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Be the only process inside for ``path``; one that failed or was killed is out.

    Where the lock beside ``path`` cannot be had, in a folder or file system without, all are let in.

    Args:
        path: a file.
        wait: for the process that is inside, if there is one.

    Raises:
        UserError: there is one, and it is not waited for.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        descriptor = _locked(lock, wait=wait)
    except BlockingIOError:
        raise UserError(f"{path}: another run is writing it; wait for that, or name another file") from None
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                lock.unlink()
            os.close(descriptor)


def _locked(lock: Path, *, wait: bool) -> int | None:
    """Open and lock a file; None where that cannot be done.

    Raises:
        BlockingIOError: another process has it.
    """
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        if not _lock(descriptor, wait=wait):
            os.close(descriptor)
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if is_at(lock, descriptor):
            return descriptor
        os.close(descriptor)  # who had it has removed it, and the next one will make another


def is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one of that name; ESTALE is what a network's file system says."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return False
        raise


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


def probe(folder: Path) -> None:
    """See that files can be made in ``folder``, or where it would be made; leave nothing behind.

    Raises:
        UserError: they cannot.
    """
    place = folder if folder.is_dir() else existing_parent(folder)
    try:
        with tempfile.TemporaryFile(prefix=".probe.", suffix=TEMPORARY_SUFFIX, dir=place) as file:
            file.write(b"\0")
    except OSError as error:
        raise write_error(folder, error) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in one line that ``path`` cannot be looked at or read, where the system says so."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from None


def refuse_input(out: Path, inputs: Iterable[Path], option: str) -> None:
    """Refuse an output that would replace what is read.

    Args:
        out: a file to write.
        inputs: files, and folders all of whose files are read.
        option: which names the output.

    Raises:
        UserError: ``out`` is there, and is one of ``inputs`` or lies in one.
    """
    if not out.exists():
        return
    real = out.resolve()
    for path in inputs:
        if path.resolve() in (real, *real.parents):
            raise UserError(f"{out}: {option} is read from too ({path}); choose another")


def write_error(path: Path, error: OSError, needed: int | None = None) -> WriteError:
    """Say in one line why ``path`` could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if not full:
        return WriteError(f"{path}: cannot write: {error.strerror or error}; choose a writable place")
    free = shutil.disk_usage(existing_parent(path)).free
    size = f"needs {needed:,} bytes, " if needed is not None else ""
    return WriteError(
        f"{path}: cannot write: {error.strerror} ({size}{free:,} bytes free); "
        "free some space or choose another place; the earlier file is unchanged"
    )


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above ``path`` that exists."""
    folder = Path(path).absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    return folder


def free_path(path: Path) -> Path:
    """Return a path, or its name with the first number that is not taken: before a file's suffix."""
    free, number = path, 2
    suffix = "" if path.is_dir() else path.suffix
    while free.exists():
        free = path.with_name(f"{path.name.removesuffix(suffix)}-{number}{suffix}")
        number += 1
    return free


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def is_temporary(path: Path, name: str) -> bool:
    """Tell what is being written to become ``name``, or was left by a killed write of it."""
    return path.name.startswith(f".{name}.") and path.name.endswith(TEMPORARY_SUFFIX)


def sweep(folder: Path) -> int:
    """Remove what killed writes left behind in ``folder`` and below; return how many files."""
    return _remove(folder.rglob(f".*{TEMPORARY_SUFFIX}"), 0)


def _remove(leftovers: Iterable[Path], seconds: float) -> int:
    """Remove the files that nobody has locked and that are older than ``seconds``; return how many."""
    removed = 0
    for path in leftovers:
        with suppress(OSError):  # another process may be faster
            if not path.is_file() or time.time() - path.stat().st_mtime < seconds:
                continue
            with path.open("rb") as file:
                if _lock(file.fileno()):
                    path.unlink()
                    removed += 1
    return removed


def free_disk(folder: Path) -> int:
    """Return the free bytes of the disk that holds ``folder``, or would hold it."""
    return shutil.disk_usage(folder if folder.is_dir() else existing_parent(folder)).free


def is_text(name: str) -> bool:
    """Whether a name has no half of a surrogate pair, as names of files that are not UTF-8 have."""
    return name.encode(errors="ignore").decode() == name


def refuse_stand_in(path: Path) -> None:
    """Refuse what servers and git leave in place of a large file.

    Raises:
        UserError: an empty file, a Git LFS pointer, or a web page.
    """
    with path.open("rb") as stream:
        start = stream.read(512)
    if not start.strip():
        raise UserError(f"{path}: the file is empty; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer, not the file itself; run 'git lfs pull' there")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path}: is a web page, not the file itself; fetch it again")


def safetensors_header(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: dict[str, str]
) -> bytes:
    """Return the start of a safetensors file; its tensors' bytes follow in the same order.

    Args:
        tensors: name, type (``F32``), shape and bytes of each.
        metadata: texts by name.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, kind, shape, n_bytes in tensors:
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8
    return len(text).to_bytes(8, "little") + text


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_text(path: Path) -> str:
    """Read a text file; a byte order mark at its start is dropped.

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
        UserError: missing, unreadable, not UTF-8, not JSON, or far too large; names the file and the place.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise UserError(f"{path}: {size:,} bytes of JSON; expected {LARGEST_JSON:,} or less")
        return json.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(f"{path}: file not found") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None


def without_home(path: str) -> str:
    """Return ``path`` with ``~`` for the user's home folder: what is saved names no user."""
    try:
        home = str(Path.home())
    except RuntimeError:  # a user without one
        return path
    return "~" + path[len(home) :] if path == home or path.startswith(home + os.sep) else path
