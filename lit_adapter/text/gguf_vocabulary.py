"""The vocabulary of a GGUF file, written as Hugging Face tokenizer files.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError, nearest
from lit_adapter.files.write import write_bytes, write_json, write_text
from lit_adapter.text.byte_pairs import Split, byte_level_json
from lit_adapter.text.huggingface import added_token
from lit_adapter.text.sentencepiece_model import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, ModelProto

PRE_TOKENIZERS: dict[str, Split] = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "llama-bpe": "llama3",
    "llama-v3": "llama3",
    "llama3": "llama3",
    "smaug-bpe": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "tekken": "tekken",
    "smollm": "digits",
    "starcoder": "digits",
}
"""Pre-tokenizers by ``tokenizer.ggml.pre``. SmolLM3, whose tokenizer is LLaMA 3's, has that of Smaug."""
PUTS_BOS = ("llama-bpe", "llama-v3", "llama3", "tekken")
"""Kinds of byte-level vocabulary before whose texts llama.cpp puts BOS, unless the file says otherwise."""
BPE = 2


def write_gguf_tokenizer(fields: Mapping[str, Any], out: Path) -> None:
    """Write the tokenizer files of a GGUF vocabulary.

    A byte-level vocabulary (``gpt2``) becomes ``tokenizer.json``, a sentencepiece vocabulary (``llama``)
    ``tokenizer.model``; control tokens and the chat template go into ``tokenizer_config.json``.

    Raises:
        UserError: a key is missing or inconsistent with the others, or the kind of vocabulary is unknown.
    """
    keys = _Keys(fields)
    kind = keys.need("model")
    if kind == "gpt2":
        write_text(out / "tokenizer.json", json.dumps(_byte_level(keys), ensure_ascii=False))
    elif kind == "llama":
        write_bytes(out / "tokenizer.model", _sentencepiece(keys))
    else:
        raise UserError(f"key 'tokenizer.ggml.model' is {kind!r}; expected 'gpt2' or 'llama'")
    write_json(out / "tokenizer_config.json", _config(keys))


class _Keys:
    """The values under ``tokenizer.ggml``, with tokens and types checked against each other."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self.tokens: list[str] = list(self.need("tokens"))
        self.types: list[int] = list(self.get("token_type") or [NORMAL] * len(self.tokens))
        if len(self.types) != len(self.tokens):
            raise UserError(f"{len(self.tokens)} tokens but {len(self.types)} in 'tokenizer.ggml.token_type'")
        if len(set(self.tokens)) != len(self.tokens):
            twice = next(text for i, text in enumerate(self.tokens) if text in self.tokens[:i])
            raise UserError(f"duplicate token {twice!r} in 'tokenizer.ggml.tokens'")

    def get(self, name: str, default: Any = None, prefix: str = "tokenizer.ggml.") -> Any:
        value = self._fields.get(prefix + name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise UserError(f"key 'tokenizer.ggml.{name}' is missing; convert the original checkpoint")
        return value

    def token_id(self, name: str) -> int | None:
        value = self.get(f"{name}_token_id")
        if value is not None and not 0 <= value < len(self.tokens):
            raise UserError(f"'tokenizer.ggml.{name}_token_id' is {value}; expected below {len(self.tokens)}")
        return value

    def token(self, name: str) -> str | None:
        id_ = self.token_id(name)
        return None if id_ is None else self.tokens[id_]

    @property
    def add_bos(self) -> bool:
        by_default = self.get("model") == "llama" or self.get("pre") in PUTS_BOS
        return bool(self.get("add_bos_token", by_default)) and self.token_id("bos") is not None


def _byte_level(keys: _Keys) -> dict[str, Any]:
    pre = keys.need("pre")
    if pre not in PRE_TOKENIZERS:
        hint = nearest(str(pre), list(PRE_TOKENIZERS)) or f"; expected one of {', '.join(PRE_TOKENIZERS)}"
        raise UserError(f"'tokenizer.ggml.pre' is {pre!r}, which is unknown{hint}")
    named = {keys.token_id(name) for name in ("bos", "eos", "eot")}
    added = []
    for id_, (text, kind) in enumerate(zip(keys.tokens, keys.types, strict=True)):
        special = kind in (CONTROL, UNKNOWN) or id_ in named
        if special or kind == USER_DEFINED:
            added.append(added_token(text, id_, special=special))
    vocab = {text: id_ for id_, text in enumerate(keys.tokens)}
    merges = []
    for merge in keys.need("merges"):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise UserError(
                f"'tokenizer.ggml.merges' has {merge!r}; expected two tokens whose join is a token"
            )
        merges.append((left, right))
    bos = keys.token("bos") if keys.add_bos else None
    return byte_level_json(vocab, merges, added, PRE_TOKENIZERS[pre], bos=bos)


def _sentencepiece(keys: _Keys) -> bytes:
    scores = list(keys.need("scores"))
    if len(scores) != len(keys.tokens):
        raise UserError(f"{len(keys.tokens)} tokens but {len(scores)} in 'tokenizer.ggml.scores'")
    if keys.types.count(UNKNOWN) != 1:
        raise UserError("'tokenizer.ggml.token_type' has no unknown token (type 2), or more than one")
    model = ModelProto()
    for text, score, kind in zip(keys.tokens, scores, keys.types, strict=True):
        model.pieces.add(piece=text, score=float(score), type=int(kind))
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = BPE, len(keys.tokens)
    trainer.byte_fallback = "<0x00>" in keys.tokens
    trainer.unk_id, trainer.unk_piece = keys.types.index(UNKNOWN), keys.tokens[keys.types.index(UNKNOWN)]
    for name in ("bos", "eos"):
        id_ = keys.token_id(name)
        setattr(trainer, f"{name}_id", -1 if id_ is None else id_)
        if id_ is not None:
            setattr(trainer, f"{name}_piece", keys.tokens[id_])
            model.pieces[id_].type = CONTROL
    trainer.pad_id = -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(keys.get("add_space_prefix", True))
    normalizer.remove_extra_whitespaces = bool(keys.get("remove_extra_whitespaces", False))
    normalizer.escape_whitespaces = True
    normalizer.precompiled_charsmap = bytes(keys.get("precompiled_charsmap", b""))
    return model.SerializeToString()


def _config(keys: _Keys) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    llama = keys.get("model") == "llama"
    config = {
        **{f"{ours}_token": keys.token(theirs) for ours, theirs in names.items()},
        "add_bos_token": keys.add_bos,
        "clean_up_tokenization_spaces": False,
        "legacy": False if llama else None,
        "tokenizer_class": "LlamaTokenizer" if llama else "PreTrainedTokenizerFast",
        "chat_template": keys.get("chat_template", prefix="tokenizer."),
    }
    return {key: value for key, value in config.items() if value is not None}
