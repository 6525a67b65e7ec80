"""What data consists of: instruction records, conversations, and plain texts. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_adapter.text.conversation import Message


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a record comes from; it does not count in comparisons."""

    file: str = field(default="", compare=False, kw_only=True)
    """The file's name; all its records share one string."""
    line: int = field(default=0, compare=False, kw_only=True)
    """The line where the record starts, or for Parquet its row, counted from 1."""
    source: int = field(default=0, compare=False, kw_only=True)
    """Which of several sources it comes from."""

    @property
    def origin(self) -> str:
        """Return ``file:line``, for messages."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Record(_Origin):
    """One task and its answer. Records with the same three texts are equal, wherever they came from."""

    instruction: str
    input: str
    output: str

    @property
    def texts(self) -> tuple[str, ...]:
        """Return all of its texts."""
        return self.instruction, self.input, self.output

    @property
    def is_empty(self) -> bool:
        """Whether it has nothing to learn."""
        return not self.output.strip()


@dataclass(frozen=True, slots=True)
class Conversation(_Origin):
    """Messages and the tools they may call, kept as one JSON text to save memory."""

    content: str

    @classmethod
    def of(cls, messages: list[Message], tools: list[Any], **origin: Any) -> Conversation:
        """Return a conversation of checked messages."""
        said = [[m.role, m.content, m.learned, dict(m.more)] for m in messages]
        return cls(json.dumps([said, tools], ensure_ascii=False), **origin)

    @property
    def messages(self) -> tuple[Message, ...]:
        """Return the messages."""
        return tuple(Message(*values) for values in json.loads(self.content)[0])

    @property
    def tools(self) -> list[Any]:
        """Return what the assistant may call."""
        found: list[Any] = json.loads(self.content)[1]
        return found

    @property
    def texts(self) -> tuple[str, ...]:
        """Return all of its texts."""
        return "conversation", self.content

    @property
    def is_empty(self) -> bool:
        """Whether it has nothing to learn."""
        return not any(message.role == "assistant" and message.learned for message in self.messages)


@dataclass(frozen=True, slots=True)
class PlainText(_Origin):
    """A text that is learned unchanged, without a template."""

    text: str

    @property
    def texts(self) -> tuple[str, ...]:
        """Return all of its texts."""
        return "text", self.text

    @property
    def is_empty(self) -> bool:
        """Whether it has nothing to learn."""
        return not self.text.strip()


AnyRecord = Record | Conversation | PlainText


DIGEST_BYTES = 16


def digest_of(record: AnyRecord) -> bytes:
    """Return 16 bytes that identify a record's texts."""
    digest = hashlib.sha256()
    for text in record.texts:
        content = text.encode()
        # The length in front distinguishes ("ab", "c") from ("a", "bc").
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.digest()[:DIGEST_BYTES]


def record_of(texts: Sequence[str], **origin: Any) -> AnyRecord:
    """Return the record with these `texts`."""
    if len(texts) == 3:
        return Record(*texts, **origin)
    kind, content = texts
    return Conversation(content, **origin) if kind == "conversation" else PlainText(content, **origin)
