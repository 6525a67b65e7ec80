"""Readers of JSON, JSONL, CSV, TSV and Parquet files; each row comes with the line it starts on.

They refuse what Python's own readers accept (NaN, duplicate keys, short CSV rows): a reader that guesses
would train on something other than what the file says.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lit_adapter.config import Columns
from lit_adapter.errors import UserError, shorten

Row = tuple[int, Mapping[str, Any]]
"""A line number (for Parquet a row number), counted from 1, and the values by column name."""

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""What may separate the columns of a CSV file, and its name."""
_QUOTED = re.compile(r'"[^"]*"')
_LONGEST_HEADER = 10_000
_BATCH_ROWS = 1024
_SPACE = re.compile(r"[ \t\r\n]*")


class _RefusedError(ValueError):
    """Accepted by Python's json, but not JSON, or ambiguous."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _RefusedError(f"key {shorten(twice)} appears twice in one object; keep one of them")
    return found


def _refuse_constant(name: str) -> Any:
    raise _RefusedError(f"{name} is not JSON; write a string, or null")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def parse_json(text: str) -> Any:
    """Parse strict JSON: no NaN or Infinity, no key twice in an object.

    Raises:
        ValueError: the text is anything else, has a number that is too long, or is nested too deeply.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise _RefusedError("nested too deeply") from None


