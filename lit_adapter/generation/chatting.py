"""Conversations as Python callers give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lit_adapter import arguments
from lit_adapter.data.conversations import messages_of, tools_of
from lit_adapter.errors import UserError, WrongTypeError
from lit_adapter.text.conversation import Message, encode_prompt
from lit_adapter.text.template import Template
from lit_adapter.text.tokenizer import Tokenizer

Said = Message | Mapping[str, Any]
"""A message, or an object with role and content as in OpenAI's interface."""


def as_messages(given: Iterable[Said], name: str = "messages") -> list[Message]:
    """Return the messages of a conversation that is to be answered.

    Raises:
        WrongTypeError: it is not a list of messages.
        UserError: it is empty, a message is malformed, or the last one is the assistant's.
    """
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise WrongTypeError(f"{name} is of type {type(given).__name__}; expected a list of messages")
    given = list(given)
    if not given:
        raise UserError(f"{name} is empty; give at least one message")
    said = [one.to_dict() if isinstance(one, Message) else one for one in given]
    messages = messages_of(said, name, name)
    if messages[-1].role == "assistant":
        raise UserError(f"{name} ends with the assistant's message; end with what is to be answered")
    return messages


def prompt_of(
    tokenizer: Tokenizer,
    template: Template,
    messages: Iterable[Said],
    tools: Sequence[Mapping[str, Any]] | None = None,
    name: str = "messages",
) -> list[int]:
    """Return the token ids of a conversation that is to be answered.

    Raises:
        UserError: as `as_messages`; ``tools`` is not a list of objects (a TypeError too); the template cannot
            render it.
    """
    arguments.of_kind("tools", tools, (list, tuple, type(None)), "a list of objects, or None")
    given = tools_of(list(tools or ()), "tools", name)
    return encode_prompt(tokenizer, template, as_messages(messages, name), given)
