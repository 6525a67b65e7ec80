"""Reads the records of a file, whatever its format. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from lit_adapter.config import Columns
from lit_adapter.data.formats import rows_of
from lit_adapter.data.recognise import (
    Recognised,
    check_same,
    conversation_of,
    has_messages,
    recognise,
    wanted_columns,
)
from lit_adapter.data.record import AnyRecord, PlainText, Record
from lit_adapter.data.strict_json import Row
from lit_adapter.data.tasks import OPTION, tasks_of, text_of
from lit_adapter.errors import UserError, shorten


def records_of(
    path: Path, name: str, columns: Columns, wanted: str = "auto", option: str = OPTION
) -> tuple[Recognised | None, Iterator[AnyRecord]]:
    """Return the format of a file's records, None without any, and the records, including empty ones.

    Args:
        path: its suffix tells how it is read.
        name: what messages call it.
        columns: the names of its columns.
        wanted: the format of its records; ``auto``: that of the first one.
        option: the one that names the columns, for messages.

    Raises:
        UserError: it cannot be read or is malformed, or a record is; names file, line and turn.
    """
    rows = rows_of(path, name, wanted_columns(columns))
    first = next(rows, None)
    if first is None:
        return None, iter(())
    known = recognise(first[1], columns, wanted)
    return known, records_of_rows(chain([first], rows), name, columns, known, option)


def records_of_rows(
    rows: Iterable[Row],
    name: str,
    columns: Columns,
    known: Recognised,
    option: str = OPTION,
    *,
    source: int = 0,
) -> Iterator[AnyRecord]:
    """Yield the records of a file's rows, which all have the format ``known``; as `records_of`."""
    rows = _of_one_format(rows, columns, known, name)
    read = {"alpaca": _tasks, "prompt_completion": _prompts, "text": _texts}.get(known.name, _conversations)
    for record in read(rows, columns, known, name, option):
        yield replace(record, source=source) if source else record


def _of_one_format(rows: Iterable[Row], columns: Columns, known: Recognised, name: str) -> Iterator[Row]:
    for line, values in rows:
        check_same(values, columns, known, f"{name}:{line}")
        yield line, values


def _tasks(
    rows: Iterator[Row], columns: Columns, known: Recognised, name: str, option: str
) -> Iterator[AnyRecord]:
    for line, values, instruction, input in tasks_of(rows, columns, name, option):
        output = text_of(values, columns.output, name, line, f"{option}.output")
        yield Record(instruction, input, output, file=name, line=line)


def _prompts(
    rows: Iterator[Row], columns: Columns, known: Recognised, name: str, option: str
) -> Iterator[AnyRecord]:
    for line, values in rows:
        if has_messages(values, columns):
            yield conversation_of(values, columns, known, option, file=name, line=line)
            continue
        prompt, completion = (
            text_of(values, getattr(columns, field), name, line, f"{option}.{field}")
            for field in ("prompt", "completion")
        )
        if not prompt.strip():
            raise UserError(
                f"{name}:{line}: {shorten(columns.prompt)} is empty; write the task, or remove the record"
            )
        yield Record(prompt, "", completion, file=name, line=line)


def _conversations(
    rows: Iterator[Row], columns: Columns, known: Recognised, name: str, option: str
) -> Iterator[AnyRecord]:
    for line, values in rows:
        yield conversation_of(values, columns, known, option, file=name, line=line)


def _texts(
    rows: Iterator[Row], columns: Columns, known: Recognised, name: str, option: str
) -> Iterator[AnyRecord]:
    for line, values in rows:
        text = text_of(values, columns.text, name, line, f"{option}.text")
        yield PlainText(text, file=name, line=line)
