"""A chat template, rendered once into plain text around a stand-in for the user's message.

The Jinja template mostly comes with the base, so it runs in Jinja's sandbox, in a process with limits
(`limited`), and never sees what users write. Conversations of several turns are rendered by `conversation`.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

from lit_adapter.errors import UserError
from lit_adapter.text.limited import LimitedError, ask
from lit_adapter.text.tokenizer import Tokenizer

USER, ANSWER = "LitAdapterUserWords", "LitAdapterAnswerWords"
"""Stand-ins for message and answer; no template contains these words."""


class RenderedChat(NamedTuple):
    """The text before and after a user's message, and the end, lead and trim of its `Template`."""

    before: str
    after: str
    lead: str
    end: str | None
    trim: bool


def render_chat(tokenizer: Tokenizer, source: str, name: str, date: str | None = None) -> RenderedChat:
    """Render a chat template for one user message.

    Args:
        tokenizer: spells BOS and EOS.
        source: Jinja.
        name: of the template, for messages.
        date: the day that it may show (ISO); None for today.

    Raises:
        UserError: the template fails, or does not show message and answer once each.
    """
    user = {"role": "user", "content": USER}
    padded_user = {"role": "user", "content": f"  {USER}  "}
    answer = {"role": "assistant", "content": ANSWER}
    conversations = [([user], True), ([padded_user], True), ([user, answer], False)]
    prompt, padded, whole = render_conversations(tokenizer, source, name, date, conversations)
    before, found, after = prompt.partition(USER)
    if not found or USER in after:
        raise UserError(
            f"template '{name}' shows the user's message {prompt.count(USER)} times, "
            "not once; use alpaca or a text of your own"
        )
    until_answer, found, rest = whole.partition(ANSWER)
    if not found:
        raise UserError(f"template '{name}' shows no answer; use alpaca or a text of your own")
    gap = until_answer[len(prompt) :] if until_answer.startswith(prompt) else ""
    fitting = [token for token in tokenizer.control_tokens if rest.lstrip().startswith(token)]
    end = max(fitting, key=len, default=None)
    return RenderedChat(before, after, gap if gap == " " else "", end, prompt == padded)


def render_conversations(
    tokenizer: Tokenizer,
    source: str,
    name: str,
    date: str | None,
    conversations: list[tuple[list[dict[str, str]], bool]],
) -> list[str]:
    """Return the text of every conversation; the flag says whether a prompt for an answer ends it."""
    request = {
        "template": source,
        "date": date,
        "conversations": [
            {"messages": said, "add_generation_prompt": prompt} for said, prompt in conversations
        ],
        "common": common_values(tokenizer) | {"tools": None},
    }
    try:
        texts: list[str] = ask("lit_adapter.text.chat_rendering", request)
    except LimitedError as error:
        raise UserError(f"template '{name}': the chat template fails: {error}") from None
    return texts


def common_values(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what every chat template is given besides messages and tools."""
    return {
        "bos_token": tokenizer.spelling(tokenizer.bos_id),
        "eos_token": tokenizer.spelling(tokenizer.eos_id),
        "documents": None,
    }


def control_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return a pattern that matches the longest control token in a template's text; None without any."""
    return _any_of(tuple(tokenizer.control_tokens))


@cache
def _any_of(spellings: tuple[str, ...]) -> re.Pattern[str] | None:
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if spellings else None
