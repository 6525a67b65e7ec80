"""Messages become token ids, by the template of the adapter.

Templates for one task have an instruction and an input. A system message and one user message become these
two; a user message alone is the instruction. All other conversations are rendered turn by turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from lit_adapter.errors import UserError
from lit_adapter.generation.chatting import prompt_of
from lit_adapter.serving.errors import invalid
from lit_adapter.serving.protocol import Message
from lit_adapter.text.template import CHATS, INPUT, Template
from lit_adapter.text.tokenizer import Tokenizer


def encode_messages(template: Template, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation, which an answer is to continue.

    Raises:
        ApiError: the template cannot show it, or a text has half a surrogate pair.
    """
    roles = ["system" if message.role == "developer" else message.role for message in messages]
    texts = [message.text for message in messages]
    if roles[-1] != "user":
        raise invalid("the last message must be the user's", f"messages[{len(roles) - 1}].role")
    try:
        if template.kind not in CHATS and roles in (["user"], ["system", "user"]):
            return template.encode_prompt(tokenizer, *_task(template, texts))
        said = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        return prompt_of(tokenizer, template, said)
    except UserError as error:
        raise invalid(str(error), "messages") from None


def _task(template: Template, texts: Sequence[str]) -> tuple[str, str]:
    """Return the instruction and the input of one or two messages."""
    if len(texts) == 1 or not texts[0].strip():
        return texts[-1], ""
    system, user = texts
    return (system, user) if INPUT in template.text else (f"{system}\n\n{user}", "")
