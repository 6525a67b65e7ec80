"""Conversations of any roles in a base's chat template, without a process for each of them.

A template's text around the messages depends on their roles, hardly ever on what they say. It is rendered
once for each sequence of roles, around stand-ins, and the messages then take their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from lit_adapter.errors import UserError
from lit_adapter.text.chat import render_conversations
from lit_adapter.text.tokenizer import Tokenizer

STAND_IN = "LitAdapterWords{}End"
"""No template contains these words."""


class ChatTemplate:
    """A base's chat template, for conversations of any roles.

    Raises:
        UserError: the base has none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise UserError("this base has no chat template; leave --chat_template out")
        self._tokenizer, self._source = tokenizer, tokenizer.chat_template
        self._forms = cache(self._form)

    def render(self, messages: Sequence[dict[str, str]], *, asks: bool) -> str:
        """Return a conversation's text; with ``asks``, up to where the next answer begins.

        Without ``asks`` the last message is one that an answer continues: the text ends with it.

        Raises:
            UserError: the template fails, or does not show every message once.
        """
        pieces, trims = self._forms(tuple(message["role"] for message in messages), asks)
        contents = [message["content"] for message in messages]
        if trims:
            contents = [content.strip() for content in contents]
        woven = [text for pair in zip(pieces, contents, strict=False) for text in pair]
        return "".join([*woven, pieces[-1]] if asks else woven)

    def _form(self, roles: tuple[str, ...], asks: bool) -> tuple[list[str], bool]:
        """Return the text before, between and after messages, and whether the template strips them."""
        words = [STAND_IN.format(number) for number in range(len(roles))]
        conversations = [
            ([{"role": r, "content": text.format(w)} for r, w in zip(roles, words, strict=True)], asks)
            for text in ("{}", "  {}  ")
        ]
        plain, padded = render_conversations(self._tokenizer, self._source, "chat", None, conversations)
        pieces, rest = [], plain
        for word in words:
            before, found, rest = rest.partition(word)
            if not found or word in rest:
                raise UserError(
                    f"the base's chat template does not show the messages {', '.join(roles)} once each"
                )
            pieces.append(before)
        return [*pieces, rest], plain == padded
