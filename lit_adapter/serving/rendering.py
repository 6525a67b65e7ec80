"""Messages become token ids, as the template of the adapter has them.

A chat template shows all turns. Any other template has room for one task: a system message becomes its
instruction and the last user message its input; without a system message, the last user message is the
instruction. Earlier turns are then not seen.

The base's chat template never sees what users write: it is rendered around stand-ins, once for each order of
roles, and control tokens in the users' own text stay text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from lit_adapter.errors import UserError
from lit_adapter.serving.errors import invalid
from lit_adapter.serving.protocol import Message
from lit_adapter.text.chat import render_conversation
from lit_adapter.text.template import INPUT, Template, encode_parts
from lit_adapter.text.tokenizer import Tokenizer

_STAND_IN = re.compile(r"LitAdapterTurn(\d+)Words")


def encode_messages(template: Template, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation, which an answer is to continue.

    Raises:
        ApiError: the template cannot show it.
        UserError: a text with half a surrogate pair.
    """
    roles = tuple("system" if message.role == "developer" else message.role for message in messages)
    if roles[-1] != "user":
        raise invalid("the last message must be the user's", f"messages[{len(roles) - 1}].role")
    texts = [message.text for message in messages]
    if template.kind != "chat":
        return template.encode_prompt(tokenizer, *_task(template, roles, texts))
    if roles == ("user",):
        return template.encode_prompt(tokenizer, texts[0])
    if template.trim:
        texts = [text.strip() for text in texts]
    pieces = _STAND_IN.split(_rendered(tokenizer, roles))
    if sorted(map(int, pieces[1::2])) != list(range(len(roles))):
        raise invalid("the base's chat template does not show each of these messages once", "messages")
    return encode_parts(
        [(texts[int(piece)], False) if place % 2 else (piece, True) for place, piece in enumerate(pieces)],
        tokenizer,
    )


@lru_cache(maxsize=1024)
def _rendered(tokenizer: Tokenizer, roles: tuple[str, ...]) -> str:
    messages = [
        {"role": role, "content": f"LitAdapterTurn{number}Words"} for number, role in enumerate(roles)
    ]
    try:
        return render_conversation(tokenizer, messages)
    except UserError as error:
        raise invalid(f"messages with the roles {', '.join(roles)}: {error}", "messages") from None


def _task(template: Template, roles: Sequence[str], texts: Sequence[str]) -> tuple[str, str]:
    """Return the instruction and the input that a template for one task is given."""
    system = "\n\n".join(text for role, text in zip(roles, texts, strict=True) if role == "system")
    if not system.strip():
        return texts[-1], ""
    return (system, texts[-1]) if INPUT in template.text else (f"{system}\n\n{texts[-1]}", "")
