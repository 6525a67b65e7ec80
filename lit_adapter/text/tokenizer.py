"""The interface of all tokenizers, and decoding token by token."""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable

from lit_adapter.errors import UserError

CONTROL_SPELLING = re.compile(r"<\|[^|]*\|>")
"""A token like this acts as a control token, even where a file does not mark it as one."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Tokenizer(ABC):
    """Text to token ids and back.

    ``encode`` treats every character as text: ``</s>`` or ``<|eot_id|>`` typed by a user never becomes
    a control token. Control tokens are added only by id (`control_tokens`).
    """

    vocab_size: int
    """All ids, including those of added and control tokens, are below this number."""
    control_tokens: dict[str, int]
    """Ids of all control tokens by their text."""
    bos_id: int | None
    eos_id: int
    add_bos: bool
    """Whether the base was trained with BOS at the start of every text."""
    stop_ids: frozenset[int]
    """Ids that end a generated text; always include ``eos_id``."""
    chat_template: str | None
    """The base's own Jinja template, or None."""
    strips_space: bool = False
    """Whether `encode` adds a space at the start of a text and `decode` drops it."""
    space_after_control: bool = False
    """Whether text after a control token gets that space too, as in the base's own library."""

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        """Return the ids of any ``text``, NUL included; a ``continuation`` gets no space at its start.

        Raises:
            UserError: the text has a lone surrogate.
        """
        broken = _SURROGATE.search(text)
        if broken:
            raise UserError(
                f"the text has half of a surrogate pair (U+{ord(broken[0]):04X}) at character "
                f"{broken.start()}; remove it or write the whole character"
            )
        return self._encode_text(text, continuation)

    @abstractmethod
    def _encode_text(self, text: str, continuation: bool) -> list[int]:
        """Return the ids of well-formed text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids`` without control tokens.

        Invalid UTF-8 becomes U+FFFD, one for each broken sequence, as in `bytes.decode`.
        """
        decoder = StreamDecoder(self)
        return "".join([decoder.push(token) for token in ids]) + decoder.flush()

    def spelling(self, token: int | None) -> str:
        """Return the text of a control token; empty for other ids, and for None."""
        return next((text for text, id_ in self.control_tokens.items() if id_ == token), "")

    @abstractmethod
    def piece(self, token: int) -> bytes:
        """Return a token's bytes; none for control tokens and unused ids."""


class StreamDecoder:
    """Decodes token by token: what all `push` calls and `flush` return is `Tokenizer.decode`'s text.

    A character whose bytes are spread over several tokens is returned with the last of them. The cost of a
    token does not depend on how many came before.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.strips_space

    def push(self, token: int) -> str:
        """Return the characters that ``token`` completes."""
        piece = self._tokenizer.piece(token)
        if piece and self._strip:
            piece, self._strip = piece.removeprefix(b" "), False
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD for an incomplete character."""
        return self._utf8.decode(b"", final=True)


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Refuse a tokenizer with ids beyond an embedding of ``rows`` rows."""
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, but the embedding has {rows:,} rows; "
            "the tokenizer belongs to another model"
        )
