"""Finds the adapter that a user names, in the same way for every command."""

from __future__ import annotations

from pathlib import Path

from lit_adapter.errors import UserError

ADAPTER = "adapter.safetensors"
"""What a run's folder calls its adapter."""
RUNS = Path("out")
"""Where runs are, unless their configuration says otherwise."""


def find_adapter(name: str | Path) -> Path:
    """Return the file of an adapter named by its path, by its run's folder, or by the run's name in ``out``.

    A name that matches nothing is returned unchanged: its reader says what is there instead.

    Raises:
        UserError: the name is empty; as a path it would mean the working directory.
    """
    if name == "":
        raise UserError("the adapter's name is empty; give a run's folder or an adapter file")
    given = Path(name).expanduser()
    for path in (given, RUNS / name):
        if path.is_file():
            return path
        if (path / ADAPTER).is_file():
            return path / ADAPTER
    return given
