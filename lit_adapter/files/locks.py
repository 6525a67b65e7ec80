"""Locks on files, released by the system when the process that holds them ends, however it ends.

`flock` ties a lock to an open file, so it also keeps two threads apart. A forked child shares the open file:
it closes what it inherits, so that loader workers do not keep the lock of a killed trainer.

The filelock package is not used, because it leaves its lock file behind, does not say who holds the lock, and
fails on file systems without locks (ENOLCK).
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer

from lit_adapter.errors import UserError, WriteError
from lit_adapter.files.space import write_error
from lit_adapter.streams import say

REPORT_AFTER = 2.0
"""Seconds of waiting after which it is reported."""
MAX_ATTEMPTS = 100
"""Attempts to create a lock file whose folder disappears."""
_descriptors: set[int] = set()
"""Files that this process holds open for their locks."""


def _close_inherited() -> None:
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_close_inherited)


def lock(descriptor: int, *, wait: bool = False) -> bool | None:
    """Lock an open file until `unlock` closes it.

    Return False if another open file holds the lock, None if the file system has no locks.
    """
    _descriptors.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def unlock(descriptor: int) -> None:
    """Close a file that was given to `lock`; does nothing in a forked child, where it is closed already."""
    if descriptor in _descriptors:
        _descriptors.remove(descriptor)
        os.close(descriptor)


def is_locked(path: Path) -> bool | None:
    """Whether anybody holds the lock of a file; None if the file system has no locks.

    Raises:
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR)  # network file systems lock only what is open for writing
    free = lock(descriptor)
    unlock(descriptor)
    return None if free is None else not free


class LockFile:
    """A file that exists while its lock is held, with the number of the process that holds it.

    If the file system has no locks, a living Python process of that number counts as the holder. Messages
    name the ``guarded`` file or folder, which one process at a time may write, and the option that names it.
    """

    def __init__(self, path: Path, guarded: Path, option: str) -> None:
        self.path, self.guarded, self.option = path, guarded, option
        self._descriptor: int | None = None
        self._made: list[Path] = []
        """Folders that were made for the lock file, the innermost first."""

    def acquire(self, *, wait: bool = False) -> None:
        """Take the lock, creating the folder of the lock file if needed.

        Raises:
            UserError: another process holds it and ``wait`` is off.
            WriteError: the lock file cannot be created, or is a symbolic link.
        """
        attempts = 0
        try:
            while self._descriptor is None:
                folders = (self.path.parent, *self.path.parent.parents)
                self._made = [folder for folder in folders if not folder.exists()]
                self.path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._descriptor = self._open(wait=wait)
                except FileNotFoundError:  # a holder that ended just now has removed the folder
                    attempts += 1
                    if attempts == MAX_ATTEMPTS:  # a folder that takes no files, such as /proc/self
                        raise
        except OSError as error:
            raise write_error(self.path, error) from error
        with suppress(OSError):  # a full disk: the lock holds without the number
            os.truncate(self._descriptor, 0)
            os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def _open(self, *, wait: bool) -> int | None:
        """Open and lock the file; return None if its last holder has removed it meanwhile."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        locked = lock(descriptor, wait=wait)
        holder = os.pread(descriptor, 20, 0).decode(errors="replace")
        if locked is False or (locked is None and not wait and _is_running(holder)):
            unlock(descriptor)
            raise UserError(
                f"{self.guarded}: in use by {_named(holder)}; wait for it, or choose another {self.option}"
            )
        if is_at(self.path, descriptor):
            return descriptor
        unlock(descriptor)
        return None

    def holder(self) -> str:
        """Return ``process N``, the holder as the file names it, or ``another process``."""
        with suppress(OSError):
            return _named(self.path.read_text(errors="replace"))
        return "another process"

    def release(self) -> None:
        """Remove the lock file and release the lock; does nothing if it is not held.

        Folders that were made for it are removed too, unless they hold something by now.
        """
        if self._descriptor in _descriptors:
            with suppress(OSError):
                if is_at(self.path, self._descriptor):  # not another process's lock, if the folder was moved
                    self.path.unlink()
            unlock(self._descriptor)
            with suppress(OSError):
                for folder in self._made:
                    folder.rmdir()
        self._descriptor = None


@contextmanager
def one_at_a_time(
    path: Path, *, wait: bool = True, option: str = "path", doing: str = "writes it"
) -> Iterator[None]:
    """Keep other processes from writing the file ``path``, which ``option`` names, inside the block.

    If no lock file can be created next to it, no process is kept out. A longer wait is reported once on
    standard error, with what the other process is ``doing``.

    Raises:
        UserError: another process is writing it and ``wait`` is off.
    """
    lock_file = LockFile(path.with_name(f".{path.name}.lock"), path, option)
    waiting = Timer(REPORT_AFTER, lambda: say(f"waiting for {lock_file.holder()}, which {doing}", sys.stderr))
    waiting.daemon = True
    waiting.start()
    try:
        with suppress(WriteError):
            lock_file.acquire(wait=wait)
    finally:
        waiting.cancel()
    try:
        yield
    finally:
        lock_file.release()


def is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file or folder is still the one with this name; network file systems answer ESTALE."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
            return False
        raise


def _named(holder: str) -> str:
    return f"process {holder}" if holder.isdigit() else "another process"


def _is_running(holder: str) -> bool:
    """Whether a process number belongs to another Python process, not to a program started since."""
    if not holder.isdigit() or int(holder) == os.getpid():
        return False
    try:
        return b"python" in Path(f"/proc/{holder}/cmdline").read_bytes()
    except OSError:
        if Path("/proc").is_dir():
            return False
    try:
        os.kill(int(holder), 0)
    except OSError:
        return False
    return True
