"""Standard output and error streams that do not end a run when they are closed, full or not UTF-8.

A closed stream acts like /dev/null. A character that a terminal cannot show becomes a question mark. A failed
write to standard output is a one-line error if the output is the result; if files are the result, it is a
warning, and the run goes on. What is printed may come from a stranger's file: `say` keeps the terminal from
executing its control characters.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any, TextIO

from lit_adapter.errors import UserError, visible

Say = Callable[[str], None]
"""Is given each line for the user."""
OUTPUT, ERROR = 1, 2
"""File descriptors."""


class Shown(str):
    """A text whose control characters are the program's own: parts from files are already `visible`."""


def say(text: str, out: TextIO | None = None) -> None:
    """Print a line for the user, on standard output or ``out``; control characters in it are written out.

    Everything that this package prints goes through here, except answers (`write_answer`) and tables.
    """
    line = text if isinstance(text, Shown) else visible(text)
    # With its end in the same write: lines of processes that share an unbuffered stream would mix.
    print(f"{line}\n", end="", file=out or sys.stdout, flush=True)


def write_answer(text: str, out: TextIO) -> None:
    """Write a piece of generated text unchanged, but on a terminal with control characters written out."""
    out.write(visible(text) if out.isatty() else text)
    out.flush()


@contextmanager
def only_errors_of(*loggers: str) -> Iterator[None]:
    """Keep what libraries log, but for errors, from standing between our lines inside the block."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


class _Stream(FileIO):
    """Reports the first failed write and discards all later ones, including what Python flushes at exit."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.is_result = descriptor == OUTPUT
        self.failed = False

    def write(self, data: Any) -> int:
        if self.failed:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self.failed = True
            text = f"standard output: cannot write: {error.strerror}"
            if self.is_result:
                raise error if isinstance(error, BrokenPipeError) else UserError(text) from None
            if self.fileno() == OUTPUT:
                say(f"warning: {text}; the work goes on without it", sys.stderr)
            return len(data)


def prepare_streams() -> None:
    """Open closed standard streams, and make writes to the other ones survive failures."""
    for descriptor in (0, OUTPUT, ERROR):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: a new file gets the lowest free descriptor
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _safe(sys.stdout, OUTPUT)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _safe(sys.stderr, ERROR)


def output_is_no_result() -> None:
    """From here on only warn of failed writes to standard output: the script's results are files."""
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if isinstance(raw, _Stream):
        raw.is_result = False


def _safe(stream: Any, descriptor: int) -> TextIOWrapper:
    if stream is not None:
        stream.flush()
    raw, unbuffered = _Stream(descriptor), getattr(stream, "write_through", False)  # PYTHONUNBUFFERED
    return TextIOWrapper(
        raw if unbuffered else BufferedWriter(raw),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="replace" if descriptor == OUTPUT else "backslashreplace",
        line_buffering=descriptor == ERROR or getattr(stream, "line_buffering", False),
        write_through=unbuffered,
    )
