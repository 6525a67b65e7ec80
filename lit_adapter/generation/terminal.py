"""A conversation in a terminal: what is typed is answered, and lines that begin with a slash are commands."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from lit_adapter.errors import UserError, nearest, shorten
from lit_adapter.files.paths import write_target
from lit_adapter.files.write import write_bytes
from lit_adapter.generation.settings import Sampling
from lit_adapter.streams import say, write_answer

COMMANDS = {
    "/help": "show this list",
    "/reset": "start again; the system prompt stays",
    "/undo": "take back the last message and its answer",
    "/system TEXT": "set the system prompt, or with no text remove it; this starts again",
    "/save FILE": "write the conversation as a line of JSONL that can be trained on",
    "/adapter NAME": "change to another adapter, or none for the plain base; without a name list them",
    "/exit": "leave, as Ctrl-D does",
}
PLAIN = "none"
"""Names the plain base."""


class Partner(Protocol):
    """Who answers: models in this process, or those of a server."""

    name: str
    """The name of the model that answers now."""
    cut_after: int | None
    """The tokens after which the last answer was cut; None if it came to its own end."""

    def names(self) -> list[str]:
        """Return the names of the available models."""

    def choose(self, name: str) -> None:
        """Let another model answer from here on.

        Raises:
            UserError: there is no model of this name.
        """

    def answer(self, messages: Sequence[Mapping[str, Any]], sampling: Sampling) -> Iterator[str]:
        """Yield the answer to a conversation piece by piece.

        Raises:
            UserError: it cannot be given.
        """

    def stop(self) -> None:
        """Stop waiting for the rest of an answer; called from a signal handler."""


class Conversation:
    """The messages so far, who answers them, and the commands.

    Args:
        partner: answers.
        sampling: its settings.
        out: where answers go.
        system: the system prompt, or empty.
        interactive: whether a person types; then messages say what happens.
    """

    def __init__(
        self, partner: Partner, sampling: Sampling, out: TextIO, system: str = "", *, interactive: bool = True
    ) -> None:
        self.partner, self.sampling, self.out = partner, sampling, out
        self.system, self.interactive = system, interactive
        self.messages: list[dict[str, Any]] = []
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
            with _interrupts(self.partner.stop) as interrupted:
                for piece in self.partner.answer(self._all(), self.sampling):
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
        elif self.partner.cut_after is not None:
            self._tell(f"(ended after {self.partner.cut_after} tokens; --max_new_tokens allows more)")
        self.messages.append({"role": "assistant", "content": answer})

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
            say(f"  {command:<15} {what}", sys.stderr)

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
            for name in self.partner.names():
                say(f"  {name}{'  (answers now)' if name == self.partner.name else ''}", sys.stderr)
            return
        self.partner.choose(argument)
        plain = self.partner.name == PLAIN
        self._tell(f"({'the plain base' if plain else self.partner.name} answers from here on)")

    def _leave(self, argument: str) -> None:
        self.left = True

    def _tell(self, text: str) -> None:
        if self.interactive:
            say(text, sys.stderr)


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C only be noticed and call ``stop``, so that an answer ends between two tokens."""
    seen: list[int] = []

    def notice(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        stop()

    earlier = signal.signal(signal.SIGINT, notice)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, earlier)


def converse(conversation: Conversation, lines: Iterator[str]) -> None:
    """Take lines until there are no more, or until a command to leave.

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


def typed_lines() -> Iterator[str]:
    """Yield what is typed, until Ctrl-D; Ctrl-C drops a line that is being typed, as does what is not UTF-8.

    A line that ends in a backslash continues in the next.
    """
    import readline  # noqa: F401 (gives `input` its keys and its history)

    parts: list[str] = []
    while True:
        try:
            line = input("  " if parts else "> ")
            line.encode()  # where the locale lets any byte pass, it fails here
        except UnicodeError:
            say("error: not UTF-8 text; set the terminal to UTF-8 and type it again", sys.stderr)
            parts.clear()
            continue
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
