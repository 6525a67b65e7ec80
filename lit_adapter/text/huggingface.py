"""Hugging Face's ``tokenizer.json``, run by the tokenizers library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from lit_adapter.errors import UserError
from lit_adapter.files import read_json
from lit_adapter.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Return the characters by which byte-level BPE spells bytes, as GPT-2 chose them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = byte_alphabet()


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` with the settings that lie beside it.

    Raises:
        UserError: a damaged file, or one that names no end of text.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        definition = read_json(path)
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a usable tokenizer: {error}") from None
        self._set_up(backend, definition, path, settings)

    def _set_up(self, backend: Backend, definition: dict[str, Any], path: Path, settings: dict[str, Any]) -> None:
        self.backend = backend
        backend.encode_special_tokens = True  # text is text: no control token comes out of `encode`
        backend.no_truncation()
        backend.no_padding()
        added = definition.get("added_tokens") or []
        self._controls = {token["content"]: token["id"] for token in added if token.get("special")}
        self.byte_level = "ByteLevel" in json.dumps(definition.get("decoder") or {})
        self.has_leading_space = not self.byte_level
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = self._named(settings.get("bos_token"))
        eos = self._named(settings.get("eos_token"))
        stop = [number for number in settings["stop_ids"] if number < self.vocab_size]
        if eos is None and not stop:
            raise UserError(f"{path.parent}: no file there names the end-of-text token (eos_token or eos_token_id)")
        self.eos_id = stop[0] if eos is None else eos
        self.stop_ids = frozenset([self.eos_id, *stop])
        self.add_bos = self._adds_bos(settings)
        self.chat_template = default_chat_template(settings)

    def _named(self, token: Any) -> int | None:
        text = token.get("content") if isinstance(token, dict) else token
        return self.backend.token_to_id(text) if isinstance(text, str) else None

    def _adds_bos(self, settings: dict[str, Any]) -> bool:
        """Follow ``add_bos_token`` where it is said, else what the tokenizer itself puts first."""
        if self.bos_id is None:
            return False
        if isinstance(settings.get("add_bos_token"), bool):
            return settings["add_bos_token"]
        return self.backend.encode("a").ids[:1] == [self.bos_id]

    @property
    def control_tokens(self) -> dict[str, int]:
        """Return every control token's spelling and id."""
        return self._controls

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self._controls.values())

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of ``text``; nothing in it becomes a control token."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        start = [self.bos_id] if bos and self.bos_id is not None else []
        return [*start, *ids, *([self.eos_id] if eos else [])]

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of ``text`` without a leading space of its own."""
        if self.byte_level:
            return self.encode(text)
        # A line break never merges with what follows, so what comes after it is not at a start.
        before = self.encode("\n")
        return self.encode("\n" + text)[len(before) :]

    def token_bytes(self, token: int) -> bytes:
        """Return what a token adds to a text, in UTF-8; nothing for a control token."""
        if token in self._control_ids:
            return b""
        spelled = self.backend.id_to_token(token)
        if spelled is None:
            return b""
        if self.byte_level:
            known = all(character in _BYTE_OF for character in spelled)
            return bytes(_BYTE_OF[character] for character in spelled) if known else spelled.encode()
        byte = _BYTE_TOKEN.fullmatch(spelled)
        return bytes([int(byte[1], 16)]) if byte else spelled.replace("▁", " ").encode()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``, control tokens left out."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.has_leading_space else text

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"backend": self.backend.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"backend": Backend.from_str(state["backend"])}
        self.backend.encode_special_tokens = True


def from_definition(definition: dict[str, Any], path: Path, settings: dict[str, Any]) -> HuggingFaceTokenizer:
    """Return a tokenizer whose ``tokenizer.json`` would read ``definition``; ``path`` is for messages."""
    tokenizer = HuggingFaceTokenizer.__new__(HuggingFaceTokenizer)
    tokenizer._set_up(Backend.from_str(json.dumps(definition)), definition, path, settings)
    return tokenizer


def default_chat_template(settings: dict[str, Any]) -> str | None:
    """Return the default chat template; a file may hold one text, or several by name."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = {item.get("name"): item.get("template") for item in found}.get("default")
    return found if isinstance(found, str) else None
