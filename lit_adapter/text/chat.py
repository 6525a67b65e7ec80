"""The base's own chat template, rendered once into plain text around a stand-in for the user's message.

The Jinja template comes with the base, so it runs in Jinja's sandbox and never sees what users write.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import cache, partial
from typing import NamedTuple, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lit_adapter.errors import UserError
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


def render_chat(tokenizer: Tokenizer) -> RenderedChat:
    """Render the tokenizer's chat template for one user message.

    Raises:
        UserError: there is no chat template, it fails, or it does not show message and answer once each.
    """
    if not tokenizer.chat_template:
        raise UserError("template 'chat': this base has no chat template; use alpaca or a text of your own")
    user = {"role": "user", "content": USER}
    prompt = _render(tokenizer, [user], prompt=True)
    before, found, after = prompt.partition(USER)
    if not found or USER in after:
        raise UserError(
            f"template 'chat': the base's template shows the user's message {prompt.count(USER)} times, "
            "not once; use alpaca or a text of your own"
        )
    padded = _render(tokenizer, [{"role": "user", "content": f"  {USER}  "}], prompt=True)
    whole = _render(tokenizer, [user, {"role": "assistant", "content": ANSWER}], prompt=False)
    until_answer, found, rest = whole.partition(ANSWER)
    if not found:
        raise UserError(
            "template 'chat': the base's template shows no answer; use alpaca or a text of your own"
        )
    gap = until_answer[len(prompt) :] if until_answer.startswith(prompt) else ""
    fitting = [token for token in tokenizer.control_tokens if rest.lstrip().startswith(token)]
    end = max(fitting, key=len, default=None)
    return RenderedChat(before, after, gap if gap == " " else "", end, prompt == padded)


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], *, prompt: bool) -> str:
    spelled = {id_: text for text, id_ in tokenizer.control_tokens.items()}
    try:
        template = _environment().from_string(tokenizer.chat_template or "")
        return template.render(
            messages=messages,
            add_generation_prompt=prompt,
            bos_token="" if tokenizer.bos_id is None else spelled.get(tokenizer.bos_id, ""),
            eos_token=spelled.get(tokenizer.eos_id, ""),
            tools=None,
            documents=None,
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"template 'chat': the base's chat template fails: {error}") from None


class _Generation(Extension):
    """The block ``{% generation %}``, with which transformers marks answers; only its content is kept."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that chat templates expect: transformers' settings and functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format_: datetime.now().strftime(format_)
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    return environment


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def control_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return a pattern that matches the longest control token in a template's text; None without any."""
    return _any_of(tuple(tokenizer.control_tokens))


@cache
def _any_of(spellings: tuple[str, ...]) -> re.Pattern[str] | None:
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if spellings else None
