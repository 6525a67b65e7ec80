"""A conversation in a terminal: what is typed is answered, and lines that begin with a slash are commands."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from lit_adapter.errors import UserError, nearest, shorten
from lit_adapter.files.paths import write_target
from lit_adapter.files.write import write_bytes
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.settings import Sampling
from lit_adapter.streams import say, write_answer

COMMANDS = {
    "/help": "show this list",
    "/reset": "start again; the system prompt stays",
    "/undo": "take back the last message and its answer",
    "/system TEXT": "set the system prompt, or with no text remove it; this starts again",
    "/save FILE": "write the conversation as a line of JSONL that can be trained on",
    "/adapter NAME": "go on with another adapter: a file, a run folder, or none for the plain base",
    "/exit": "leave, as Ctrl-D does",
}
LEAST_ANSWER = 16
"""Tokens of the context that an answer must have, or the conversation is too long."""


class Conversation:
    """The messages so far, who answers them, and the commands.

    Args:
        model: answers.
        sampling: its settings.
        out: where answers go.
        system: the system prompt, or empty.
        name: of the adapter that answers, as its user gave it; None for the plain base.
        interactive: whether a person types, who is told what happens.
    """

    def __init__(
        self,
        model: AdaptedLlama,
        sampling: Sampling,
        out: TextIO,
        system: str = "",
        name: str | None = None,
        *,
        interactive: bool = True,
    ) -> None:
        self.model, self.sampling, self.out = model, sampling, out
        self.system, self.interactive = system, interactive
        self.messages: list[dict[str, Any]] = []
        self.adapters = {"none": model.base} | ({name: model} if name is not None else {})
        self.left = False

    def take(self, line: str) -> None:
        """Answer a line, or do what it commands.

        Raises:
            UserError: it cannot be done; nothing has changed then.
        """
        if line.startswith("/"):
            name, _, argument = line.partition(" ")
            self._command(name, argument.strip())
        elif line.strip():
            self._answer(line)

    def _all(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.messages

    def _answer(self, line: str) -> None:
        """Write the answer as it comes; Ctrl-C ends it, and what there is of it stays."""
        self.messages.append({"role": "user", "content": line})
        answer = ""
        try:
            with _interrupts() as interrupted:
                for piece in self._pieces():
                    answer += piece
                    write_answer(piece, self.out)
                    if interrupted():
                        break
        except UserError:
            self.messages.pop()
            raise
        write_answer("\n", self.out)
        if interrupted():
            self._tell("(stopped)")
        self.messages.append({"role": "assistant", "content": answer})

    def _pieces(self) -> Iterator[str]:
        settings = asdict(self.sampling)
        room = self.model.room_for_chat(self._all())
        if room < LEAST_ANSWER:
            raise UserError("the conversation fills the base's context; /reset starts again")
        settings["max_new_tokens"] = min(room, self.sampling.max_new_tokens)
        return self.model.stream_chat(self._all(), **settings)

    def _command(self, name: str, argument: str) -> None:
        does: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/undo": self._undo,
            "/system": self._set_system,
            "/save": self._save,
            "/adapter": self._choose_adapter,
            "/exit": self._leave,
            "/quit": self._leave,
        }
        if name not in does:
            hint = nearest(name, list(does)) or "; /help lists the commands"
            raise UserError(f"unknown command {shorten(name)}{hint}")
        does[name](argument)

    def _help(self, argument: str) -> None:
        for command, what in COMMANDS.items():
            self._tell(f"  {command:<15} {what}")

    def _reset(self, argument: str) -> None:
        self.messages.clear()
        self._tell("(a new conversation)")

    def _undo(self, argument: str) -> None:
        if not self.messages:
            raise UserError("there is nothing to take back")
        del self.messages[-2:]
        said = len(self.messages) // 2
        self._tell(f"(taken back; {said} {'message' if said == 1 else 'messages'} before it)")

    def _set_system(self, argument: str) -> None:
        self.system = argument
        self.messages.clear()
        self._tell(f"(system prompt {'set' if argument else 'removed'}; a new conversation)")

    def _save(self, argument: str) -> None:
        if not argument:
            raise UserError("/save needs a file: /save chat.jsonl")
        if not self.messages:
            raise UserError("there is no message to save yet")
        path = Path(argument).expanduser()
        write_target(path)
        if path.exists():
            raise UserError(f"{path}: already there; name another file")
        write_bytes(path, json.dumps({"messages": self._all()}, ensure_ascii=False).encode() + b"\n")
        self._tell(f"(wrote {path})")

    def _choose_adapter(self, argument: str) -> None:
        if not argument:
            raise UserError(f"/adapter needs a name; loaded are {', '.join(self.adapters)}")
        if argument not in self.adapters:
            self.adapters[argument] = self.model.with_adapter(adapter_file(argument))
        self.model = self.adapters[argument]
        self._tell(f"({'the plain base' if argument == 'none' else argument} answers from here on)")

    def _leave(self, argument: str) -> None:
        self.left = True

    def _tell(self, text: str) -> None:
        if self.interactive:
            say(text, sys.stderr)


def adapter_file(name: str) -> Path:
    """Return the file of an adapter named by its path, by its run's folder, or by the run's name in out."""
    given = Path(name).expanduser()
    for path in (given, Path("out") / name):
        if path.is_file():
            return path
        if (path / "adapter.safetensors").is_file():
            return path / "adapter.safetensors"
    return given


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C only be noticed, so that an answer ends between two tokens."""
    seen: list[int] = []

    def notice(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    earlier = signal.signal(signal.SIGINT, notice)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, earlier)


def converse(conversation: Conversation, lines: Iterator[str]) -> None:
    """Take lines until there is no more, or a command to leave.

    Raises:
        UserError: what a line asks for cannot be done, and nobody is there to be told.
    """
    for line in lines:
        try:
            conversation.take(line)
        except UserError as error:
            if not conversation.interactive:
                raise
            say(f"error: {error}", sys.stderr)
        if conversation.left:
            return


def typed_lines(prompt: str = "> ") -> Iterator[str]:
    """Yield what is typed, until Ctrl-D; Ctrl-C drops a line that is being typed.

    A line that ends in a backslash goes on in the next.
    """
    import readline  # noqa: F401 (gives `input` its keys and its history)

    parts: list[str] = []
    while True:
        try:
            line = input("  " if parts else prompt)
        except EOFError:
            say("", sys.stderr)
            return
        except KeyboardInterrupt:
            say("\n(Ctrl-D leaves)", sys.stderr)
            parts.clear()
            continue
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(parts)
            parts.clear()
