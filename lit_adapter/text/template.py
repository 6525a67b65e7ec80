"""Prompt templates: a record of instruction, input and output becomes token ids.

A template is plain text with placeholders for the record's fields. Control tokens in the template's own text
are encoded as such; in the record's text they stay text.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError, nearest, shorten
from lit_adapter.files.read import read_text
from lit_adapter.text.chat import control_pattern, render_chat
from lit_adapter.text.tokenizer import Tokenizer

INSTRUCTION, INPUT = "{instruction}", "{input}"
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
KINDS = ("alpaca", "alpaca-newline", "chat", "custom")
_FIELD = re.compile(r"(\{instruction\}|\{input\})")
_IN_BRACES = re.compile(r"\{\s*(\w+)\s*\}")


@dataclass(frozen=True)
class Template:
    """How a record becomes a prompt and an answer."""

    kind: str
    """alpaca, alpaca-newline, chat or custom."""
    text: str
    """The prompt, with ``{instruction}`` and ``{input}`` for the record's texts. In ``chat``,
    ``{instruction}`` is the whole message: the instruction, an empty line and the input."""
    text_without_input: str | None = None
    """The prompt for records without input; None to use ``text``."""
    end: str | None = None
    """The control token that ends an answer; None for EOS."""
    lead: str = ""
    """A space between prompt and answer that is part of the answer's first token."""
    trim: bool = False
    """Whether white space around the message is stripped, as in many chat templates."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            hint = nearest(str(self.kind), list(KINDS)) or f"; expected {', '.join(KINDS)}"
            raise UserError(f"template kind '{self.kind}' is unknown{hint}")
        for text in (self.text, self.text_without_input):
            if text is not None and INSTRUCTION not in text:
                raise UserError(f"template {shorten(text)}: {INSTRUCTION} is missing")
            if text is not None and self.kind == "custom" and "{output}" in text:
                raise UserError(
                    f"template {shorten(text)}: leave out {{output}}; the answer is added after the prompt"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the template as plain values, for a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Template:
        """Return the template of a dict made by `to_dict`.

        Raises:
            ValueError: a key is missing or unknown, or a value is not valid.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(raw, dict) or sorted(raw) != sorted(names):
            raise ValueError(f"template: expected the keys {', '.join(names)}")
        kinds = {"kind": (str,), "text": (str,), "lead": (str,), "trim": (bool,)}
        for name, value in raw.items():
            if not isinstance(value, kinds.get(name, (str, type(None)))):
                raise ValueError(f"template: '{name}' is {value!r}")
        try:
            return cls(**raw)
        except UserError as error:
            raise ValueError(str(error)) from None

    def variant(self, record_has_input: bool) -> int:
        """Return which of the template's texts a record uses: 0, or 1 for the one without input."""
        return int(self.text_without_input is not None and not record_has_input)

    def end_id(self, tokenizer: Tokenizer) -> int:
        """Return the id that ends an answer.

        Raises:
            UserError: the tokenizer lacks this template's control token.
        """
        if self.end is None:
            return tokenizer.eos_id
        if self.end not in tokenizer.control_tokens:
            raise UserError(
                f"template '{self.kind}': this tokenizer has no control token '{self.end}'; "
                "the template belongs to another base"
            )
        return tokenizer.control_tokens[self.end]

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the ids that end a text generated under this template."""
        return tokenizer.stop_ids | {self.end_id(tokenizer)}

    def encode_prompt(self, tokenizer: Tokenizer, instruction: str, input: str = "") -> list[int]:
        """Return the ids of a prompt, which an answer is to continue.

        BOS comes first if the base was trained with it, unless the template's own text begins with it.

        Raises:
            UserError: a text has a lone surrogate, there is an input but no placeholder for it, or the
                prompt has no tokens.
        """
        return self._prompt(tokenizer, instruction, input).ids

    def encode_example(
        self, tokenizer: Tokenizer, instruction: str, input: str, output: str
    ) -> tuple[list[int], int]:
        """Return the ids of prompt, answer and end token, and the number of the prompt's.

        The prompt's ids are exactly those of `encode_prompt`. Prompt and answer are tokenized together;
        where that would change the prompt's ids, the answer is encoded separately as a continuation, as a
        model generates it. Decoding the answer gives exactly ``output``, except that a sentencepiece
        tokenizer drops one space at its start (`Tokenizer.strips_space`).

        Raises:
            UserError: as `encode_prompt`.
        """
        prompt = self._prompt(tokenizer, instruction, input)
        answer = (self.lead if tokenizer.strips_space else "") + output
        if not prompt.run:
            ids = prompt.ids + tokenizer.encode(answer, continuation=not tokenizer.space_after_control)
        else:
            joint = tokenizer.encode(prompt.run + answer, continuation=prompt.continuation)
            ids = prompt.ids[: prompt.run_start] + joint
            if ids[: len(prompt.ids)] != prompt.ids:
                ids = prompt.ids + tokenizer.encode(answer, continuation=True)
        return [*ids, self.end_id(tokenizer)], len(prompt.ids)

    def _prompt(self, tokenizer: Tokenizer, instruction: str, input: str) -> _Prompt:
        return _encoded(self._filled(instruction, input), tokenizer)

    def _filled(self, instruction: str, input: str) -> list[tuple[str, bool]]:
        """Return the pieces of the prompt, each with whether it is the template's own text."""
        if self.kind == "chat":
            instruction, input = f"{instruction}\n\n{input}" if input else instruction, ""
        if self.trim:
            instruction = instruction.strip()
        text = self.text if input or self.text_without_input is None else self.text_without_input
        if input and INPUT not in text:
            raise UserError(
                f"template {shorten(text)}: no place for an input; leave the input out, or use a "
                f"template with {INPUT}"
            )
        values = {INSTRUCTION: (instruction, False), INPUT: (input, False)}
        return [values.get(part, (part, True)) for part in _FIELD.split(text)]


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    run: str
    """The text after the last control token."""
    run_start: int
    """Index of its first id."""
    continuation: bool
    """Whether it was encoded without a space at its start."""


