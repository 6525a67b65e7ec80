"""A folder that appears whole or not at all, whatever kills the process that builds it.

It is built as ``.name.*.tmp`` beside its final place and renamed. A kill leaves only that leftover,
which the next run for the same place sweeps; a lock tells a leftover from a folder still being built.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lit_adapter.errors import UserError, WriteError
from lit_adapter.files import (
    LEFTOVER_SECONDS,
    TEMPORARY_SUFFIX,
    UMASK,
    existing_parent,
    is_temporary,
    sync_folder,
    write_error,
)
from lit_adapter.weights.base_folder import FINGERPRINT

LOCK = ".lock"
"""Empty until its lock has been taken."""


def check_output(out: Path, source: Path | None, *, overwrite: bool) -> None:
    """Refuse an output folder that must not be written.

    Raises:
        UserError: it is there and ``overwrite`` is off; or it is no converted base, so replacing it
            would delete something else; or it and the source lie inside each other.
    """
    if source is not None:
        ours, theirs = out.resolve(), source.resolve()
        if ours == theirs or ours in theirs.parents or (source.is_dir() and theirs in ours.parents):
            raise UserError(f"{out}: lies inside the source {source} or holds it; choose another --out")
    if out.is_symlink():
        raise UserError(f"{out}: is a symbolic link; choose another --out")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; --out names a folder")
    if not any(out.iterdir()):
        return
    if not (out / FINGERPRINT).is_file():
        raise UserError(f"{out}: holds something other than a converted base; choose another --out")
    if not overwrite:
        raise UserError(f"{out}: already there; use --overwrite to replace it, or choose another --out")


def check_free(out: Path, needed: int) -> None:
    """Refuse to start writing what cannot fit.

    Raises:
        UserError: fewer than ``needed`` bytes are free; names both numbers.
    """
    free = shutil.disk_usage(existing_parent(out)).free
    if free < needed:
        raise UserError(
            f"{out}: needs {needed:,} bytes, but {free:,} are free; free some space or choose another --out"
        )


@contextlib.contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out``, removed at the end unless `move_into_place` took it.

    Raises:
        UserError: the folder above ``out`` cannot be written; or a file inside, which is named as in ``out``.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(prefix=f".{out.name}.", suffix=TEMPORARY_SUFFIX, dir=out.parent)
        scratch = Path(name)
        scratch.chmod(0o777 & ~UMASK)
        lock = (scratch / LOCK).open("wb", buffering=0)
        # Without locks on this file system two simultaneous runs for one place would meet; one alone is safe.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.write(b"locked")
    except OSError as error:
        raise write_error(out, error) from error
    with lock:
        try:
            yield scratch
        except WriteError as error:
            raise WriteError(str(error).replace(str(scratch), str(out))) from error.__cause__
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def move_into_place(scratch: Path, out: Path) -> None:
    """Give a finished scratch folder its name; what was there goes only now."""
    previous = _previous(out)
    try:
        sync_folder(scratch)
        if out.exists():
            out.rename(previous)
        scratch.rename(out)
        sync_folder(out.parent)
        (out / LOCK).unlink(missing_ok=True)
    except OSError as error:
        raise write_error(out, error) from error
    shutil.rmtree(previous, ignore_errors=True)


def sweep_leftovers(out: Path) -> None:
    """Remove what killed runs for ``out`` left beside it, and undo a half-done replacement.

    Raises:
        UserError: the root of the file system, which cannot be replaced.
    """
    if not out.parent.is_dir():
        return
    previous = _previous(out)
    if previous.is_dir():
        if out.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(out)
    for path in out.parent.iterdir():
        if is_temporary(path, out.name) and path.is_dir() and not path.is_symlink() and not _in_use(path):
            shutil.rmtree(path, ignore_errors=True)


def _previous(out: Path) -> Path:
    if not out.name:
        raise UserError(f"{out}: has no name; choose another --out")
    return out.with_name(f".{out.name}.previous")


def _in_use(folder: Path) -> bool:
    """Whether another process builds the folder: it has the lock, or may not have come so far yet."""
    is_young = False
    try:
        is_young = time.time() - folder.stat().st_mtime < LEFTOVER_SECONDS
        with (folder / LOCK).open("r+") as lock:
            if is_young and not lock.read():
                return True
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return is_young
    except OSError:
        return True
    return False
