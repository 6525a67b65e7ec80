"""Recognises the format of a record, and makes the record."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from lit_adapter.config import Columns
from lit_adapter.data.conversations import check_turns, messages_of, tools_of
from lit_adapter.data.record import Conversation
from lit_adapter.errors import UserError, shorten
from lit_adapter.text.conversation import Message

_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
SYSTEM = "system"
"""Where records of conversations may have the system prompt."""
REQUIRED = {
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The fields of `Columns` that each format must have. A record that fits several is read as the first."""


@dataclass(frozen=True)
class Recognised:
    """The format of a source."""

    name: str
    why: str
    """The reason, for the user."""
    sources: tuple[int, ...] = ()
    """The numbers of the sources, or of their files, that have it, if known (`each_once`)."""


def each_once(found: Iterable[tuple[int, Recognised]]) -> tuple[Recognised, ...]:
    """Return each of the formats once, with the numbers that it was found with."""
    numbers: dict[Recognised, dict[int, None]] = {}
    for number, known in found:
        numbers.setdefault(replace(known, sources=()), {})[number] = None
    return tuple(replace(known, sources=(*own,)) for known, own in numbers.items())


def recognise(values: Mapping[str, Any], columns: Columns, wanted: str = "auto") -> Recognised:
    """Return the format of a record; ``wanted`` is what the configuration says.

    A column that was given another name decides. A record that fits no format is treated as ``alpaca``, whose
    reader says what is missing.
    """
    if wanted != "auto":
        return Recognised(wanted, "as data.format says")
    named = [field.name for field in fields(columns) if getattr(columns, field.name) != field.default]
    for name, required in REQUIRED.items():
        own = (*required, *(("input",) if name == "alpaca" else ()))
        chosen = next((field for field in own if field in named), None)
        if chosen is not None:
            return Recognised(name, f"data.columns.{chosen} is given")
    name, *others = [name for name in REQUIRED if _has(values, columns, name)] or ["alpaca"]
    keys = " and ".join(shorten(getattr(columns, field)) for field in REQUIRED[name])
    why = f"its records have {keys}"
    if name == "prompt_completion" and has_messages(values, columns):
        why += ", lists of messages"
    if others:
        why += f"; {' or '.join(others)} could be read too, with data.format"
    known = {*wanted_columns(columns)}
    unused = [shorten(key) for key in values if key not in known] if name == "text" else []
    return Recognised(name, f"{why}; {', '.join(unused[:3])} not used" if unused else why)


def _has(values: Mapping[str, Any], columns: Columns, name: str) -> bool:
    return all(values.get(getattr(columns, field)) is not None for field in REQUIRED[name])


def check_same(values: Mapping[str, Any], columns: Columns, known: Recognised, where: str) -> None:
    """Refuse a record of another format than the others of its file.

    Raises:
        UserError: it lacks what its format requires, and has what another one does.
    """
    if all(getattr(columns, field) in values for field in REQUIRED[known.name]):
        return
    other = next((name for name in REQUIRED if _has(values, columns, name)), None)
    if other is not None:
        raise UserError(
            f"{where}: a record of format {other} in a file of format {known.name} ({known.why}); "
            "put the formats into files of their own"
        )


def conversation_of(
    values: Mapping[str, Any], columns: Columns, known: Recognised, option: str, *, file: str, line: int
) -> Conversation:
    """Return the conversation of a record in ``line`` of ``file``; ``option`` names the columns in messages.

    Raises:
        UserError: it is malformed; names file, line and turn.
    """
    where = f"{file}:{line}"
    parts = [_messages(values, columns, field, where, option) for field in REQUIRED[known.name]]
    messages = [message for part in parts for message in part]
    system = values.get(SYSTEM) if known.name != "prompt_completion" else None
    if isinstance(system, str) and system.strip() and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    check_turns(messages, where)
    tools = tools_of(values.get(columns.tools), columns.tools, where)
    return Conversation.of(messages, tools, file=file, line=line)


def _messages(
    values: Mapping[str, Any], columns: Columns, field: str, where: str, option: str
) -> list[Message]:
    """Return the messages of a field; answers within a prompt are not learned."""
    key = getattr(columns, field)
    if key not in values:
        found = ", ".join(map(shorten, [*values][:6])) or "none"
        raise UserError(
            f"{where}: key {shorten(key)} is missing (found: {found}); name the column that holds it with "
            f"{option}.{field}"
        )
    messages = messages_of(values[key], key, where)
    if field == "prompt":
        return [replace(message, learned=message.role != "assistant") for message in messages]
    return messages


def is_conversation(values: Mapping[str, Any], columns: Columns, known: Recognised) -> bool:
    """Whether a record becomes a conversation."""
    if known.name == "prompt_completion":
        return has_messages(values, columns)
    return known.name in ("messages", "conversations")


def has_messages(values: Mapping[str, Any], columns: Columns) -> bool:
    """Whether prompt or completion is a list, or a text that looks like a list of messages, as in CSV."""
    sides = values.get(columns.prompt), values.get(columns.completion)
    return any(isinstance(side, list) or (isinstance(side, str) and _MESSAGES.match(side)) for side in sides)


def wanted_columns(columns: Columns) -> list[str]:
    """Return the columns that some format reads."""
    return [*dict.fromkeys([*(getattr(columns, field.name) for field in fields(columns)), SYSTEM])]
