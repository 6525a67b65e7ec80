"""LLaMA 1 and 2: a sentencepiece ``tokenizer.model``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from lit_adapter.errors import UserError
from lit_adapter.text.huggingface import default_chat_template
from lit_adapter.text.tokenizer import Tokenizer


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with the settings that lie beside it.

    Raises:
        UserError: a damaged file.
    """

    has_leading_space = True

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        try:
            self.model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a usable sentencepiece model: {str(error).strip()}") from None
        self.vocab_size = self.model.vocab_size()
        self.bos_id = self.model.bos_id() if self.model.bos_id() >= 0 else None
        if self.model.eos_id() < 0:
            raise UserError(f"{path}: the model has no end-of-text token")
        self.eos_id = self.model.eos_id()
        stop = [number for number in settings["stop_ids"] if number < self.vocab_size]
        self.stop_ids = frozenset([self.eos_id, *stop])
        self.add_bos = bool(settings.get("add_bos_token", True)) and self.bos_id is not None
        self.chat_template = default_chat_template(settings)

    @cached_property
    def control_tokens(self) -> dict[str, int]:  # type: ignore[override]
        """Return every control token's spelling and id."""
        ids = range(self.vocab_size)
        return {self.model.id_to_piece(i): i for i in ids if self.model.is_control(i)}

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of ``text``; sentencepiece never makes a control token of it."""
        start = [self.bos_id] if bos and self.bos_id is not None else []
        return [*start, *self.model.encode(text), *([self.eos_id] if eos else [])]

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of ``text`` without the leading space that a start of text gets."""
        # A line break never merges with what follows, so what comes after it is not at a start.
        return self.model.encode("\n" + text)[len(self.model.encode("\n")) :]

    def token_bytes(self, token: int) -> bytes:
        """Return what a token adds to a text, in UTF-8; nothing for a control token."""
        if not 0 <= token < self.vocab_size or self.model.is_control(token):
            return b""
        piece = self.model.id_to_piece(token)
        if self.model.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return " ⁇ ".encode() if self.model.is_unknown(token) else piece.replace("▁", " ").encode()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``, control tokens left out."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace").removeprefix(" ")
