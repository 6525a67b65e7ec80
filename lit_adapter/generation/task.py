"""Tasks, in the forms in which Python callers give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lit_adapter.errors import WrongTypeError, shorten

Task = tuple[str, str]
"""Instruction and input."""


def as_tasks(given: Iterable[Any]) -> list[Task]:
    """Return tasks given as texts, pairs of instruction and input, or records with these keys.

    Other keys of a record are ignored, as in training data.

    Raises:
        WrongTypeError: a single task instead of several, or an item that is not a task.
    """
    if isinstance(given, str | Mapping):
        raise WrongTypeError(
            f"tasks is of type {type(given).__name__}; expected a list of tasks: for one task, pass [task]"
        )
    return [_task(item, number) for number, item in enumerate(given)]


def _task(item: Any, number: int) -> Task:
    if isinstance(item, Mapping) and "instruction" in item:
        pair = (item["instruction"], item.get("input") or "")
    else:
        pair = (item, "") if isinstance(item, str) else item
    if isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(text, str) for text in pair):
        return pair[0], pair[1]
    raise WrongTypeError(
        f"tasks[{number}] is {shorten(item)}; expected a str, a pair (instruction, input) of str, or a dict "
        "with the key 'instruction'"
    )
