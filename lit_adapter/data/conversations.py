"""Reads conversations: OpenAI's ``messages``, ShareGPT's ``conversations``, and the usual names of both.

A message is an object with ``role`` and ``content``, or with ``from`` and ``value``. Malformed data is
refused with its file, line and turn; turns are counted from 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lit_adapter.data.strict_json import json_type, parse_json
from lit_adapter.errors import UserError, nearest, shorten
from lit_adapter.text.conversation import Message

NAMES_OF_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "instruction"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot", "bing", "bard", "function_call"),
    "tool": ("tool", "function", "observation", "function_response", "tool_response", "ipython"),
}
"""The names that data sets use, by ours; the last one of the assistant's announces a call."""
ROLE_OF = {name: role for role, names in NAMES_OF_ROLES.items() for name in names}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_MARKS = ("train", "weight")
MOST_NESTED = 100
"""Lists and objects within each other in a field of a message."""
MOST_CHARACTERS = 2**20
"""Most characters of a conversation. A longer one is hardly intended, and would take minutes to encode."""


def messages_of(value: Any, key: str, where: str) -> list[Message]:
    """Return the messages of a record's value.

    Args:
        value: a list of objects, or its JSON as a text (in CSV files).
        key: the value's name in the record, for messages.
        where: file and line, for messages.

    Raises:
        UserError: it is not a conversation, is empty, or a turn is malformed.
    """
    value = _parsed(value, key, where)
    if not isinstance(value, list):
        raise UserError(f"{where}: {shorten(key)} is {json_type(value)}; expected a list of messages")
    if not value:
        raise UserError(f"{where}: {shorten(key)} is empty; write messages, or remove the record")
    messages = [_message(item, f"{where}: turn {number}") for number, item in enumerate(value, start=1)]
    length = sum(len(json.dumps(message.to_dict())) for message in messages)
    if length > MOST_CHARACTERS:
        longest = max(range(len(messages)), key=lambda at: len(messages[at].content))
        raise UserError(
            f"{where}: turn {longest + 1}: the conversation has {length:,} characters, most of them here; "
            f"expected {MOST_CHARACTERS:,} or fewer"
        )
    return messages


def tools_of(value: Any, key: str, where: str) -> list[Any]:
    """Return the tools of a record: objects as in OpenAI's ``tools``, or their JSON as a text."""
    value = None if value == "" else _parsed(value, key, where)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise UserError(f"{where}: {shorten(key)} is {json_type(value)}; expected a list of objects")
    return [_checked(dict(item), where, key) for item in value]


def check_turns(messages: Sequence[Message], where: str) -> None:
    """Refuse a conversation whose turns cannot follow each other.

    Raises:
        UserError: two answers in a row, a tool's result that was not asked for, or no answer at all.
    """
    called: set[str] = set()
    before = ""
    for number, message in enumerate(messages, start=1):
        turn = f"{where}: turn {number}"
        if message.role == "assistant":
            if before == "assistant":
                raise UserError(f"{turn}: two assistant turns in a row; join them, or add the turn between")
            called = {str(call.get("id")) for call in message.more.get("tool_calls", ())}
        elif message.role == "tool" and before not in ("assistant", "tool"):
            raise UserError(f"{turn}: a tool's result without a call before it; add the assistant's call")
        elif message.role == "tool":
            id_ = message.more.get("tool_call_id")
            if id_ is not None and str(id_) not in called:
                raise UserError(
                    f"{turn}: a tool's result for call {shorten(id_)}, which was not made before it"
                )
        before = message.role
    if not any(message.role == "assistant" for message in messages):
        raise UserError(f"{where}: no assistant turn, so there is nothing to learn; add the answer")


