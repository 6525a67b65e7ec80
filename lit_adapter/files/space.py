"""Free space on a disk, and errors that say how much is missing."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from lit_adapter.errors import WriteError
from lit_adapter.files.paths import existing_folder


def free_disk(folder: Path) -> int:
    """Return the free bytes of the disk that holds ``folder``, or would hold it."""
    return shutil.disk_usage(existing_folder(folder)).free


def write_error(path: Path, error: OSError, needed: int | None = None) -> WriteError:
    """Return an error that says in one line why a file of ``needed`` bytes could not be written."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return WriteError(f"{path}: cannot write: {error.strerror or error}; choose a writable place")
    size = f"needs {needed:,} bytes, " if needed is not None else ""
    return WriteError(
        f"{path}: cannot write: {error.strerror} ({size}{free_disk(path):,} bytes free); "
        "free some space or choose another place; the earlier file is unchanged"
    )
