"""A file of prompts in, a file of answers out; a run that was killed goes on where it stopped.

Finished answers are appended to ``.NAME.partial`` beside the output, in the order of the prompts, and
synced group by group. Its first line says which prompts and settings they belong to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lit_adapter import files
from lit_adapter.data.formats import READERS, check_regular, json_type, shorten
from lit_adapter.data.records import check_unicode
from lit_adapter.errors import UserError, nearest

GROUPS_OF = 4
"""Answers synced together, in batches: more leaves fewer slots idle at a group's end, and loses more."""


@dataclass(frozen=True)
class Prompt:
    """One task of the file."""

    instruction: str
    input: str
    origin: str
    """``file:line``, for messages."""

    def line(self, output: str) -> bytes:
        """Return the output file's line."""
        record = {"instruction": self.instruction, "input": self.input, "output": output}
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def read_prompts(path: Path) -> list[Prompt]:
    """Read the tasks of a JSONL, JSON, CSV or Parquet file; an output that stands there is ignored.

    Raises:
        UserError: not a readable file, malformed, or a record that is no task; names file and line.
    """
    name = str(path)
    check_regular(path, name)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{name}: its suffix names no format read here; expected {', '.join(READERS)}")
    prompts = [_prompt(values, f"{name}:{line}") for line, values in reader(path, name, ("instruction", "input"))]
    if not prompts:
        raise UserError(f'{name}: no record; expected objects such as {{"instruction": ..., "input": ...}}')
    return prompts


def _prompt(values: Mapping[str, Any], origin: str) -> Prompt:
    if "instruction" not in values:
        present = list(values)
        found = ", ".join(map(shorten, present[:6])) or "none"
        hint = nearest("instruction", present)
        raise UserError(f"{origin}: key 'instruction' is missing (found: {found}){hint or '; add it'}")
    texts = {"instruction": values["instruction"], "input": values.get("input")}
    if texts["input"] is None:  # absent, null and empty all mean "no input", as in training data
        texts["input"] = ""
    name, _, line = origin.rpartition(":")
    for key, value in texts.items():
        if not isinstance(value, str):
            raise UserError(f"{origin}: {key!r} is {json_type(value)}; expected a string")
        check_unicode(value, key, name, int(line))
    if not texts["instruction"].strip():
        raise UserError(f"{origin}: 'instruction' is empty; write the task, or remove the record")
    return Prompt(texts["instruction"], texts["input"], origin)


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Answers:
    """The answers so far, kept beside the output until it is whole.

    Args:
        out: the file to make.
        prompts: of the whole run.
        settings: everything else that the answers depend on, as a JSON value.
        overwrite: replace ``out``, and leave aside an unfinished run of other prompts or settings.

    Raises:
        UserError: ``out`` is in the way, or the unfinished run is another one or damaged.
    """

    def __init__(self, out: Path, prompts: Sequence[Prompt], settings: Any, *, overwrite: bool) -> None:
        self.out, self.prompts = Path(out), prompts
        self.path = self.out.with_name(f".{self.out.name}.partial")
        if self.out.is_dir():
            raise UserError(f"{out}: is a folder; name a file to write")
        if self.out.exists() and not overwrite:
            raise UserError(f"{out}: already there; choose another --output, or replace it with --overwrite")
        self.header = {
            "prompts": digest([[prompt.instruction, prompt.input] for prompt in prompts]),
            "settings": digest(settings),
        }
        found = self._read()
        if found is not None and overwrite and self._other(found[0]):
            found = None
        self.lines: list[bytes] = [] if found is None else self._checked(*found)

    @property
    def n_done(self) -> int:
        """How many prompts, from the first on, have their answer."""
        return len(self.lines)

    def run(self, group: int, answer: Callable[[Sequence[Prompt]], Iterable[str]]) -> None:
        """Answer what is left, ``group`` prompts at a time, and write the output.

        A group always starts at a multiple of ``group``, so a resumed run repeats the batches, and with
        them the roundings, of a run that was never stopped.

        Raises:
            UserError: a file that cannot be written.
        """
        del self.lines[len(self.lines) // group * group if self.n_done < len(self.prompts) else self.n_done :]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("r+b" if self.path.exists() else "w+b") as stream:
                stream.truncate()
                self._append(stream, [json.dumps(self.header).encode() + b"\n", *self.lines])
                stream.truncate()
                files.sync_folder(self.path.parent)
                while self.n_done < len(self.prompts):
                    part = self.prompts[self.n_done : self.n_done + group]
                    lines = [prompt.line(text) for prompt, text in zip(part, answer(part), strict=True)]
                    self._append(stream, lines)
                    self.lines += lines
        except OSError as error:
            raise files.write_error(self.path, error) from error
        files.write_bytes(self.out, b"".join(self.lines))
        self.path.unlink(missing_ok=True)

    @staticmethod
    def _append(stream: BinaryIO, lines: Iterable[bytes]) -> None:
        stream.write(b"".join(lines))
        stream.flush()
        os.fsync(stream.fileno())
