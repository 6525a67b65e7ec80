"""``answers.jsonl``, ``tasks.jsonl``, ``plain.jsonl``: every model's values, so that a killed run continues.

The first line says what the values depend on. Each other line is a JSON object with ``model``, the number of
a ``record``, ``task`` or ``text`` (from 0) and values of that pair; later lines add to earlier ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError
from lit_adapter.files.read import reading
from lit_adapter.files.write import append_bytes, write_bytes

FORMAT = 1
Pair = tuple[str, int]
"""A model's name and the number of a record, task or text."""


class AnswerFile:
    """The values so far, by model and record, task or text.

    Args:
        path: the file; its folder is made.
        identity: everything that the values depend on, as JSON values by name.
        overwrite: discard the values of another run.
        item: what is numbered.
        renew: discard the values of another run, but refuse a file of another kind.

    Raises:
        UserError: the file is damaged, or of another run; names what differs.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        *,
        overwrite: bool,
        item: str = "record",
        renew: bool = False,
    ) -> None:
        self.path, self._item = path, item
        self._header = {"format": FORMAT, "identity": json.loads(json.dumps(identity))}
        self.values: dict[Pair, dict[str, Any]] = {}
        self._read(overwrite=overwrite, renew=renew)
        self.rewrite()  # a line cut short by a kill is gone before another one follows it

    def _read(self, *, overwrite: bool, renew: bool) -> None:
        with reading(self.path):
            try:
                content = self.path.read_bytes()
            except FileNotFoundError:
                return
        header, *lines = content.split(b"\n")[:-1] or [b""]
        theirs, ours = _identity(header), self._header["identity"]
        if theirs != ours:
            if overwrite or (renew and theirs is not None):
                return
            raise UserError(
                f"{self.path}: answers of another run ({_difference(theirs, ours)}); choose another --out, "
                "or start again with --overwrite"
            )
        for number, line in enumerate(lines, 2):
            try:
                row = json.loads(line)
                pair = str(row.pop("model")), int(row.pop(self._item))
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                raise UserError(
                    f"{self.path}:{number}: not a line of an evaluation; delete this file"
                ) from None
            self.values.setdefault(pair, {}).update(row)

    def append(self, rows: Iterable[tuple[Pair, dict[str, Any]]]) -> None:
        """Add values, and sync them to the disk before anything else is computed.

        Raises:
            UserError: the file cannot be written.
        """
        rows = list(rows)
        for pair, row in rows:
            self.values.setdefault(pair, {}).update(row)
        append_bytes(self.path, b"".join(self._line(pair, row) for pair, row in rows))

    def rewrite(self) -> None:
        """Write the file anew, one line for each pair, in the order of their numbers."""
        pairs = sorted(self.values, key=lambda pair: pair[1])
        lines = [self._line(pair, self.values[pair]) for pair in pairs]
        write_bytes(self.path, json.dumps(self._header).encode() + b"\n" + b"".join(lines))

    def _line(self, pair: Pair, row: Mapping[str, Any]) -> bytes:
        text = json.dumps({"model": pair[0], self._item: pair[1], **row}, ensure_ascii=False)
        return text.encode(errors="backslashreplace") + b"\n"


def _identity(header: bytes) -> dict[str, Any] | None:
    """Return what the values of a file with this first line depend on; None if it does not say so."""
    try:
        found = json.loads(header)
    except (ValueError, RecursionError):
        return None
    identity = found.get("identity") if isinstance(found, dict) else None
    return identity if isinstance(identity, dict) else None


def _difference(theirs: dict[str, Any] | None, ours: dict[str, Any]) -> str:
    """Return what differs between two runs."""
    if theirs is None:
        return "no identity in its first line"
    return "other " + ", ".join(name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name))
