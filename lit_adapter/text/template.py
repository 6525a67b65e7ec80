"""Prompt templates: a record of instruction, input and output becomes token ids.

A template is plain text with placeholders for the record's fields. Control tokens in the template's own text
are encoded as such; in the record's text they stay text.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError, nearest, shorten
from lit_adapter.files.read import read_text
from lit_adapter.text import chat_templates
from lit_adapter.text.chat import control_pattern, render_chat
from lit_adapter.text.tokenizer import CONTROL_SPELLING, Tokenizer

INSTRUCTION, INPUT = "{instruction}", "{input}"
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = chat_templates.OPENING + "### Instruction:\n{instruction}\n\n### Response:"
CHATS = ("chat", *chat_templates.SOURCES, "jinja")
"""Kinds of templates for conversations."""
KINDS = ("alpaca", "alpaca-newline", *CHATS, "custom")
_OF_CHATS = ("jinja", "date")
FIELD = re.compile(r"(\{instruction\}|\{input\})")
_IN_BRACES = re.compile(r"\{\s*(\w+)\s*\}")


@dataclass(frozen=True)
class Template:
    """How a record becomes a prompt and an answer."""

    kind: str
    """alpaca, alpaca-newline, chat (the base's own), the name of a chat template, jinja or custom."""
    text: str
    """The prompt, with ``{instruction}`` and ``{input}`` for the record's texts. In a chat template,
    ``{instruction}`` is the whole message: the instruction, an empty line and the input."""
    text_without_input: str | None = None
    """The prompt for records without input; None to use ``text``."""
    end: str | None = None
    """The control token that ends an answer; None for EOS."""
    lead: str = ""
    """A space between prompt and answer that is part of the answer's first token."""
    trim: bool = False
    """Whether white space around the message is stripped, as in many chat templates."""
    jinja: str | None = None
    """The Jinja of a chat template, which writes conversations of several turns."""
    date: str | None = None
    """The day that a chat template shows (ISO), so that it always shows the same one."""

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
        """Return the template as plain values, for a JSON file; only chat templates have all keys."""
        values = asdict(self)
        return {name: value for name, value in values.items() if value is not None or name not in _OF_CHATS}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Template:
        """Return the template of a dict made by `to_dict`.

        Raises:
            ValueError: a key is missing or unknown, or a value is not valid.
        """
        names = [field.name for field in fields(cls) if field.name not in _OF_CHATS]
        if not isinstance(raw, dict) or sorted({*raw} - {*_OF_CHATS}) != sorted(names):
            raise ValueError(f"template: expected the keys {', '.join(names)}")
        kinds = {"kind": (str,), "text": (str,), "lead": (str,), "trim": (bool,)}
        for name, value in raw.items():
            if not isinstance(value, kinds.get(name, (str, type(None)))):
                raise ValueError(f"template: '{name}' is {value!r}")
        try:
            return cls(**raw)
        except UserError as error:
            raise ValueError(str(error)) from None

    def conversation_source(self, tokenizer: Tokenizer) -> str:
        """Return the Jinja that writes a conversation under this template.

        A template of one task is repeated for each of the user's messages.

        Raises:
            UserError: the base's end token has no spelling, so no text can say where an answer ends.
        """
        if self.jinja is not None:
            return self.jinja
        if self.kind == "chat" and tokenizer.chat_template:  # from an earlier version, which did not keep it
            return tokenizer.chat_template
        end = tokenizer.spelling(self.end_id(tokenizer))
        if not end:
            raise UserError(
                f"template '{self.kind}': the base's end token, {self.end_id(tokenizer)}, is no control "
                "token, so it cannot end the answers of a conversation; "
                "mark it as special in the base's tokenizer"
            )
        if self.kind in ("alpaca", "alpaca-newline"):
            return chat_templates.alpaca_chat(newline=self.kind == "alpaca-newline")
        before, _, after = self.text_for("").replace(INPUT, "").partition(INSTRUCTION)
        return chat_templates.repeated(before, after + self.lead, end)

    def text_for(self, input: str) -> str:
        """Return the text for a record with this input, which may be empty."""
        return self.text if input or self.text_without_input is None else self.text_without_input

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

        The prompt's ids are exactly those of `encode_prompt`. Prompt and answer are tokenized together; if
        that would change the prompt's ids, the answer is encoded separately as a continuation, as a model
        generates it. Decoding the answer gives exactly ``output``, except that a sentencepiece tokenizer
        drops one space at its start (`Tokenizer.strips_space`).

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
        bos = tokenizer.bos_id
        segments = _segments(self._filled(instruction, input), tokenizer)
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

    def _filled(self, instruction: str, input: str) -> list[tuple[str, bool]]:
        """Return the pieces of the prompt, each with whether it is the template's own text."""
        if self.kind in CHATS:
            instruction, input = f"{instruction}\n\n{input}" if input else instruction, ""
        if self.trim:
            instruction = instruction.strip()
        text = self.text_for(input)
        if input and INPUT not in text:
            raise UserError(
                f"template {shorten(text)}: no place for an input; leave the input out, or use a "
                f"template with {INPUT}"
            )
        values = {INSTRUCTION: (instruction, False), INPUT: (input, False)}
        return [values.get(part, (part, True)) for part in FIELD.split(text)]


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    run: str
    """The text after the last control token."""
    run_start: int
    """Index of its first id."""
    continuation: bool
    """Whether it was encoded without a space at its start."""


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


def resolve_template(name_or_text: str, tokenizer: Tokenizer, *, conversations: bool = False) -> Template:
    """Return the template that a configuration names.

    That is ``alpaca``, ``alpaca-newline``, ``chat`` (the base's own), a chat template's name, a text with
    ``{instruction}``, the path of a file with such a text, whose last line break is ignored, or the path of a
    chat template that ends in ``.jinja``. ``auto`` is ``alpaca``, or for ``conversations`` the base's own
    chat template; without one, ``chatml`` if the base has its control tokens, and else ``alpaca-chat``.

    Raises:
        UserError: the name is unknown, the file cannot be read, or the base has no usable chat template.
    """
    name = name_or_text
    if name == "auto":
        name = _name_for_conversations(tokenizer) if conversations else "alpaca"
    if name == "chat":
        if not tokenizer.chat_template:
            raise UserError(
                "template 'chat': this base has no chat template; use alpaca or a text of your own, or "
                f"for conversations {', '.join(chat_templates.SOURCES)}"
            )
        return _chat(tokenizer, tokenizer.chat_template, name)
    if name in chat_templates.SOURCES:
        return _named_chat(tokenizer, name)
    if name in ("alpaca", "alpaca-newline"):
        newline = "\n" if name == "alpaca-newline" else ""
        return Template(name, ALPACA + newline, ALPACA_WITHOUT_INPUT + newline)
    if INSTRUCTION in name_or_text:
        return _custom(name_or_text, f"template {shorten(name_or_text)}")
    path = Path(name_or_text)
    if "\n" not in name_or_text and _is_file(path):
        text = read_text(path).removesuffix("\n")
        if path.suffix in (".jinja", ".jinja2", ".j2"):
            return _chat(tokenizer, text, "jinja")
        if INSTRUCTION not in text:
            raise UserError(f"{path}: {INSTRUCTION} is missing; a chat template's file ends in .jinja")
        return _custom(text, str(path))
    names = [*(kind for kind in KINDS if kind not in ("jinja", "custom")), "auto"]
    hint = nearest(name_or_text, names)
    expected = f"; expected {', '.join(names)}, a text with {INSTRUCTION}, or the path of a file with one"
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


def _name_for_conversations(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template:
        return "chat"
    return "chatml" if {"<|im_start|>", "<|im_end|>"} <= tokenizer.control_tokens.keys() else "alpaca-chat"


def _named_chat(tokenizer: Tokenizer, name: str) -> Template:
    source = chat_templates.SOURCES[name]
    missing = [one for one in CONTROL_SPELLING.findall(source) if one not in tokenizer.control_tokens]
    if missing:
        raise UserError(
            f"template '{name}': this tokenizer has no control token '{missing[0]}'; choose another one, "
            "such as alpaca-chat, which needs none"
        )
    return _chat(tokenizer, source, name)


def _chat(tokenizer: Tokenizer, source: str, kind: str) -> Template:
    today = date.today().isoformat() if "strftime_now" in source else None
    chat = render_chat(tokenizer, source, kind, today)
    if FIELD.search(chat.before + chat.after):
        raise UserError(f"template '{kind}' has {INSTRUCTION} or {INPUT} in its own text")
    text = chat.before + INSTRUCTION + chat.after
    return Template(kind, text, end=chat.end, lead=chat.lead, trim=chat.trim, jinja=source, date=today)
