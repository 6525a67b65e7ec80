"""Exported chat templates, rendered by transformers: messages become the prompts that we make of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizer_kinds as kinds
from transformers import AutoTokenizer

from lit_adapter.errors import UserError
from lit_adapter.serving.errors import ApiError
from lit_adapter.serving.protocol import Message
from lit_adapter.serving.rendering import encode_messages
from lit_adapter.text import chat_templates
from lit_adapter.text.chat_export import chat_template, ollama_template
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import ALPACA, ALPACA_WITHOUT_INPUT, Template, resolve_template
from lit_adapter.text.tokenizer import Tokenizer

WITH_INPUT = "Frage: {instruction}\nText: {input}\n\"{Antwort}\" 'so':"
WITHOUT = "$both {{ x }} {instruction} %}\\n"
TEMPLATES = ["alpaca", "alpaca-newline", "alpaca-chat", "chatml", WITH_INPUT, WITHOUT]
SAID = {
    "user": [("user", " Say it back. {instruction} {{ messages }}\n")],
    "task": [("system", "Say it back: {input}"), ("user", "red  green\n\n$both")],
    "blank system": [("system", " \n"), ("user", "Count.")],
    "turns": [("user", "Hi"), ("assistant", "Hello!"), ("user", "How are you?")],
    "system and turns": [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")],
}
BASES = ["without BOS", "with BOS"]


@pytest.fixture(params=BASES)
def tokenizers(request: pytest.FixtureRequest, tmp_path: Path, tiny_base: Path) -> tuple[Tokenizer, Any]:
    """Ours, and transformers' of the same folder."""
    if request.param == "without BOS":
        kind = kinds.make_byte_level(tmp_path)
        return kind.ours, kind.transformers
    return load_tokenizer(tiny_base), AutoTokenizer.from_pretrained(tiny_base)


@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_become_our_prompts(name: str, tokenizers: tuple[Tokenizer, Any]) -> None:
    """As the server renders them, and under a chat template as a run does."""
    ours, theirs = tokenizers
    if name == "chatml" and "<|im_start|>" not in ours.control_tokens:
        return  # this tokenizer lacks its tokens
    template = resolve_template(name, ours)
    theirs.chat_template = chat_template(template, ours)
    for said in SAID.values():
        messages = [{"role": role, "content": content} for role, content in said]
        try:
            wanted = prompt(template, ours, messages)
        except ApiError:
            assert (template.kind, len(said)) == ("custom", 4)
            with pytest.raises(jinja2.TemplateError, match="this template has no place for the role system"):
                theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert theirs(text, add_special_tokens=False)["input_ids"] == wanted


def prompt(template: Template, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    return encode_messages(template, tokenizer, [Message(**message) for message in messages])


def test_a_template_with_the_date_keeps_that_of_the_training(
    tokenizers: tuple[Tokenizer, Any], tmp_path: Path
) -> None:
    """As LLaMA 3's does; transformers would show the day on which it answers."""
    ours, theirs = tokenizers
    dated = """{% if strftime_now is defined %}{{ strftime_now( "%d %b %Y" ) }}, {% endif -%}
    {{ strftime_now('%A') }}: """
    source = dated + chat_templates.alpaca_chat(newline=False)
    file = tmp_path / "dated.jinja"
    file.write_text(source)
    template = replace(resolve_template(str(file), ours), date="2024-07-26")
    theirs.chat_template = chat_template(template, ours)
    message = {"role": "user", "content": "Hi"}
    text = theirs.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert "26 Jul 2024, Friday: " in text
    assert theirs(text, add_special_tokens=False)["input_ids"] == prompt(template, ours, [message])
    without = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(theirs.chat_template)
    assert without.render(messages=[message], bos_token=theirs.bos_token, add_generation_prompt=True) == text
    computed = replace(template, jinja="{{ strftime_now('%Y' ~ '-%m') }}" + source)
    with pytest.raises(UserError, match="computes the format of its date"):
        chat_template(computed, ours)


def test_alpaca_s_input_stands_under_input(tiny_base: Path) -> None:
    ours, theirs = load_tokenizer(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    theirs.chat_template = chat_template(resolve_template("alpaca", ours), ours)
    user, system = {"role": "user", "content": "a cat"}, {"role": "system", "content": "Translate."}
    asked = theirs.apply_chat_template([system, user], tokenize=False)
    assert asked == "<s>" + ALPACA.format(instruction="Translate.", input="a cat")
    alone = theirs.apply_chat_template([user], tokenize=False)
    assert alone == "<s>" + ALPACA_WITHOUT_INPUT.format(instruction="a cat")


def test_ollama_s_template_has_both_forms(tiny_base: Path) -> None:
    """Ollama puts BOS before it."""
    ours = load_tokenizer(tiny_base)
    asked = ALPACA.format(instruction="{{ .System }}", input="{{ .Prompt }}")
    alone = ALPACA_WITHOUT_INPUT.format(instruction="{{ .Prompt }}")
    found = ollama_template(resolve_template("alpaca", ours), ours)
    assert found == f"{{{{ if .System }}}}{asked}{{{{ else }}}}{alone}{{{{ end }}}}{{{{ .Response }}}}</s>"
    plain = ollama_template(resolve_template("<s>{{x}} {instruction}!", ours), ours)
    system = "{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}"
    assert plain == '{{ "{{" }}x}} ' + system + "!{{ .Response }}</s>"
    braced = ollama_template(resolve_template("{{{instruction}} {{{", ours), ours)
    assert braced == '{{ "{{" }}' + system + '} {{ "{{{" }}{{ .Response }}</s>'