def json_type(value: object) -> str:
    """Return JSON's name for the type of ``value``, and for a number also its value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    if type(value) in names:
        return names[type(value)]
    return f"the number {shorten(value)}" if isinstance(value, int | float) else type(value).__name__


def check_regular(path: Path, name: str) -> None:
    """Refuse what cannot be read as a file, without opening it: opening a FIFO would block forever.

    Raises:
        UserError: the file is missing, a folder, a loop of links, a special file, not readable, or empty.
    """
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) and not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except FileNotFoundError:
        link = " (a broken link)" if path.is_symlink() else ""
        raise UserError(f"{name}: file not found{link}; check the path") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise UserError(f"{name}: a loop of symbolic links; link it to a file") from None
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{name}: cannot read: {reason}; choose a readable file") from None
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{name}: is a folder; name one data file in it")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{name}: not a regular file (a pipe, socket or device); name a data file")
    if status.st_size == 0:
        raise UserError(f"{name}: the file is empty; expected records of instruction, input and output")


def rows_of(
    path: Path, name: str, wanted: Iterable[str] | None = None, *, plain_text: bool = False
) -> Iterator[Row]:
    """Yield the rows of a file, called ``name`` in messages; its suffix tells the format.

    Of a Parquet file only the ``wanted`` columns are read; None: all. With ``plain_text`` a ``.txt`` file is
    read too (`text_rows`).

    Raises:
        UserError: the file cannot be read or is malformed; names file and line.
    """
    check_regular(path, name)
    suffix = path.suffix.lower()
    if suffix == PARQUET:
        return parquet_rows(path, name, wanted)
    readers = TEXT_READERS | ({".txt": text_rows} if plain_text else {})
    if suffix not in readers:
        kind = f"suffix '{path.suffix}'" if path.suffix else "no suffix"
        raise UserError(f"{name}: unknown data format ({kind}); expected {', '.join([*readers, PARQUET])}")
    return readers[suffix](read_text(path, name), name)


def rows_of_input(content: bytes, columns: Columns) -> Iterator[Row]:
    """Yield the rows of standard input: a JSON array, JSON Lines, CSV, or else plain text (`text_rows`).

    The first character tells which: ``[`` or ``{``. CSV is a text whose first line names the instruction's
    column.

    Raises:
        UserError: it is malformed, not UTF-8 or empty, or looks like CSV without that column; names the line.
    """
    name = "standard input"
    text = _decoded(content, name)
    reader = {"[": json_rows, "{": jsonl_rows}.get(text.lstrip()[0])
    if reader is not None:
        return reader(text, name)
    delimiter, first_line = _delimiter(text)
    header = next(csv.reader([first_line], delimiter=delimiter))
    if columns.instruction in header:
        return csv_rows(text, name)
    if len(header) > 1 and all(map(str.isidentifier, header)):
        raise UserError(
            f"{name}:1: {shorten(first_line)} looks like the first line of a CSV file, without a column "
            f"{shorten(columns.instruction)}; name the instruction's with --columns.instruction, "
            "or put plain text into a .txt file"
        )
    check_no_columns(columns, name)
    return text_rows(text, name)


def check_no_columns(columns: Columns, name: str) -> None:
    """Refuse names for the columns of plain text.

    Raises:
        UserError: the instruction or the input has another name than the default.
    """
    for field, default in (("instruction", Columns.instruction), ("input", Columns.input)):
        given = getattr(columns, field)
        if given != default:
            raise UserError(
                f"{name} was read as plain text, an instruction on each line, which has no column "
                f"{shorten(given)}; leave out --columns.{field}, or give JSON Lines, a JSON array, or CSV "
                "whose first line names the columns"
            )


def read_text(path: Path, name: str) -> str:
    """Return a file's text without a UTF-8 byte order mark.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or has nothing but white space.
    """
    try:
        return _decoded(path.read_bytes(), name)
    except OSError as error:
        raise UserError(f"{name}: cannot read: {error.strerror}") from None


def _decoded(content: bytes, name: str) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:2]:
        raise UserError(f"{name}: not UTF-8 but UTF-16 or UTF-32 (byte 0); save it as UTF-8")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}:{line}: not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}; "
            "save the file as UTF-8"
        ) from None
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise UserError(f"{name}: the file is empty; expected records of instruction, input and output")
    return text


def _value(text: str, start: int, name: str, line: int, hint: str = "") -> tuple[Any, int]:
    """Decode the JSON value at ``start``, in line ``line``; return it and the index of its end."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        at = f"{line + error.doc.count(chr(10), start, error.pos)}:{error.colno}"
        raise UserError(f"{name}:{at}: not valid JSON: {error.msg}{hint}") from None
    except _RefusedError as error:
        raise UserError(f"{name}:{line}: {error}") from None
    except RecursionError:
        raise UserError(f"{name}:{line}: nested too deeply; expected a flat object of strings") from None
    except ValueError:
        digits = f"{sys.get_int_max_str_digits():,}"
        raise UserError(f"{name}:{line}: a number of more than {digits} digits; write it as text") from None


def _object(value: Any, name: str, line: int) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        expected = 'an object such as {"instruction": ..., "output": ...}'
        raise UserError(f"{name}:{line}: a record is {json_type(value)}; expected {expected}")
    return value


def _skip(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    return f"{line}:{position - text.rfind(chr(10), 0, position)}"


def json_rows(text: str, name: str) -> Iterator[Row]:
    """Yield the objects of a JSON array, decoded one by one so that each one's line is known."""
    position = _skip(text, 0)
    if text[position] != "[":
        raise _not_an_array(text, position, name)
    line, counted = 1, 0
    position = _skip(text, position + 1)
    while not text.startswith("]", position):
        line += text.count("\n", counted, position)
        counted = position
        if position == len(text):
            raise UserError(f"{name}:{_place(text, position)}: the array has no end; is the file truncated?")
        value, position = _value(text, position, name, line)
        yield line, _object(value, name, line)
        position = _skip(text, position)
        if text.startswith(",", position):
            comma, position = position, _skip(text, position + 1)
            if text.startswith("]", position):
                raise UserError(f"{name}:{_place(text, comma)}: not valid JSON: trailing comma; remove it")
        elif position < len(text) and text[position] != "]":
            raise UserError(f"{name}:{_place(text, position)}: not valid JSON: expected ',' between records")
    position = _skip(text, position + 1)
    if position < len(text):
        raise UserError(f"{name}:{_place(text, position)}: not valid JSON: text after the closing ']'")


def _not_an_array(text: str, position: int, name: str) -> UserError:
    line = text.count("\n", 0, position) + 1
    value, end = _value(text, position, name, line)
    if isinstance(value, dict) and text.startswith("{", _skip(text, end)):
        return UserError(
            f"{name}:{line}: one object after another, without '[' around them: this is JSON Lines; "
            "rename the file to .jsonl"
        )
    keys = f" with the keys {', '.join(map(shorten, list(value)[:6]))}" if isinstance(value, dict) else ""
    return UserError(f"{name}:{line}: the file holds {json_type(value)}{keys}; expected an array of records")


def jsonl_rows(text: str, name: str) -> Iterator[Row]:
    """Yield one object per line; only a line feed ends a line, not U+2028 or U+0085."""
    if text.lstrip(" \t\r\n").startswith("["):
        raise UserError(f"{name}:1: starts with '[', a JSON array; rename the file to .json")
    hint = "; each line must hold one whole JSON object"
    for line, content in enumerate(text.split("\n"), start=1):
        start = _skip(content, 0)
        if start == len(content):
            continue
        value, end = _value(content, start, name, line, hint)
        end = _skip(content, end)
        if end < len(content):
            raise UserError(f"{name}:{line}:{end + 1}: text after the object{hint}")
        yield line, _object(value, name, line)


def text_rows(text: str, name: str) -> Iterator[Row]:
    """Yield each line that is not blank as an ``instruction``."""
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            yield line, {"instruction": content.removesuffix("\r")}


def csv_rows(text: str, name: str, delimiters: Iterable[str] = DELIMITERS) -> Iterator[Row]:
    """Yield the rows of a table whose first line names the columns.

    The delimiter is the one that stands most often in the first line, not counting quoted names; if two do,
    the first of ``delimiters``.
    """
    # A quoted line break is one character, whatever system wrote the file.
    text = text.replace("\r\n", "\n")
    limit = csv.field_size_limit(len(text) + 1)
    delimiter, _ = _delimiter(text, delimiters)
    rows, line = [], 1
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for values in reader:
            if values:
                rows.append((line, values))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name}:{line}: not valid CSV: {error}; check the quotes") from None
    finally:
        csv.field_size_limit(limit)
    header_line, header = rows[0]
    _check_columns(header, f"{name}:{header_line}")
    for line, values in rows[1:]:
        if len(values) != len(header):
            raise UserError(
                f"{name}:{line}: {len(values)} fields, but the header names {len(header)} columns; "
                f'put text with {DELIMITERS[delimiter]} or line breaks in "double quotes"'
            )
        yield line, dict(zip(header, values, strict=True))


def _delimiter(text: str, delimiters: Iterable[str] = DELIMITERS) -> tuple[str, str]:
    """Return what separates the columns of the first line that is not empty, and that line."""
    start = text[:_LONGEST_HEADER].lstrip("\r\n")
    unquoted = re.split(r"[\r\n]", _QUOTED.sub("", start))[0]
    return max(delimiters, key=unquoted.count), re.split(r"[\r\n]", start)[0]


def _check_columns(columns: Sequence[str], where: str) -> None:
    for column, number in Counter(columns).items():
        if number > 1:
            raise UserError(f"{where}: column {shorten(column)} appears twice; rename one of them")


def parquet_rows(path: Path, name: str, wanted: Iterable[str] | None) -> Iterator[Row]:
    """Yield the rows of a Parquet file; columns that are not wanted have the value None.

    Raises:
        UserError: pyarrow is not installed, or the file is not valid Parquet.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{name}: Parquet needs pyarrow; run: pip install 'pyarrow>=18'") from None
    row = 0
    try:
        with parquet.ParquetFile(path) as source:
            columns = source.schema_arrow.names
            _check_columns(columns, name)
            chosen = columns if wanted is None else [column for column in wanted if column in columns]
            ignored = dict.fromkeys(column for column in columns if column not in chosen)
            for batch in source.iter_batches(batch_size=_BATCH_ROWS, columns=chosen):
                for value in batch.to_pylist():
                    row += 1
                    yield row, ignored | value
    except UnicodeDecodeError as error:
        rows = f"rows {row + 1} to {row + _BATCH_ROWS}"
        raise UserError(f"{name}: text that is not UTF-8 in {rows}: {error.reason}; write it again") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name}: not a readable Parquet file: {error}") from None


TEXT_READERS: dict[str, Callable[[str, str], Iterator[Row]]] = {
    ".json": json_rows,
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".csv": csv_rows,
    ".tsv": partial(csv_rows, delimiters="\t"),
}
"""Reader by file suffix; arguments: the file's text, and its name for messages."""
TABLES = (".csv", ".tsv")
"""Suffixes of files whose first line names the columns."""
PARQUET = ".parquet"
SUFFIXES = (*TEXT_READERS, PARQUET)
"""Those of data files."""
