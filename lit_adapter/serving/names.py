"""The names of adapters: which are valid, and how a command line gives them. No heavy library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lit_adapter.errors import UserError, shorten
from lit_adapter.generation.terminal import PLAIN
from lit_adapter.weights.adapter_search import find_adapter

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
OF_RUNS = ("adapter", "best")
"""Names of files in a run folder; such an adapter is named after the folder."""


def check_name(name: str) -> str:
    """Return a name that an adapter can have.

    Raises:
        UserError: as `check_characters`; or the name stands for the plain base.
    """
    if check_characters(name) == PLAIN:
        raise UserError(f"adapter name '{PLAIN}' means the plain base; give the adapter another")
    return name


def check_characters(name: str) -> str:
    """Return a name that a base or an adapter can have.

    Raises:
        UserError: it has other characters than letters, digits, ``.``, ``_`` and ``-``, or more than 100.
    """
    if not NAME.fullmatch(name):
        raise UserError(
            f"adapter name {shorten(name)}: expected letters, digits, '.', '_' and '-', 100 at most, "
            "a letter or digit first"
        )
    return name


def named_adapters(words: Sequence[str]) -> dict[str, Path]:
    """Return files by name, each given as ``NAME=FILE``, or as a file or run folder that has its name.

    Raises:
        UserError: a word that is neither, or both; a name that is given twice or is invalid.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, file = _name_and_file(word)
        if name in found:
            raise UserError(
                f"--adapter {shorten(word)}: the name {name} is taken by {found[name]}; give NAME=FILE"
            )
        found[check_name(name)] = file
    return found


def _name_and_file(word: str) -> tuple[str, Path]:
    if not word:  # as a path it would mean the working directory
        raise UserError("--adapter '': expected NAME=FILE, or a file")
    name, equals, file = word.partition("=")
    whole = find_adapter(word)
    if not (equals and NAME.fullmatch(name)):
        return _own_name(whole, word), whole
    if not file:
        raise UserError(f"--adapter {shorten(word)}: expected NAME=FILE, or a file")
    if whole.exists():
        raise UserError(
            f"--adapter {shorten(word)}: is a file, but may also mean the file {file} under the name {name}; "
            f"write NAME={word} or {name}=./{file}"
        )
    return name, find_adapter(file)


def _own_name(path: Path, word: str) -> str:
    """Return the name of a run's folder, or of a file without its suffix."""
    name = path.absolute().parent.name if path.stem in OF_RUNS else path.stem
    if not NAME.fullmatch(name):
        raise UserError(f"--adapter {shorten(word)}: {shorten(name)} cannot be its name; give NAME={word}")
    return name
