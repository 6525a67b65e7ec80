"""The vocabulary inside a GGUF file, written as the tokenizer files that a base folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_adapter import files
from lit_adapter.errors import UserError
from lit_adapter.text.tiktoken_ranks import SPLIT as LLAMA3_SPLIT

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # token types of the format

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "default": [_BYTE_LEVEL],
    "gpt-2": [_BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
        _BYTE_LEVEL | {"use_regex": False},
    ],
}
_PRE_TOKENIZERS["llama3"] = _PRE_TOKENIZERS["llama-bpe"]


def write_gguf_tokenizer(values: dict[str, Any], out: Path) -> None:
    """Write the vocabulary of a GGUF file into a folder.

    A byte-level BPE becomes ``tokenizer.json``, a sentencepiece vocabulary ``tokenizer.model``; control
    tokens, BOS and chat template go to ``tokenizer_config.json``.

    Args:
        values: the file's fields as plain values, by name.
        out: the folder.

    Raises:
        UserError: a kind of vocabulary, or a way to cut words, that is not known here.
    """
    kind = values.get("tokenizer.ggml.model")
    tokens = values.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UserError("GGUF: no vocabulary (tokenizer.ggml.tokens) in the file")
    if kind == "gpt2":
        files.write_json(out / "tokenizer.json", _byte_level_bpe(values))
    elif kind == "llama":
        files.write_bytes(out / "tokenizer.model", _sentencepiece(values))
    else:
        raise UserError(f"GGUF: tokenizer.ggml.model is {kind!r}; expected gpt2 or llama")
    files.write_json(out / "tokenizer_config.json", _settings(values))


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    tokens = values["tokenizer.ggml.tokens"]
    settings: dict[str, Any] = {}
    for name in ("bos", "eos"):
        number = values.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None:
            settings[f"{name}_token"] = tokens[number]
    default = values["tokenizer.ggml.model"] == "llama"
    settings["add_bos_token"] = bool(values.get("tokenizer.ggml.add_bos_token", default))
    if values.get("tokenizer.chat_template"):
        settings["chat_template"] = values["tokenizer.chat_template"]
    return settings


def _byte_level_bpe(values: dict[str, Any]) -> dict[str, Any]:
    pre = values.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise UserError(f"GGUF: tokenizer.ggml.pre is {pre!r}; known are {', '.join(_PRE_TOKENIZERS)}")
    tokens = values["tokenizer.ggml.tokens"]
    types = values.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": text, **flags, "special": kind != _USER_DEFINED}
            for number, (text, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in ("llama-bpe", "llama3"),
            "vocab": {text: number for number, text in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in values.get("tokenizer.ggml.merges", [])],
        },
    }


def _sentencepiece(values: dict[str, Any]) -> bytes:
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto()
    tokens, scores = values["tokenizer.ggml.tokens"], values.get("tokenizer.ggml.scores")
    types = values.get("tokenizer.ggml.token_type")
    if not scores or not types or not len(tokens) == len(scores) == len(types):
        raise UserError("GGUF: a sentencepiece vocabulary needs a score and a type for every token")
    for text, score, kind in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=text, score=score, type=kind)  # the format's types are sentencepiece's own
    trainer = model.trainer_spec
    trainer.model_type = protobuf.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = _BYTE in types
    trainer.bos_id = values.get("tokenizer.ggml.bos_token_id", 1)
    trainer.eos_id = values.get("tokenizer.ggml.eos_token_id", 2)
    trainer.unk_id = values.get("tokenizer.ggml.unknown_token_id", 0)
    trainer.pad_id = -1
    for name in ("bos", "eos", "unk"):
        setattr(trainer, f"{name}_piece", tokens[getattr(trainer, f"{name}_id")])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(values.get("tokenizer.ggml.add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return model.SerializeToString()
