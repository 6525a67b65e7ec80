"""``results.json`` of an earlier evaluation, read again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError
from lit_adapter.files.read import read_json

RESULTS = "results.json"


def read_results(path: Path) -> dict[str, Any]:
    """Return the results of an evaluation, which have a list of models.

    Raises:
        UserError: the file cannot be read, or does not hold results.
    """
    found = read_json(path)
    models = found.get("models") if isinstance(found, dict) else None
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise UserError(f"{path}: not the results of an evaluation: it holds no list of models")
    return dict(found)


def places_of(adapter: object, results: Path, below: Path) -> set[Path]:
    """Return the paths where the adapter of an evaluation may be; empty if it names none.

    Its path may be relative to the results, or to a folder above ``below``, where the evaluation was started.
    """
    if not isinstance(adapter, str):
        return set()
    given = Path(adapter).expanduser()
    with suppress(OSError, ValueError):
        above = (parent / given for parent in below.resolve().parents)
        return {place.resolve() for place in (given, results.parent / given, *above)}
    return set()
