"""A prompt template in the languages of other programs: Jinja for chat templates, Go's for Ollama.

Both show messages as the server and a run do: under a template for tasks, a user message alone is the
instruction, a system message and one user message are instruction and input, and other conversations have the
form in which a run learns them.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from string import Template as Sources

from lit_adapter.errors import UserError
from lit_adapter.text.template import CHATS, FIELD, INPUT, INSTRUCTION, Template
from lit_adapter.text.tokenizer import Tokenizer

NOW = re.compile(r"""strftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")
"""A call for today's date in some format; other programs would insert the current day."""
IS_DEFINED = re.compile(r"strftime_now is (not )?defined")
"""A test whether the program has that function, which a fixed date does not need."""
BETWEEN = "\n\n"
"""Separates a system message from a user message in a template that has one place for both."""
_TASKS = Sources(
    "{% set roles = messages | map(attribute='role') | join(' ') %}"
    "{% if roles == 'user' %}{{ $alone }}"
    "{% elif roles == 'system user' and not messages[0].content | trim %}{{ $blank }}"
    "{% elif roles == 'system user' %}{{ $both }}"
    "{% else %}$conversation{% endif %}"
)


def chat_template(template: Template, tokenizer: Tokenizer) -> str:
    """Return the Jinja chat template that renders messages as the template's prompts.

    A chat template is returned as it is.
    """
    source = template.conversation_source(tokenizer)
    if template.date is not None:
        source = _on(template.date, source)
    if template.kind not in CHATS:
        source = _with_tasks(template, source)
    return source if template.text.startswith(_bos(tokenizer)) else "{{ bos_token }}" + source


def _on(day: str, source: str) -> str:
    """Return a chat template that shows the day on which the adapter was trained, as its prompts do.

    Raises:
        UserError: it computes the format of the date.
    """
    then = datetime.fromisoformat(day)
    dated = NOW.sub(lambda call: _literal(then.strftime(call[1][1:-1])), source)
    dated = IS_DEFINED.sub(lambda asked: "false" if asked[1] else "true", dated)
    if "strftime_now(" in dated:
        raise UserError("the chat template computes the format of its date; it cannot be exported")
    return dated


def _with_tasks(template: Template, conversation: str) -> str:
    """Return Jinja that treats one or two messages as a task, and others as a conversation."""
    first, second = (f"messages[{number}].content" for number in range(2))
    text, bare = template.text, _bare(template)
    both = f"({first} ~ {_literal(BETWEEN)} ~ {second})"
    asked = _filled(text, first, second) if INPUT in text else _filled(bare, both)
    alone, blank = (_filled(bare, one) for one in (first, second))
    return _TASKS.substitute(alone=alone, blank=blank, both=asked, conversation=conversation)


def _bare(template: Template) -> str:
    """Return the template's text for a task without input."""
    return template.text_for("").replace(INPUT, "")


def _filled(text: str, instruction: str, input: str = "''") -> str:
    """Return the Jinja expression of a text with expressions in the places of its fields."""
    values = {INSTRUCTION: instruction, INPUT: input}
    return " ~ ".join(values.get(part, _literal(part)) for part in FIELD.split(text) if part)


def ollama_template(template: Template, tokenizer: Tokenizer) -> str:
    """Return the Go template of one turn; Ollama puts BOS before it where the GGUF file says so."""
    bos, bare = _bos(tokenizer), _bare(template)
    if INPUT in template.text:
        asked = _in_go(template.text, bos, "{{ .System }}", "{{ .Prompt }}")
        prompt = f"{{{{ if .System }}}}{asked}{{{{ else }}}}{_in_go(bare, bos, '{{ .Prompt }}')}{{{{ end }}}}"
    else:
        system = f"{{{{ if .System }}}}{{{{ .System }}}}{BETWEEN}{{{{ end }}}}"
        prompt = _in_go(bare, bos, system + "{{ .Prompt }}")
    end = _go_text(tokenizer.spelling(template.end_id(tokenizer)))
    return f"{prompt}{_go_text(template.lead)}{{{{ .Response }}}}{end}"


def _in_go(text: str, bos: str, instruction: str, input: str = "") -> str:
    values = {INSTRUCTION: instruction, INPUT: input}
    parts = FIELD.split(text.removeprefix(bos))
    return "".join([values.get(part, _go_text(part)) for part in parts])


def _bos(tokenizer: Tokenizer) -> str:
    """Return the spelling of BOS, which is put before every text; empty if none is."""
    return tokenizer.spelling(tokenizer.bos_id) if tokenizer.add_bos else ""


def _literal(text: str) -> str:
    """Return a text as a string in Jinja, whose escapes JSON's are."""
    return json.dumps(text, ensure_ascii=False)


def _go_text(text: str) -> str:
    if '"""' in text:
        raise UserError('the template holds """, which ends a text in a Modelfile; it cannot be exported')
    # A brace at the end would join those of what follows.
    return re.sub(r"\{{2,}|\{\Z", lambda braces: f'{{{{ "{braces[0]}" }}}}', text)
