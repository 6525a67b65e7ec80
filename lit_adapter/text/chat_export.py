"""A prompt template in the languages of other programs: Jinja for chat templates, Go's for Ollama.

Both show a conversation as a run would have trained on it, turn by turn: a user's message is the instruction,
with the system's message and an empty line before the first one.
"""

from __future__ import annotations

import json

from lit_adapter.errors import UserError
from lit_adapter.text.template import INPUT, INSTRUCTION, Template
from lit_adapter.text.tokenizer import Tokenizer


def chat_template(template: Template, tokenizer: Tokenizer) -> str:
    """Return the Jinja chat template that renders one user message as the template's prompt.

    The base's own if the template is ``chat``; its text comes from there.
    """
    if template.kind == "chat" and tokenizer.chat_template:
        return tokenizer.chat_template
    said = "(seen.system ~ message['content'])" + ("|trim" if template.trim else "")
    prompt = f" ~ {said} ~ ".join(_literal(piece) for piece in _pieces(template))
    end = _literal(_spelling(tokenizer, template.end_id(tokenizer)))
    lead = _literal(template.lead)
    bos = "{{ bos_token }}" if _puts_bos(template, tokenizer) else ""
    return (
        f"{bos}{{% set seen = namespace(system='') %}}{{% for message in messages %}}"
        "{% if message['role'] == 'system' %}{% set seen.system = message['content'] ~ '\\n\\n' %}"
        f"{{% elif message['role'] == 'user' %}}{{{{ {prompt} }}}}{{% set seen.system = '' %}}"
        f"{{% else %}}{{{{ {lead} ~ message['content'] ~ {end} }}}}{{% endif %}}{{% endfor %}}"
    )


def ollama_template(template: Template, tokenizer: Tokenizer) -> str:
    """Return the Go template of one turn; Ollama puts BOS before it where the GGUF file says so."""
    said = "{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}"
    pieces = _pieces(template)
    bos = "" if tokenizer.bos_id is None else _spelling(tokenizer, tokenizer.bos_id)
    if tokenizer.add_bos and bos:
        pieces[0] = pieces[0].removeprefix(bos)
    end = _spelling(tokenizer, template.end_id(tokenizer))
    return said.join(map(_go_text, pieces)) + template.lead + "{{ .Response }}" + _go_text(end)


def _pieces(template: Template) -> list[str]:
    """Return the texts before, between and after the places of the instruction; an input is empty."""
    text = template.text_without_input or template.text
    return text.replace(INPUT, "").split(INSTRUCTION)


def _puts_bos(template: Template, tokenizer: Tokenizer) -> bool:
    bos = "" if tokenizer.bos_id is None else _spelling(tokenizer, tokenizer.bos_id)
    return tokenizer.add_bos and bool(bos) and not _pieces(template)[0].startswith(bos)


def _spelling(tokenizer: Tokenizer, id_: int) -> str:
    return next((text for text, own in tokenizer.control_tokens.items() if own == id_), "")


def _literal(text: str) -> str:
    """Return a text as a string in Jinja, whose escapes JSON's are."""
    return json.dumps(text, ensure_ascii=False)


def _go_text(text: str) -> str:
    if '"""' in text:
        raise UserError('the template holds """, which ends a text in a Modelfile; it cannot be exported')
    return text.replace("{{", '{{ "{{" }}')
