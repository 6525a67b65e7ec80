"""Renders a base's chat template: Jinja's sandbox, in a process with limits (`limited`)."""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lit_adapter.text.limited import serve


def render(request: dict[str, Any]) -> list[str]:
    """Return the text of each of a request's conversations.

    ``template`` is Jinja; each of ``conversations`` holds the values that differ, ``common`` the others.
    """
    template = _compiled(request["template"], request.get("date"))
    return [template.render(**request["common"], **values) for values in request["conversations"]]


def render_growing(request: dict[str, Any]) -> dict[str, Any]:
    """Return the text of a conversation, and how much of it its beginnings have in common with it.

    Each of ``starts`` is a number of messages, and whether a prompt for an answer follows them. For each,
    ``lengths`` holds the length of its text if the whole text begins with that, and otherwise None. If the
    template fails, ``failed`` is the number of messages that it was given, and ``why`` its message.
    """
    template, messages = _compiled(request["template"], request.get("date")), request["messages"]
    found: dict[str, Any] = {"lengths": []}
    for number, prompt in ([len(messages), request["prompt"]], *request["starts"]):
        try:
            text = template.render(
                **request["common"], messages=messages[:number], add_generation_prompt=prompt
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            return {"failed": number, "why": f"{error}"[:500] or type(error).__name__}
        if "text" not in found:
            found["text"] = text
        else:
            found["lengths"].append(len(text) if found["text"].startswith(text) else None)
    return found


def answer(request: dict[str, Any]) -> Any:
    """Do what is asked: render conversations, or one as it grows."""
    return render_growing(request) if "messages" in request else render(request)


@cache
def _compiled(source: str, date: str | None) -> jinja2.Template:
    return _environment(date).from_string(source)


class _Generation(Extension):
    """The block ``{% generation %}``, with which transformers marks answers; only its content is kept."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(date: str | None) -> ImmutableSandboxedEnvironment:
    """Return the environment that chat templates expect: transformers' settings and functions.

    ``date`` (ISO) is the one that templates may show; None for today's.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = _raise
    now = datetime.now() if date is None else datetime.fromisoformat(date)
    environment.globals["strftime_now"] = now.strftime  # one time for all conversations
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Return JSON like transformers' filter of this name: without ASCII or HTML escapes."""
    return json.dumps(value, indent=indent, **{"ensure_ascii": False, **options})


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


if __name__ == "__main__":
    serve(answer)
