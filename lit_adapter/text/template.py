"""Prompt templates: a record becomes the ids of a prompt, or of a prompt and its answer.

A template is a list of parts: its own text, and the places of the user's instruction and input. Control
tokens spelled in the template's own text become control ids; the same spelling in a user's text stays
text. Nothing is ever searched for in user text, and nothing is formatted into it.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError, nearest
from lit_adapter.text.tokenizer import Tokenizer

# Stanford Alpaca's two texts (tatsu-lab/stanford_alpaca); models are trained on them to the letter.
_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."
ALPACA = f"{_TASK}. {_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n### Response:"
ALPACA_WITH_INPUT = (
    f"{_TASK}, paired with an input that provides further context. {_REQUEST}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_FIELD = re.compile(r"\{(instruction|input)\}")


@dataclass(frozen=True)
class Template:
    """How a record is put to the model.

    ``text`` serves records with an input, ``text_without_input`` those without; in both, ``{instruction}``
    and ``{input}`` mark the user's texts and every other character stands for itself.
    """

    name: str
    text: str
    text_without_input: str
    answer_end: str = ""
    """Control token that ends an answer; the tokenizer's EOS if empty."""
    has_control_tokens: bool = False
    """Whether control tokens spelled in the texts become control ids (chat templates)."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Template:
        """Return the template that `to_dict` described.

        Raises:
            TypeError: keys or values of another kind.
        """
        template = cls(**raw)
        if not all(isinstance(v, str) for v in list(raw.values()) if not isinstance(v, bool)):
            raise TypeError("a template's values must be texts")
        return template

    def variant(self, has_input: bool) -> int:
        """Return which text serves a record: 1 with an input, 0 without; 0 where they are the same."""
        return int(has_input and self.text != self.text_without_input)

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the ids that end an answer of this template."""
        return frozenset([self._end_id(tokenizer)])

    def _end_id(self, tokenizer: Tokenizer) -> int:
        found = tokenizer.control_id(self.answer_end) if self.answer_end else None
        return tokenizer.eos_id if found is None else found

    def encode_prompt(self, tokenizer: Tokenizer, instruction: str, input: str = "") -> list[int]:
        """Return the ids of the prompt, as the model sees them before it answers."""
        return self._encode(tokenizer, instruction, input, "")

    def encode_example(
        self, tokenizer: Tokenizer, instruction: str, input: str, output: str
    ) -> tuple[list[int], int]:
        """Return the ids of prompt, answer and its end, and how many of them are the prompt.

        Prompt and answer are encoded together. Where that would merge characters across the boundary, the
        prompt keeps the ids it has alone, since those are what generation starts from.
        """
        prompt = self.encode_prompt(tokenizer, instruction, input)
        together = self._encode(tokenizer, instruction, input, output)
        if together[: len(prompt)] != prompt:
            together = prompt + tokenizer.encode_continuation(output)
        return [*together, self._end_id(tokenizer)], len(prompt)

    def _encode(self, tokenizer: Tokenizer, instruction: str, input: str, output: str) -> list[int]:
        """Encode runs of plain text whole, with the template's control tokens between them."""
        values = {"instruction": instruction, "input": input}
        check_text(instruction, "instruction")
        check_text(input, "input")
        check_text(output, "output")
        ids: list[int] = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        run, at_start = "", True
        for number, part in enumerate(_FIELD.split(self.text if input else self.text_without_input)):
            if number % 2:
                run += values[part]
                continue
            for literal, control in self._controls(part, tokenizer):
                run += literal
                if control is None or (control == tokenizer.bos_id and ids == [control] and not run):
                    continue
                ids += _encode_run(tokenizer, run, at_start)
                run, at_start = "", False
                ids.append(control)
        return ids + _encode_run(tokenizer, run + output, at_start)

    def _controls(self, part: str, tokenizer: Tokenizer) -> list[tuple[str, int | None]]:
        """Split the template's own text at its control tokens: (text before, control id or None)."""
        controls = tokenizer.control_tokens if self.has_control_tokens else {}
        if not controls:
            return [(part, None)]
        spelled = "|".join(re.escape(text) for text in sorted(controls, key=len, reverse=True))
        pieces = re.split(f"({spelled})", part)
        texts, found = pieces[::2], [controls[text] for text in pieces[1::2]]
        return list(zip(texts, [*found, None], strict=True))


def _encode_run(tokenizer: Tokenizer, text: str, at_start: bool) -> list[int]:
    if not text:
        return []
    return tokenizer.encode(text) if at_start else tokenizer.encode_continuation(text)


def check_text(text: str, what: str) -> None:
    """Refuse text that has no UTF-8 form.

    Raises:
        UserError: a lone surrogate; names its place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"{what}: character {error.start} is {bad}, half of a pair; remove it") from None


def resolve_template(choice: str, tokenizer: Tokenizer) -> Template:
    """Return the template that ``choice`` names.

    Args:
        choice: ``alpaca``, ``alpaca-newline``, ``chat``, a text with ``{instruction}``, or a text file's path.
        tokenizer: of the base; it carries the chat template.

    Raises:
        UserError: an unknown name, or a text without ``{instruction}``.
    """
    if choice == "alpaca":
        return Template(choice, ALPACA_WITH_INPUT, ALPACA)
    if choice == "alpaca-newline":
        return Template(choice, ALPACA_WITH_INPUT + "\n", ALPACA + "\n")
    if choice == "chat":
        from lit_adapter.text.chat import chat_template

        return chat_template(tokenizer)
    if "{instruction}" not in choice and Path(choice).is_file():
        choice = Path(choice).read_text(encoding="utf-8")
    if "{instruction}" not in choice:
        hint = nearest(choice, ["alpaca", "alpaca-newline", "chat"])
        raise UserError(
            f"data.template is {choice[:60]!r}; expected alpaca, alpaca-newline, chat, or a text (or a file of "
            f"one) with {{instruction}}{hint}"
        )
    return _custom(choice)


def _custom(text: str) -> Template:
    """Return a user's own template; without an ``{input}`` of its own, inputs follow the instruction."""
    if "{input}" in text:
        return Template("custom", text, text.replace("{input}", ""))
    return Template("custom", text.replace("{instruction}", "{instruction}\n\n{input}"), text)