def _message(item: Any, turn: str) -> Message:
    if not isinstance(item, Mapping):
        raise UserError(f"{turn}: is {json_type(item)}; expected an object with role and content")
    item = {key: value for key, value in item.items() if value is not None}
    role_key = next((key for key in _ROLE_KEYS if key in item), None)
    if role_key is None:
        raise UserError(f"{turn}: has no role (found: {', '.join(map(shorten, item)) or 'nothing'})")
    given = item[role_key]
    name = given.lower() if isinstance(given, str) else given
    if not isinstance(name, str) or name not in ROLE_OF:
        hint = nearest(name, list(ROLE_OF)) if isinstance(name, str) else ""
        expected = "; expected system, user, assistant or tool"
        raise UserError(f"{turn}: the role is {shorten(given)}{hint or expected}")
    taken = {*_ROLE_KEYS, *_CONTENT_KEYS, *_MARKS, "function_call", "tool_calls"}
    more = {key: _checked(value, turn, key) for key, value in item.items() if key not in taken}
    _checked([*more], turn, "a key")
    role, calls = ROLE_OF[name], _calls(item, name, turn)
    content = "" if name == "function_call" else _content(item, turn, may_lack=bool(calls))
    if calls:
        more["tool_calls"] = _checked(calls, turn, "tool_calls")
    is_answer = role != "assistant" or bool(content.strip() or calls)
    return Message(role, content, is_answer and _is_learned(item, turn), more)


def _content(item: Mapping[str, Any], turn: str, *, may_lack: bool) -> str:
    """Return a message's text; parts of text are joined."""
    key = next((key for key in _CONTENT_KEYS if key in item), None)
    if key is None:
        if may_lack:
            return ""
        raise UserError(f"{turn}: has no content, or null; write a text, or remove the turn")
    value = item[key]
    if isinstance(value, list):
        value = "".join(_part(part, turn) for part in value)
    if not isinstance(value, str):
        raise UserError(f"{turn}: {shorten(key)} is {json_type(value)}; expected a string")
    checked: str = _checked(value, turn, key)
    return checked


def _part(part: Any, turn: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else json_type(part)
    if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
        raise UserError(f"{turn}: a part of the content is of type {shorten(kind)}; expected parts of text")
    text: str = part["text"]
    return text


def _calls(item: Mapping[str, Any], name: str, turn: str) -> list[dict[str, Any]]:
    """Return the calls of a message, with arguments as objects, as templates expect them."""
    if name == "function_call":
        value = next((item[key] for key in _CONTENT_KEYS if key in item), None)
        calls: Any = _parsed(value, "the call", turn)
        calls = calls if isinstance(calls, list) else [calls]
    elif "function_call" in item:
        calls = [item["function_call"]]
    else:
        calls = _parsed(item.get("tool_calls"), "tool_calls", turn) or []
    if not isinstance(calls, list):
        raise UserError(f"{turn}: tool_calls is {json_type(calls)}; expected a list of calls")
    return [_call(call, turn) for call in calls]


def _call(call: Any, turn: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{turn}: a tool call has no function with a name")
    arguments = _parsed(function.get("arguments"), "arguments", turn)
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise UserError(f"{turn}: the arguments of {shorten(function['name'])} are not a JSON object")
    outer = {"type": "function"} | (
        dict(call) if "function" in call else {key: call[key] for key in ("id",) if key in call}
    )
    return outer | {"function": {"name": function["name"], "arguments": arguments}}


def _is_learned(item: Mapping[str, Any], turn: str) -> bool:
    """Return what the marks ``train`` and ``weight`` say; a message without them is learned."""
    for key in _MARKS:
        if key in item and item[key] not in (0, 1):
            allowed = "true or false" if key == "train" else "0 or 1"
            raise UserError(f"{turn}: {key} is {shorten(item[key])}; expected {allowed}")
    return all(bool(item.get(key, True)) for key in _MARKS)


def _parsed(value: Any, key: str, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise UserError(f"{where}: {shorten(key)} is a text that is not JSON: {error}") from None


def _checked(value: Any, turn: str, key: str) -> Any:
    """Return a value of JSON whose texts are Unicode."""
    if _depth(value) > MOST_NESTED:
        raise UserError(f"{turn}: {shorten(key)} is nested more than {MOST_NESTED} deep")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{turn}: {shorten(key)} has half of a character (a lone surrogate); remove it"
        ) from None
    except TypeError as error:
        raise UserError(f"{turn}: {shorten(key)} is not a JSON value: {error}") from None
    return value


def _depth(value: Any) -> int:
    """Return how deep lists and objects are nested in a value."""
    depth, level = 0, [value]
    while level:
        depth += 1
        holders = [one for one in level if isinstance(one, Mapping | list | tuple)]
        level = [item for one in holders for item in (one.values() if isinstance(one, Mapping) else one)]
    return depth
