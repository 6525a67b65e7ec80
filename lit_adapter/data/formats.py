"""Readers of JSON, JSONL, CSV, TSV and Parquet files; each row comes with the line it starts on.

Rows are read one by one, so that memory does not grow with the file. Ambiguous input that Python's own
readers accept, such as short CSV rows, is refused: guessing could mean training on something other than what
the file says.
"""

from __future__ import annotations

import codecs
import csv
import errno
import io
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from lit_adapter.config import Columns
from lit_adapter.data.strict_json import Row, json_rows, jsonl_rows
from lit_adapter.errors import UserError, shorten
from lit_adapter.files.read import reading

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""What may separate the columns of a CSV file, and its name."""
_QUOTED = re.compile(r'"[^"]*"')
_LONGEST_HEADER = 10_000
_LONGEST_FIELD = 2**31 - 1
_BLOCK = 1 << 16
_BATCH_ROWS = 1024


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
        raise _empty(name)


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
    _check_text(path, name)
    return _text_file_rows(path, name, readers[suffix])


def rows_of_input(content: bytes, columns: Columns) -> Iterator[Row]:
    """Yield the rows of standard input: a JSON array, JSON Lines, CSV, or else plain text (`text_rows`).

    The first character tells which: ``[`` or ``{``. CSV is a text whose first line names the instruction's
    column.

    Raises:
        UserError: it is malformed, not UTF-8 or empty, or looks like CSV without that column; names the line.
    """
    name = "standard input"
    _check_encoding(content, name)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(content, error.start, name) from None
    if not text.strip():
        raise _empty(name)
    readers: dict[str, Callable[[TextIO, str], Iterator[Row]]] = {"[": json_rows, "{": jsonl_rows}
    reader = readers.get(text.lstrip()[0])
    if reader is not None:
        return reader(io.StringIO(text), name)
    delimiter, first_line = _delimiter(text[:_LONGEST_HEADER])
    header = next(csv.reader([first_line], delimiter=delimiter))
    if columns.instruction in header:
        return csv_rows(io.StringIO(text, newline=""), name)
    if len(header) > 1 and all(map(str.isidentifier, header)):
        raise UserError(
            f"{name}:1: {shorten(first_line)} looks like the first line of a CSV file, without a column "
            f"{shorten(columns.instruction)}; name the instruction's with --columns.instruction, "
            "or put plain text into a .txt file"
        )
    check_no_columns(columns, name)
    return text_rows(io.StringIO(text), name)


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


def _check_text(path: Path, name: str) -> None:
    """Refuse a file that begins in another encoding, or has nothing but white space."""
    with reading(name), path.open("rb") as file:
        _check_encoding(file.read(2), name)
        file.seek(0)
        while (block := file.read(_BLOCK)) and not block.removeprefix(codecs.BOM_UTF8).strip():
            pass
    if not block:
        raise _empty(name)


def _check_encoding(content: bytes, name: str) -> None:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:2]:
        raise UserError(f"{name}: not UTF-8 but UTF-16 or UTF-32 (byte 0); save it as UTF-8")


def _empty(name: str) -> UserError:
    return UserError(f"{name}: the file is empty; expected records of instruction, input and output")


def _not_utf8(content: bytes, start: int, name: str, offset: int = 0, line: int = 1) -> UserError:
    line += content.count(b"\n", 0, start)
    byte = f"byte 0x{content[start]:02x} at offset {offset + start}"
    return UserError(f"{name}:{line}: not UTF-8: {byte}; save the file as UTF-8")


def _text_file_rows(path: Path, name: str, reader: Callable[[TextIO, str], Iterator[Row]]) -> Iterator[Row]:
    # The csv module wants line ends as they are; in JSON only a line feed ends a line.
    newline = "" if path.suffix.lower() in TABLES else "\n"
    try:
        with reading(name), path.open(encoding="utf-8-sig", newline=newline) as stream:
            yield from reader(stream, name)
    except UnicodeDecodeError:
        raise _first_error(path, name) from None


def _first_error(path: Path, name: str) -> UserError:
    """Return what to say about the first byte of a file that is not UTF-8."""
    offset, line = 0, 1
    with path.open("rb") as file:
        for content in file:
            try:
                content.decode()
            except UnicodeDecodeError as error:
                return _not_utf8(content, error.start, name, offset, line)
            offset, line = offset + len(content), line + 1
    return UserError(f"{name}: has changed while it was read; start again")


def text_rows(stream: TextIO, name: str) -> Iterator[Row]:
    """Yield each line that is not blank as an ``instruction``."""
    for line, content in enumerate(stream, start=1):
        if content.strip():
            yield line, {"instruction": content.removesuffix("\n").removesuffix("\r")}


def csv_rows(stream: TextIO, name: str, delimiters: Iterable[str] = DELIMITERS) -> Iterator[Row]:
    """Yield the rows of a table whose first line names the columns.

    The delimiter is the one that is most frequent in the first line, not counting quoted names; of equals,
    the first of ``delimiters``.
    """
    delimiter, _ = _delimiter(stream.read(_LONGEST_HEADER), delimiters)
    stream.seek(0)
    rows = _csv_values(stream, name, delimiter)
    header_line, header = next(rows, (1, []))
    _check_columns(header, f"{name}:{header_line}")
    for line, values in rows:
        if len(values) != len(header):
            raise UserError(
                f"{name}:{line}: {len(values)} fields, but the header names {len(header)} columns; "
                f'put text with {DELIMITERS[delimiter]} or line breaks in "double quotes"'
            )
        yield line, dict(zip(header, values, strict=True))


def _csv_values(stream: TextIO, name: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the values of each row that has any, and the line that it starts on."""
    # A quoted line break is one character, whatever system wrote the file.
    lines = (f"{text[:-2]}\n" if text.endswith("\r\n") else text for text in stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    values: list[str] | None = []
    while values is not None:
        line = reader.line_num + 1
        limit = csv.field_size_limit(_LONGEST_FIELD)
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{name}:{line}: not valid CSV: {error}; check the quotes") from None
        finally:
            csv.field_size_limit(limit)
        if values:
            yield line, values


def _delimiter(start: str, delimiters: Iterable[str] = DELIMITERS) -> tuple[str, str]:
    """Return what separates the columns of the first line that is not empty, and that line."""
    start = start.lstrip("\r\n")
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
                    yield row, ignored | {key: without_null(item) for key, item in value.items()}
    except UnicodeDecodeError as error:
        rows = f"rows {row + 1} to {row + _BATCH_ROWS}"
        raise UserError(f"{name}: text that is not UTF-8 in {rows}: {error.reason}; write it again") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name}: not a readable Parquet file: {error}") from None


def without_null(item: Any) -> Any:
    """Return nested values without nulls: Parquet has one wherever another record has a value."""
    if isinstance(item, dict):
        return {key: without_null(value) for key, value in item.items() if value is not None}
    return [without_null(value) for value in item] if isinstance(item, list) else item


TEXT_READERS: dict[str, Callable[[TextIO, str], Iterator[Row]]] = {
    ".json": json_rows,
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".csv": csv_rows,
    ".tsv": partial(csv_rows, delimiters="\t"),
}
"""Reader by file suffix; arguments: the open file, and its name for messages."""
TABLES = (".csv", ".tsv")
"""Suffixes of files whose first line names the columns."""
PARQUET = ".parquet"
SUFFIXES = (*TEXT_READERS, PARQUET)
"""Those of data files."""
