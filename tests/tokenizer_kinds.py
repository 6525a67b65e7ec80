"""Small tokenizers of every kind, trained once by the original libraries, and the libraries' own answers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_adapter.text.byte_pairs import LLAMA3_PATTERN, llama3_control_tokens
from lit_adapter.text.gguf_vocabulary import write_gguf_tokenizer
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.tokenizer import Tokenizer
from lit_adapter.weights.gguf_header import read_header

CORPUS = [
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "### Instruction:\nName three colours.\n\n### Response:\nRed, green, blue.",
    "The quick brown fox jumps over the lazy dog; it's 12345 times we'll count, won't we?",
    "    indented code = {'a': 1}\n\tif x:\n\t\treturn  x",
    "Grüße aus Köln, café naïve; 東京 日本語 日本; שלום עולם; привет мир",
    "user assistant system [INST] [/INST] Hello Hello hello",
] * 8
HARD = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n \n",
    "\t\r\n",
    " leading space",
    "  two",
    "trailing ",
    "Hello, world! 1234567",
    "it's we'll DON'T",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "東京タワー、日本",
    "שלום \u202eעולם\u202c مرحبا",
    "e\u0301 \u212b \ufb01",
    "a\0b",
    "\x01\x02\x7f\x85\u2028\ufeff",
    "▁▁ Ġ <0x41>",
    "</s> <s> <unk> <|im_start|>user <|eot_id|><|begin_of_text|>",
    "{instruction} {input} {0} %s %(x)d {{ x }}",
    "a" * 300,
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2_CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@dataclass
class Kind:
    """A tokenizer folder, ours loaded from it, and what the original library makes of a text."""

    folder: Path
    reference: Callable[[str], list[int]]
    reference_decode: Callable[[list[int]], str]
    transformers: Any = None
    ours: Tokenizer = field(init=False)

    def __post_init__(self) -> None:
        self.ours = load_tokenizer(self.folder)


@cache
def sentencepiece_model() -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        model_type="bpe",
        vocab_size=480,
        hard_vocab_limit=False,
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return written.getvalue()


def make_sentencepiece(folder: Path) -> Kind:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return _sentencepiece_kind(folder)


def make_gguf_sentencepiece(folder: Path) -> Kind:
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    size = model.vocab_size()
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in range(size)
    ]
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([model.get_score(i) for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    _finish_gguf(writer, folder)
    return _sentencepiece_kind(folder)


def _sentencepiece_kind(folder: Path) -> Kind:
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    return Kind(folder, model.encode, model.decode)


@cache
def spaced_json(scheme: str) -> str:
    """A tokenizer.json in sentencepiece's manner, as LLaMA 2's (``prepend``) or newer ones (``first``)."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # Learned word by word, as LLaMA's: no token reaches over a space.
    model.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="always", split=True)
    named = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=[*named, *fallback], limit_alphabet=70, max_token_length=8
    )
    model.train_from_iterator(CORPUS, trainer)
    if scheme == "prepend":
        model.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        model.pre_tokenizer = pre_tokenizers.Sequence([])
    else:
        model.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    raw = json.loads(model.to_str())
    raw["pre_tokenizer"] = None if scheme == "prepend" else raw["pre_tokenizer"]
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in named]
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return json.dumps(raw)


def make_spaced(folder: Path, scheme: str) -> Kind:
    (folder / "tokenizer.json").write_text(spaced_json(scheme))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": LLAMA2_CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return _json_kind(folder, bos_token="<s>", eos_token="</s>", chat_template=LLAMA2_CHAT)


@cache
def byte_level_json() -> str:
    """Trained as SmolLM2's: each digit apart, then GPT-2's way."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(CORPUS, trainer)
    return model.to_str()


def make_byte_level(folder: Path) -> Kind:
    (folder / "tokenizer.json").write_text(byte_level_json())
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"add_bos_token": False}))
    (folder / "chat_template.jinja").write_text(CHATML)
    return _json_kind(folder, **names, chat_template=CHATML)


def make_gguf_byte_level(folder: Path) -> Kind:
    raw = json.loads(byte_level_json())
    vocab = raw["model"]["vocab"]
    control = {token["content"] for token in raw["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in raw["model"]["merges"]])
    writer.add_bos_token_id(vocab["<|im_start|>"])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
    _finish_gguf(writer, folder)
    (folder / "original.json").write_text(byte_level_json())
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    return _json_kind(folder, "original.json", **names)


def _finish_gguf(writer: gguf.GGUFWriter, folder: Path) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    write_gguf_tokenizer(read_header(folder / "m.gguf")[0], folder)


def _json_kind(folder: Path, name: str = "tokenizer.json", **names: str) -> Kind:
    library = PreTrainedTokenizerFast(tokenizer_file=str(folder / name), split_special_tokens=True, **names)

    def encode(text: str) -> list[int]:
        return library(text, add_special_tokens=False)["input_ids"]

    def decode(ids: list[int]) -> str:
        return library.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    chat = PreTrainedTokenizerFast(tokenizer_file=str(folder / name), **names)
    return Kind(folder, encode, decode, chat)


@cache
def ranks() -> dict[bytes, int]:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    decoder = decoders.ByteLevel()
    # The first 256 tokens are single bytes, in the order of the letters that spell them.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    assert decoder.decode(["ĠHello"]) == bytes(letters[c] for c in "ĠHello").decode()
    vocab = model.get_vocab()
    found = {bytes(letters[c] for c in token): id_ for token, id_ in vocab.items()}
    # A word that no merge leads to is a token all the same, as some of LLaMA 3's are.
    return found | {b" zqxw": len(found)}


def make_ranks(folder: Path) -> Kind:
    lines = [
        f"{base64.b64encode(token).decode()} {rank}"
        for token, rank in sorted(ranks().items(), key=lambda p: p[1])
    ]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    (folder / "chat_template.jinja").write_text(LLAMA3_CHAT)
    control = {name: len(ranks()) + place for place, name in enumerate(llama3_control_tokens())}
    library = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks(), special_tokens=control
    )
    return Kind(folder, library.encode_ordinary, library.decode)


MAKERS: dict[str, Callable[[Path], Kind]] = {
    "sentencepiece": make_sentencepiece,
    "gguf-sentencepiece": make_gguf_sentencepiece,
    "json-prepend": lambda folder: make_spaced(folder, "prepend"),
    "json-first": lambda folder: make_spaced(folder, "first"),
    "json-bytes": make_byte_level,
    "gguf-bytes": make_gguf_byte_level,
    "ranks": make_ranks,
}
