"""The tokenizer of a base folder, chosen by what the folder holds; and decoding as tokens come."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError
from lit_adapter.files import read_json
from lit_adapter.text.tokenizer import Tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a base's tokenizer from ``tokenizer.json`` or ``tokenizer.model``.

    Raises:
        UserError: no such file, or one that is damaged.
    """
    from lit_adapter.text import huggingface, sentencepiece_model, tiktoken_ranks

    folder = Path(folder)
    settings = _settings(folder)
    if (folder / "tokenizer.json").is_file():
        return huggingface.HuggingFaceTokenizer(folder / "tokenizer.json", settings)
    model = folder / "tokenizer.model"
    if not model.is_file():
        raise UserError(f"{folder}: neither tokenizer.json nor tokenizer.model is there; convert the base again")
    if tiktoken_ranks.is_tiktoken(model):
        tokenizer = huggingface.from_definition(
            tiktoken_ranks.definition(model), model, tiktoken_ranks.SETTINGS | settings
        )
        tokenizer.stop_ids |= {tokenizer.control_tokens["<|eot_id|>"]}
        return tokenizer
    return sentencepiece_model.SentencePieceTokenizer(model, settings)


def _settings(folder: Path) -> dict[str, Any]:
    """Collect what the folder's small files say: control tokens, stop ids, chat template."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            raw = read_json(folder / name)
            if not isinstance(raw, dict):
                raise UserError(f"{folder / name}: expected a JSON object")
            settings |= raw
    if (folder / "chat_template.jinja").is_file():
        settings["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    settings["stop_ids"] = _stop_ids(folder)
    return settings


def _stop_ids(folder: Path) -> list[int]:
    """Return the end-of-text ids that the model's own files name; a file may name one or several."""
    found: list[int] = []
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            ids = read_json(folder / name).get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else []
    return found


def check_vocabulary(tokenizer: Tokenizer, n_rows: int) -> None:
    """See that every id has a row in the embedding.

    Raises:
        UserError: more ids than rows; names both.
    """
    if tokenizer.vocab_size > n_rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the embedding only {n_rows} rows; "
            "this tokenizer belongs to another model"
        )


class StreamDecoder:
    """Text of tokens as they come; never ends inside a character, and does the same work for every token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.at_start = True

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes."""
        return self._first_space_off(self.utf8.decode(self.tokenizer.token_bytes(token)))

    def flush(self) -> str:
        """Return what is left of a character that never came whole."""
        return self._first_space_off(self.utf8.decode(b"", final=True))

    def _first_space_off(self, text: str) -> str:
        if not text or not self.at_start:
            return text
        self.at_start = False
        return text.removeprefix(" ") if self.tokenizer.has_leading_space else text