def encode_parts(parts: list[tuple[str, bool]], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a prompt's pieces, each with whether it is the template's own text.

    Raises:
        UserError: as `Template.encode_prompt`.
    """
    return _encoded(parts, tokenizer).ids


def _encoded(parts: list[tuple[str, bool]], tokenizer: Tokenizer) -> _Prompt:
    bos = tokenizer.bos_id
    segments = _segments(parts, tokenizer)
    ids = [bos] if tokenizer.add_bos and bos is not None and segments[:1] != [bos] else []
    run, run_start, continuation = "", 0, False
    for place, segment in enumerate(segments):
        run_start = len(ids)
        continuation = place > 0 and not tokenizer.space_after_control
        if isinstance(segment, int):
            run, ids = "", [*ids, segment]
        else:
            run, ids = segment, ids + tokenizer.encode(segment, continuation=continuation)
    if not ids:
        raise UserError("the prompt is empty, and this base has no BOS to start with; write a text")
    return _Prompt(ids, run, run_start, continuation)


def _segments(parts: list[tuple[str, bool]], tokenizer: Tokenizer) -> list[str | int]:
    """Return the longest runs of text, and the ids of the control tokens between them."""
    pattern, control = control_pattern(tokenizer), tokenizer.control_tokens
    segments: list[str | int] = []
    run = ""
    for text, own in parts:
        at = 0
        for match in pattern.finditer(text) if own and pattern else ():
            run += text[at : match.start()]
            segments += [run, control[match[0]]] if run else [control[match[0]]]
            run, at = "", match.end()
        run += text[at:]
    return [*segments, run] if run else segments


def resolve_template(name_or_text: str, tokenizer: Tokenizer) -> Template:
    """Return the template that a configuration names.

    That is ``alpaca``, ``alpaca-newline``, ``chat`` (the base's own), a text with ``{instruction}``, or the
    path of a file with such a text, whose last line break is ignored.

    Raises:
        UserError: the name is unknown, the file cannot be read, or the base has no usable chat template.
    """
    if name_or_text == "chat":
        return _chat(tokenizer)
    if name_or_text in ("alpaca", "alpaca-newline"):
        newline = "\n" if name_or_text == "alpaca-newline" else ""
        return Template(name_or_text, ALPACA + newline, ALPACA_WITHOUT_INPUT + newline)
    if INSTRUCTION in name_or_text:
        return _custom(name_or_text, f"template {shorten(name_or_text)}")
    path = Path(name_or_text)
    if "\n" not in name_or_text and _is_file(path):
        text = read_text(path).removesuffix("\n")
        if INSTRUCTION not in text:
            raise UserError(f"{path}: {INSTRUCTION} is missing")
        return _custom(text, str(path))
    hint = nearest(name_or_text, list(KINDS[:-1]))
    expected = (
        f"; expected alpaca, alpaca-newline, chat, a text with {INSTRUCTION}, or the path of a file with one"
    )
    raise UserError(f"template {shorten(name_or_text)} is unknown{hint or expected}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # a text too long for a name, or a folder without permission
        raise UserError(
            f"template {shorten(str(path))} has no {INSTRUCTION}, and is no readable file: {error.strerror}"
        ) from None


def _custom(text: str, where: str) -> Template:
    """Return a user's own template; refuse misspelled placeholders, keep other words in braces as text."""
    for found in _IN_BRACES.finditer(text):
        close = difflib.get_close_matches(found[1].lower(), ("instruction", "input"), n=1, cutoff=0.88)
        if close and found[0] != f"{{{close[0]}}}":
            raise UserError(f"{where}: {found[0]} is not a field; write {{{close[0]}}}")
    return Template("custom", text)


def _chat(tokenizer: Tokenizer) -> Template:
    chat = render_chat(tokenizer)
    if _FIELD.search(chat.before + chat.after):
        raise UserError(f"template 'chat': the base's template has {INSTRUCTION} or {INPUT} in its own text")
    text = chat.before + INSTRUCTION + chat.after
    return Template("chat", text, end=chat.end, lead=chat.lead, trim=chat.trim)
