"""Prompts in, from a file or standard input, a file of answers out; a killed run continues where it stopped.

Finished answers are appended to ``.NAME.partial`` in the output's folder, in the order of the prompts, and
synced group by group. The first line of that file says which prompts and settings they belong to.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lit_adapter.config import Columns
from lit_adapter.data.conversations import messages_of, tools_of
from lit_adapter.data.formats import SUFFIXES, check_no_columns, rows_of, rows_of_input
from lit_adapter.data.strict_json import Row
from lit_adapter.data.tasks import DEFAULT_COLUMNS, tasks_of
from lit_adapter.errors import UserError, shorten
from lit_adapter.files.locks import one_at_a_time
from lit_adapter.files.paths import write_target
from lit_adapter.files.read import reading
from lit_adapter.files.write import append_bytes, write_bytes
from lit_adapter.text.conversation import Message

BATCHES_PER_GROUP = 4
"""More leaves fewer slots idle at the end of a group, and loses more answers when the run is killed."""
OTHER_SUFFIXES = {*SUFFIXES, ".txt"} - {".jsonl", ".ndjson"}
"""Suffixes of formats in which answers are not written."""
STANDARD_INPUT = Path("-")


@dataclass(frozen=True)
class Prompt:
    """One task of the file, or a conversation that is to be answered."""

    instruction: str
    input: str
    origin: str
    """``file:line``, for messages."""
    row: Mapping[str, Any]
    """The first columns of the answer's row: those of the file, without those of answers."""
    messages: Sequence[Message] = ()
    """The messages of a conversation, which has them instead of instruction and input."""
    tools: Sequence[Mapping[str, Any]] = ()
    """What the assistant of a conversation may call."""

    def line(self, answer: Mapping[str, Any]) -> bytes:
        """Return the output file's line with the columns of the answer."""
        text = json.dumps({**self.row, **answer}, ensure_ascii=False)
        # A lone surrogate, which only other columns can have, becomes JSON's own escape.
        return text.encode(errors="backslashreplace") + b"\n"


def read_prompts(
    path: Path, columns: Columns = DEFAULT_COLUMNS, answer_columns: Sequence[str] = (DEFAULT_COLUMNS.output,)
) -> list[Prompt]:
    """Read the prompts of a data file, a ``.txt`` file (instructions, a line each) or standard input (``-``).

    The first record tells whether they are tasks or conversations. A conversation is answered after its last
    message that is not the assistant's.

    ``answer_columns`` of the file are left out: the answers take their place.

    Raises:
        UserError: the file is unreadable or malformed, or a record is neither; names file and line.
    """
    name = "standard input" if path == STANDARD_INPUT else str(path)
    if path == STANDARD_INPUT:
        rows = _standard_input(columns)
    else:
        rows = rows_of(path, name, plain_text=True)
        if path.suffix.lower() == ".txt":
            check_no_columns(columns, name)
    replaced = set(answer_columns) - {columns.instruction, columns.input}

    def kept(values: Mapping[str, Any]) -> Any:
        return _plain({key: value for key, value in values.items() if key not in replaced})

    first = next(rows := iter(rows), None)
    if first is None:
        raise UserError(f'{name}: no record; expected objects such as {{"instruction": ..., "input": ...}}')
    rows, key = chain([first], rows), _conversations_in(first[1], columns)
    if key is None:
        tasks = tasks_of(rows, columns, name, "--columns")
        return [Prompt(task, input, f"{name}:{line}", kept(row)) for line, row, task, input in tasks]
    prompts = []
    for line, values in rows:
        where = f"{name}:{line}"
        messages = _asked(values.get(key), key, where)
        tools = tools_of(values.get(columns.tools), "tools", where)
        prompts.append(Prompt("", "", where, kept(values), messages, tools))
    return prompts


def _conversations_in(values: Mapping[str, Any], columns: Columns) -> str | None:
    """Return the column that has conversations; None in a file of tasks."""
    if columns.instruction in values:
        return None
    return next((key for key in (columns.messages, columns.conversations) if key in values), None)


def _asked(value: Any, key: str, where: str) -> list[Message]:
    """Return a conversation without the answers at its end."""
    messages = messages_of(value, key, where)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not messages:
        raise UserError(f"{where}: {shorten(key)} has no message to answer; add the user's")
    return messages


def _standard_input(columns: Columns) -> Iterator[Row]:
    content = b"" if sys.stdin is None else sys.stdin.buffer.read()
    if not content.strip():
        raise UserError(
            "standard input is empty; expected prompts: plain text, CSV, JSON Lines or a JSON array"
        )
    return rows_of_input(content, columns)


def _plain(values: Mapping[str, Any]) -> Any:
    """Return values as JSON has them: dates, bytes, NaN and others of Parquet become text."""
    return json.loads(json.dumps(values, default=str), parse_constant=str)


def _digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value; the order of its keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_of(prompts: Iterable[Prompt]) -> str:
    return hashlib.sha256(b"".join(prompt.line({}) for prompt in prompts)).hexdigest()


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def earlier_dtype(out: Path, prompts: Sequence[Prompt], device: str) -> str | None:
    """Return the precision of an unfinished run of these prompts on this kind of device, or None.

    A precision chosen by timing might otherwise differ from run to run.
    """
    try:
        with _partial(out).open("rb") as stream:
            found = json.loads(stream.readline())
    except (OSError, ValueError, RecursionError):
        return None  # there is none, or `Answers` will say what is wrong with it
    if not isinstance(found, dict) or found.get("prompts") != _digest_of(prompts):
        return None
    dtype = found.get("dtype")
    return dtype.removeprefix("torch.") if found.get("device") == device and isinstance(dtype, str) else None


