"""Tasks, in the forms that Python callers use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lit_adapter.arguments import of_kind, text
from lit_adapter.errors import UserError, WrongTypeError, shorten

Task = tuple[str, str]
"""Instruction and input."""


def as_task(instruction: Any, input: Any) -> Task:
    """Return a task given as two texts.

    Raises:
        WrongTypeError: one of them is not a text.
        UserError: the instruction is empty.
    """
    task = text("instruction", instruction), text("input", input)
    check_instruction("instruction", task[0])
    return task


def as_tasks(given: Iterable[Any]) -> list[Task]:
    """Return tasks given as texts, pairs of instruction and input, or records with these keys.

    Other keys of a record are ignored, as in training data.

    Raises:
        WrongTypeError: a single task instead of several, or an item that is not a task.
        UserError: an instruction is empty.
    """
    if isinstance(given, str | Mapping):
        raise WrongTypeError(
            f"tasks is of type {type(given).__name__}; expected a list of tasks: for one task, pass [task]"
        )
    tasks = of_kind("tasks", given, Iterable, "a list of tasks")
    return [_task(item, number) for number, item in enumerate(tasks)]


def check_instruction(name: str, instruction: str) -> None:
    """Refuse an instruction that is only white space, as training data and the command line do."""
    if not instruction.strip():
        raise UserError(f"{name} is empty; write the task")


def _task(item: Any, number: int) -> Task:
    if isinstance(item, Mapping) and "instruction" in item:
        # An absent key and None mean no input, as in training data; 0 or [] are mistakes.
        pair = (item["instruction"], "" if item.get("input") is None else item["input"])
    else:
        pair = (item, "") if isinstance(item, str) else item
    if isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(text, str) for text in pair):
        check_instruction(f"the instruction of tasks[{number}]", pair[0])
        return pair[0], pair[1]
    raise WrongTypeError(
        f"tasks[{number}] is {shorten(item)}; expected a str, a pair (instruction, input) of str, or a dict "
        "with the key 'instruction'"
    )
