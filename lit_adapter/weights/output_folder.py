"""A folder that appears whole or not at all, whatever kills the process that builds it.

It is built as ``.NAME.*.tmp`` in the same parent folder and then renamed. A kill leaves only that folder,
which the next run for the same output removes; a lock marks a folder that is still being built.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_adapter.errors import UserError, WriteError
from lit_adapter.files.locks import LockFile, is_locked
from lit_adapter.files.space import free_disk, write_error
from lit_adapter.files.write import LEFTOVER_SECONDS, TEMPORARY_SUFFIX, UMASK, is_temporary, sync_folder
from lit_adapter.weights.base_folder import FINGERPRINT

LOCK = ".lock"
"""Empty until its lock is taken."""


def check_output(
    out: Path,
    source: Path | None,
    *,
    overwrite: bool,
    mark: str = FINGERPRINT,
    what: str = "a converted base",
) -> None:
    """Refuse an output folder that must not be written; ``mark`` is a file that it must have to be replaced.

    Raises:
        UserError: it exists and ``overwrite`` is off; it has no ``mark``, so that replacing it would delete
            something else; or it and the source lie inside each other.
    """
    if source is not None:
        ours, theirs = out.resolve(), source.resolve()
        if ours == theirs or ours in theirs.parents or (source.is_dir() and theirs in ours.parents):
            raise UserError(f"{out}: lies inside the source {source} or holds it; choose another --out")
    if out.is_symlink():
        raise UserError(f"{out}: is a symbolic link; choose another --out")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out names a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / mark).is_file():
        raise UserError(f"{out}: holds something other than {what}; choose another --out")
    if not overwrite:
        raise UserError(f"{out}: already there; use --overwrite to replace it, or choose another --out")


def check_free(out: Path, needed: int) -> None:
    """Refuse, by a UserError, to start writing more bytes than are free."""
    free = free_disk(out.parent)
    if free < needed:
        raise UserError(
            f"{out}: needs {needed:,} bytes, but {free:,} are free; free some space or choose another --out"
        )


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder next to ``out``, removed at the end unless `move_into_place` took it.

    Raises:
        WriteError: the folder above ``out`` or a file inside cannot be written; the latter is named by its
            final path.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(prefix=f".{out.name}.", suffix=TEMPORARY_SUFFIX, dir=out.parent)
        scratch = Path(name)
        scratch.chmod(0o777 & ~UMASK)
    except OSError as error:
        raise write_error(out, error) from error
    lock = LockFile(scratch / LOCK, out, "--out")
    try:
        lock.acquire()
        yield scratch
    except WriteError as error:
        raise WriteError(str(error).replace(str(scratch), str(out))) from error.__cause__
    finally:
        lock.release()
        shutil.rmtree(scratch, ignore_errors=True)


def move_into_place(scratch: Path, out: Path) -> None:
    """Rename a finished scratch folder to ``out``; only then is an earlier ``out`` deleted."""
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
    """Remove what killed runs for ``out`` left behind, and undo a half-done replacement.

    Raises:
        UserError: ``out`` is the root of the file system.
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
        raise UserError(f"{out}: is the root of the file system; choose another --out")
    return out.with_name(f".{out.name}.previous")


def _in_use(folder: Path) -> bool:
    """Whether another process builds the folder, or has created it and is about to lock it."""
    is_young = False
    try:
        is_young = time.time() - folder.stat().st_mtime < LEFTOVER_SECONDS
        lock = folder / LOCK
        return (is_young and not lock.stat().st_size) or is_locked(lock) is not False
    except FileNotFoundError:
        return is_young
    except OSError:
        return True
