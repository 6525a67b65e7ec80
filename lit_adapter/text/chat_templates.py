"""The named chat templates, as Jinja: what a conversation looks like as one text."""

from __future__ import annotations

import json
import re

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, OpenAI's, which many bases use; tool calls in the form of Hermes and Qwen."""
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ {'name': call.function.name, 'parameters': call.function.arguments} | tojson }}{% endfor %}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""LLaMA 3's; tool calls in the form of LLaMA 3.1's for user-defined tools."""
MISTRAL = (
    "{{ bos_token }}{% set said = namespace(system='') %}"
    "{% for message in messages %}{% if message.role == 'system' %}"
    "{% set said.system = message.content + '\n\n' %}"
    "{% elif message.role == 'user' %}{{ '[INST] ' + said.system + message.content + ' [/INST]' }}"
    "{% set said.system = '' %}"
    "{% elif message.role == 'assistant' and not message.tool_calls %}{{ ' ' + message.content + eos_token }}"
    "{% else %}{{ raise_exception('mistral has no place for tool calls') }}{% endif %}{% endfor %}"
)
"""That of Mistral 7B Instruct v0.1 to v0.3; a system prompt precedes the next user message."""
_ALPACA = (
    "{% if not messages or messages[0].role != 'system' %}{{ OPENING }}{% endif %}"
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content + '\n\n' }}"
    "{% elif message.role == 'user' %}{{ '### Instruction:\n' + message.content + '\n\n' }}"
    "{% if not loop.last and messages[loop.index].role != 'assistant' %}"
    "{{ raise_exception('the alpaca form has an answer after each instruction') }}{% endif %}"
    "{% elif message.role == 'assistant' and not message.tool_calls %}"
    "{{ BEFORE + message.content + eos_token + '\n\n' }}"
    "{% else %}{{ raise_exception('the alpaca form has no place for tool calls') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ BEFORE }}{% endif %}"
)
_REPEATED = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ BEFORE + message.content + AFTER }}"
    "{% elif message.role == 'assistant' and not message.tool_calls %}{{ message.content + END }}"
    "{% else %}{{ raise_exception('this template has no place for the role ' + message.role) }}"
    "{% endif %}{% endfor %}"
)
OPENING = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)


def alpaca_chat(*, newline: bool = False) -> str:
    """Return the Alpaca form of a conversation, which begins as the template ``alpaca`` does.

    A system prompt takes the place of the sentence that opens it. ``newline``: that of ``alpaca-newline``.
    """
    before = "### Response:" + "\n" * newline
    return _filled(_ALPACA, OPENING=OPENING, BEFORE=before)


def repeated(before: str, after: str, end: str) -> str:
    """Return the conversation of a template of one task: it is repeated for each message of the user.

    ``before`` and ``after`` enclose the user's words, ``end`` is the token that ends an answer.
    """
    return _filled(_REPEATED, BEFORE=before, AFTER=after, END=end)


def _filled(source: str, **texts: str) -> str:
    """Return Jinja with names replaced by literals; it reads their escapes as Python does."""
    values = {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()}
    return re.sub("|".join(values), lambda found: values[found[0]], source)


SOURCES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "alpaca-chat": alpaca_chat()}
"""Jinja by name."""