def check_target(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that is in the way.

    Raises:
        UserError: its suffix is another format's; it is a folder, a pipe or device, or a file that must not
            be replaced; or the path of the unfinished run is not a regular file.
    """
    if out.suffix.lower() in OTHER_SUFFIXES:
        raise UserError(f"{out}: answers are written as JSON Lines; name an --output that ends in .jsonl")
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a file to write")
    write_target(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out}: already there; choose another --output, or replace it with --overwrite")
    partial = _partial(out)
    with reading(partial):
        if partial.exists() and not partial.is_file():  # reading a pipe would wait forever
            raise UserError(f"{partial}: not a regular file; remove it, or choose another --output")


class Answers:
    """The answers so far, kept in a file of their own until the output is complete.

    Args:
        out: the file to write.
        prompts: of the whole run.
        settings: everything else that the answers depend on, as JSON values by name.
        group: prompts answered, written and synced together. A group always starts at a multiple of this
            number, so a resumed run repeats the batches, and with them the rounding, of an uninterrupted one.
        overwrite: replace ``out``, and discard an unfinished run of other prompts or settings.

    Raises:
        UserError: ``out`` must not be replaced, or the unfinished run is a different one or damaged.
    """

    def __init__(
        self,
        out: Path,
        prompts: Sequence[Prompt],
        settings: Mapping[str, Any],
        *,
        group: int,
        overwrite: bool,
    ) -> None:
        self.out, self.prompts, self.group = Path(out), prompts, group
        self.path = _partial(self.out)
        check_target(self.out, overwrite=overwrite)
        self.header = {
            "prompts": _digest_of(prompts),
            "settings": _digest(settings),
            **{key: settings[key] for key in ("dtype", "device") if key in settings},
        }
        self.lines = self._read(keep_other=not overwrite)
        """The finished answers, those of the first prompts."""
        if len(self.lines) < len(prompts):
            del self.lines[len(self.lines) // group * group :]

    def run(self, answer: Callable[[Sequence[Prompt]], Iterable[Mapping[str, Any]]]) -> None:
        """Answer the remaining prompts, group by group, and write the output.

        ``answer`` returns the columns of each prompt's answer.

        Raises:
            UserError: a file cannot be written, or another run is writing it.
        KeyboardInterrupt: says how many answers are kept.
        """
        with one_at_a_time(self.out, wait=False, option="--output"):
            # Rewritten, so that a line cut short by a kill is gone before another line follows it.
            write_bytes(self.path, json.dumps(self.header).encode() + b"\n" + b"".join(self.lines))
            try:
                while len(self.lines) < len(self.prompts):
                    part = self.prompts[len(self.lines) :][: self.group]
                    lines = [prompt.line(found) for prompt, found in zip(part, answer(part), strict=True)]
                    append_bytes(self.path, b"".join(lines))
                    self.lines += lines
            except KeyboardInterrupt:
                kept = f"{len(self.lines)} of {len(self.prompts)} answers are kept"
                raise KeyboardInterrupt(f"interrupted: {kept}; the same command continues") from None
            if self._read(keep_other=True) != self.lines:
                raise UserError(f"{self.path}: changed by another run meanwhile; run again, one at a time")
            write_bytes(self.out, b"".join(self.lines))
            self.path.unlink(missing_ok=True)

    def _read(self, *, keep_other: bool) -> list[bytes]:
        """Return the complete lines of an unfinished run of these prompts and settings."""
        with reading(self.path):
            try:
                content = self.path.read_bytes()
            except FileNotFoundError:
                return []
        if b"\n" not in content:
            return []  # not even the first line is complete: there is nothing to lose
        header, *lines = content.split(b"\n")[:-1]  # what follows the last line feed was cut short
        other = self._difference(header)
        if other and not keep_other:
            return []
        if other:
            raise UserError(
                f"{self.path}: an unfinished run with {other}; run it with those, "
                "choose another --output, or start again with --overwrite"
            )
        # There are fewer lines than prompts if the run stopped midway.
        for number, (prompt, line) in enumerate(zip(self.prompts, lines, strict=False)):
            if not _answers(prompt, line):
                raise UserError(
                    f"{self.path}:{number + 2}: not the answer to {prompt.origin}; delete this file"
                )
        return [line + b"\n" for line in lines[: len(self.prompts)]]

    def _difference(self, header: bytes) -> str:
        """Return what differs between this run and the one of ``header``; empty if nothing does."""
        try:
            found = json.loads(header)
        except (ValueError, RecursionError):
            return "a damaged first line"
        if not isinstance(found, dict) or found.get("prompts") != self.header["prompts"]:
            return "other prompts"
        return "other settings" if found.get("settings") != self.header["settings"] else ""


def _answers(prompt: Prompt, line: bytes) -> bool:
    """Whether ``line`` is one that `Prompt.line` writes for some answer."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return line.startswith(prompt.line({}).removesuffix(b"}\n") + b", ")
