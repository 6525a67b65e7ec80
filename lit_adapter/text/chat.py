"""The base's own chat template, rendered once with marks where the user's texts go."""

from __future__ import annotations

import datetime
import secrets
from typing import Any, NoReturn

from lit_adapter.errors import UserError
from lit_adapter.text.template import Template
from lit_adapter.text.tokenizer import Tokenizer


def chat_template(tokenizer: Tokenizer) -> Template:
    """Return the chat template as plain text with ``{instruction}`` and ``{input}``.

    The Jinja text runs in jinja's sandbox, once, on marks that no text holds by chance; what it renders is
    kept, so that an adapter carries the very text it was trained with.

    Raises:
        UserError: the base has none, or it fails.
    """
    if not tokenizer.chat_template:
        raise UserError("data.template is chat, but the base has no chat template; use alpaca or your own text")
    mark = secrets.token_hex(8)
    with_input = _render(tokenizer, f"{mark}instruction\n\n{mark}input")
    without = _render(tokenizer, f"{mark}instruction")
    answered = _render(tokenizer, f"{mark}instruction", answer=f"{mark}output")
    texts = [text.replace(f"{mark}instruction", "{instruction}") for text in (with_input, without)]
    if any("{instruction}" not in text for text in texts):
        raise UserError("the base's chat template leaves the user's message out; use alpaca or your own text")
    return Template(
        name="chat",
        text=texts[0].replace(f"{mark}input", "{input}"),
        text_without_input=texts[1],
        answer_end=_answer_end(answered.partition(f"{mark}output")[2], tokenizer),
        has_control_tokens=True,
    )


def _answer_end(rest: str, tokenizer: Tokenizer) -> str:
    """Return the control token that the template puts after an answer, or an empty text."""
    rest = rest.lstrip()
    return max((text for text in tokenizer.control_tokens if rest.startswith(text)), key=len, default="")


def _render(tokenizer: Tokenizer, question: str, answer: str | None = None) -> str:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    spelled = {number: text for text, number in tokenizer.control_tokens.items()}
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _today}
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    try:
        return environment.from_string(tokenizer.chat_template or "").render(
            messages=messages,
            add_generation_prompt=answer is None,
            bos_token=spelled.get(tokenizer.bos_id if tokenizer.bos_id is not None else -1, ""),
            eos_token=spelled.get(tokenizer.eos_id, ""),
        )
    except TemplateError as error:
        raise UserError(f"the base's chat template fails: {error}; use alpaca or your own text") from None


def _refuse(message: str) -> NoReturn:
    raise UserError(f"the base's chat template refuses: {message}; use alpaca or your own text")


def _today(form: str) -> str:
    return datetime.datetime.now().strftime(form)
