"""The tasks of rows: an instruction and what it works on, checked. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_adapter.config import Columns
from lit_adapter.data.formats import TABLES
from lit_adapter.data.strict_json import Row, json_type
from lit_adapter.errors import UserError, nearest, shorten

DEFAULT_COLUMNS = Columns()
OPTION = "--data.columns"
"""Names the columns of training data."""


def tasks_of(
    rows: Iterable[Row], columns: Columns, name: str, option: str = OPTION
) -> Iterator[tuple[int, Mapping[str, Any], str, str]]:
    """Yield line number, values, instruction and input of the rows of the file ``name``.

    ``option`` is the one that names ``columns``, for messages.

    Raises:
        UserError: an instruction is missing or empty, a text is not a string or not valid Unicode, or no row
            has the input column, which is not the default one.
    """
    n_rows, saw_input = 0, False
    for line, values in rows:
        yield line, values, *_task_of(values, columns, name, line, option)
        n_rows += 1
        saw_input = saw_input or columns.input in values
    if n_rows and not saw_input and columns.input != DEFAULT_COLUMNS.input:
        raise UserError(f"{name}: no record has the input column {shorten(columns.input)}; correct its name")


def _task_of(
    values: Mapping[str, Any], columns: Columns, name: str, line: int, option: str
) -> tuple[str, str]:
    instruction = text_of(values, columns.instruction, name, line, f"{option}.instruction")
    # Data sets express "no input" by an absent key, null or an empty string.
    given = values.get(columns.input) is not None
    input = text_of(values, columns.input, name, line, f"{option}.input") if given else ""
    if not instruction.strip():
        raise UserError(
            f"{name}:{line}: {shorten(columns.instruction)} is empty; write the task, or remove the record"
        )
    return instruction, input


def text_of(values: Mapping[str, Any], key: str, name: str, line: int, option: str) -> str:
    """Return a row's text of the column ``key``, which ``option`` names.

    Raises:
        UserError: it is missing, not a string, or not valid Unicode; names file and line.
    """
    if key not in values:
        present = list(values)
        found = ", ".join(map(shorten, present[:6])) or "none"
        is_table = Path(name).suffix.lower() in TABLES
        what, header = ("column", ", as the first line is the header") if is_table else ("key", "")
        raise UserError(
            f"{name}:{line}: {what} {shorten(key)} is missing (found: {found}{header}); "
            f"add it, or name the column that holds it with {option}{nearest(key, present)}"
        )
    value = values[key]
    if not isinstance(value, str):
        raise UserError(f"{name}:{line}: {shorten(key)} is {json_type(value)}; expected a string")
    # Tokenizers would fail on lone surrogates later, without a line number.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name}:{line}: {shorten(key)} has {value[error.start]!r}, half of a character "
            f"(a lone surrogate, character {error.start + 1}); write the whole character, or remove it"
        ) from None
    return value
