"""Names of files: where they lead, whether they are free, and how they are saved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import count, takewhile
from pathlib import Path

from lit_adapter.errors import UserError

MAX_LINKS = 40
"""Symbolic links followed from one name, as in Linux."""


def cache_folder() -> Path:
    """Return the folder of cached files: ``$LIT_ADAPTER_CACHE``, else one in the user's cache folder.

    Raises:
        UserError: neither is known.
    """
    own = os.environ.get("LIT_ADAPTER_CACHE")
    try:
        if own:
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_adapter"
    except RuntimeError:
        raise UserError("no home folder for encoded data; name a folder in LIT_ADAPTER_CACHE") from None


def existing_folder(path: Path) -> Path:
    """Return ``path`` if it is a folder, else the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def free_path(path: Path) -> Path:
    """Return ``path`` or, if it is taken, the first free ``NAME-2``, ``NAME-3``; a file keeps its suffix."""
    return next(name for name in _numbered(path) if not name.exists())


def newest_path(path: Path) -> Path:
    """Return the last name of ``path``, ``NAME-2``, ... before the one that `free_path` returns, if any."""
    newest = path
    for name in takewhile(Path.exists, _numbered(path)):
        newest = name
    return newest


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    suffix = "" if path.is_dir() else path.suffix
    stem = path.name.removesuffix(suffix)
    yield from (path.with_name(f"{stem}-{number}{suffix}") for number in count(2))


def write_target(path: Path) -> Path:
    """Return the file that a write to ``path`` replaces: the target of a symbolic link, else ``path``.

    Raises:
        UserError: it is a pipe, socket or device, or a link to an open file such as /dev/stdout.
    """
    target = _link_target(path) if path.is_symlink() else path
    if target.exists() and not (target.is_file() or target.is_dir()):
        # A rename would replace the device itself, such as /dev/null, for every program.
        raise UserError(f"{target}: a pipe, socket or device; name a regular file to write")
    return target


def _link_target(path: Path) -> Path:
    steps = [path]
    while steps[-1].is_symlink() and len(steps) <= MAX_LINKS:
        steps.append(steps[-1].parent / steps[-1].readlink())
    target = Path(os.path.realpath(path))
    if target.is_relative_to("/dev") or any(step.is_relative_to("/proc") for step in steps[1:]):
        raise UserError(f"{path}: a link to an open file or a device; name a regular file to write")
    return target


def refuse_input(out: Path, inputs: Iterable[Path], option: str) -> None:
    """Refuse an output, named by ``option``, that would replace an input file or a file of an input folder.

    Raises:
        UserError: ``out`` exists and is one of ``inputs`` or lies inside one.
    """
    real = out.resolve()
    for path in inputs:
        if out.exists() and path.resolve() in (real, *real.parents):
            raise UserError(f"{out}: {option} is also an input ({path}); choose another")


def is_unicode(name: str) -> bool:
    """Whether a name is valid Unicode; Python reads file names that are not UTF-8 as lone surrogates."""
    return name.encode(errors="ignore").decode() == name


def without_home(path: str) -> str:
    """Return ``path`` with ``~`` for the user's home folder, so that saved files do not name the user."""
    try:
        home = str(Path.home())
    except RuntimeError:  # the user has none
        return path
    return "~" + path[len(home) :] if path == home or path.startswith(home + os.sep) else path
