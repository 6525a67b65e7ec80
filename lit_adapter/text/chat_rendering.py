"""Renders a base's chat template: Jinja's sandbox, in a process with limits (`limited`)."""

from __future__ import annotations

import json
from datetime import datetime
from functools import partial
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
    template = _environment().from_string(request["template"])
    return [template.render(**request["common"], **values) for values in request["conversations"]]


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
    environment.globals["strftime_now"] = datetime.now().strftime  # one time for all conversations
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    return environment


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


if __name__ == "__main__":
    serve(render)
