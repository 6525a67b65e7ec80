"""The interface every tokenizer keeps, and the choice among them by what a folder holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable


class Tokenizer(ABC):
    """Text to token ids and back.

    ``encode`` treats every character as text: ``</s>`` or ``<|eot_id|>`` typed by a user never becomes
    a control token. Control tokens enter by id only (`control_id`).
    """

    vocab_size: int
    """Ids are below this number (added and control tokens included)."""
    bos_id: int | None
    eos_id: int
    add_bos: bool
    """Whether the base was trained with BOS at the start of every text."""
    stop_ids: frozenset[int]
    """Ids that end a generated text; always holds ``eos_id``."""
    chat_template: str | None
    """The base's own Jinja template, where it has one."""
    has_leading_space: bool
    """Whether a start of text is encoded with a space before it, which decoding takes off again."""

    @abstractmethod
    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of ``text``; nothing in it becomes a control token."""

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of ``text`` where it continues other text: without a leading space of its own."""
        return self.encode(text)

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``, control tokens left out."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """Return what a token adds to a text, in UTF-8; nothing for a control token."""

    def control_id(self, text: str) -> int | None:
        """Return the id of the control token spelled ``text``, or None."""
        return self.control_tokens.get(text)

    @property
    @abstractmethod
    def control_tokens(self) -> dict[str, int]:
        """Return every control token's spelling and id."""
