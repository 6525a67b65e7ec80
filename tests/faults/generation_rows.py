"""Faults 80 to 89, 100 and 101: generation settings, prompts, and logits that are NaN or infinite."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from bench import Bench, Outcome, Row
from safetensors.torch import load_file, save_file

import lit_adapter
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.text.tokenizer import StreamDecoder


def same_as_greedy(bench: Bench) -> str:
    model = lit_adapter.load(bench.adapter, bench.base, device="cpu", dtype="float32")
    greedy = model.generate("Say it back.", max_new_tokens=8)
    return str(model.generate("Say it back.", max_new_tokens=8, temperature=0.0, seed=5) == greedy)


def most(bench: Bench, **settings: float) -> str:
    """A setting at its end is no error: an answer comes."""
    model = lit_adapter.load(bench.adapter, bench.base, device="cpu", dtype="float32")
    text = model.generate("Say it back.", max_new_tokens=4, temperature=1.0, **settings)
    return f"answered: {isinstance(text, str)}"


def beyond_fp32(bench: Bench, tensor: str) -> str:
    """A base whose weights are finite, but not what it computes from them."""

    def change(source: Path) -> None:
        state = load_file(source / "model.safetensors")
        state[tensor].fill_(3e38)
        save_file(state, source / "model.safetensors")

    folder = bench.new_base(change)
    model: AdaptedLlama = lit_adapter.load(base=folder, device="cpu", dtype="float32")
    return model.generate("Say it back.", max_new_tokens=4)


def first_token_ends(bench: Bench) -> str:
    model = lit_adapter.load(bench.adapter, bench.base, device="cpu", dtype="float32")
    ids = model.template.encode_prompt(model.tokenizer, "Say it back.")
    stop = int(model.logits(torch.tensor([ids]))[0, -1].argmax())
    return repr(model.generate("Say it back.", max_new_tokens=9, stop_ids=(stop,)))


def half_a_character(bench: Bench) -> str:
    """Pieces of a character that come one by one show nothing until it is whole."""
    model = lit_adapter.load(base=bench.base, device="cpu", dtype="float32")
    decoder = StreamDecoder(model.tokenizer)
    pieces = [decoder.push(token) for token in model.tokenizer.encode("\U0001f468")]
    return f"{pieces[:-1] == [''] * (len(pieces) - 1)} {pieces[-1] == chr(0x1F468)} {decoder.flush()!r}"


def cache_and_whole(bench: Bench) -> str:
    """Greedy tokens of the cached decoding, and of the full forward pass token by token."""
    model = lit_adapter.load(bench.adapter, bench.base, device="cpu", dtype="float32")
    ids = model.template.encode_prompt(model.tokenizer, "Say it back.")
    whole = list(ids)
    for _ in range(6):
        whole.append(int(model.logits(torch.tensor([whole]))[0, -1].argmax()))
    text = model.generate("Say it back.", max_new_tokens=6)
    return str(text == model.tokenizer.decode(whole[len(ids) :]) or model.tokenizer.eos_id in whole)


def call(function: object, **settings: float) -> object:
    return lambda bench: bench.call(function, bench, **settings)


def option(*given: object) -> object:
    return lambda bench: bench.generate(*given)


def answered(bench: Bench, source: object, *given: object) -> Outcome:
    return bench.generate("--prompts", source, "--output", bench.folder / "answers.jsonl", *given)


def from_standard_input(content: bytes) -> Callable[[Bench], Outcome]:
    def tried(bench: Bench) -> Outcome:
        bench.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return answered(bench, "-")

    return tried


def empty_prompt(bench: Bench) -> Outcome:
    return bench.generate("--prompt", "")


def empty_template(bench: Bench) -> Outcome:
    return bench.call(lit_adapter.load, base=bench.base, template="", device="cpu", dtype="float32")


ROWS = [
    Row(80, "temperature 0", call(same_as_greedy), r"^True$", 0),
    Row(80, "negative temperature", option("--temperature=-1"), r"temperature is -1.0; expected a finite"),
    Row(
        80,
        "temperature nan",
        option("--temperature", ".nan"),
        r"temperature is nan; expected a finite number",
    ),
    Row(
        80,
        "temperature inf",
        option("--temperature", ".inf"),
        r"temperature is inf; expected a finite number",
    ),
    Row(81, "negative top_k", option("--top_k=-3"), r"top_k is -3; expected 0 \(off\) or more"),
    Row(81, "top_k beyond the vocabulary", call(most, top_k=10**6), r"answered: True", 0),
    Row(82, "top_p 0", option("--top_p", 0), r"top_p is 0.0; expected a number above 0, up to 1"),
    Row(82, "top_p 2", option("--top_p", 2), r"top_p is 2.0; expected a number above 0, up to 1"),
    Row(83, "no new token", option("--max_new_tokens", 0), r"max_new_tokens is 0; expected 1 or more"),
    Row(
        83, "past the context", option("--max_new_tokens", 5000), r"exceed the base's context of 1024; lower"
    ),
    Row(
        83,
        "negative stop id",
        option("--stop_ids", "3", "-1"),
        r"stop_ids holds -1; expected token ids, 0 or",
    ),
    Row(
        83,
        "stop id beyond the vocabulary",
        option("--stop_ids", "3", "99999"),
        r"stop_ids holds 99999, but the base's vocabulary ends at \d+",
    ),
    Row(
        83,
        "stop id of a file beyond the vocabulary",
        lambda b: b.generate(
            *("--prompts", b.records, "--output", b.folder / "answers.jsonl", "--stop_ids", "99999")
        ),
        r"^error: stop_ids holds 99999, but",
    ),
    Row(84, "empty template", empty_template, r"template '' is unknown; expected alpaca"),
    Row(84, "empty prompt", empty_prompt, r"prompt"),
    Row(
        85,
        "long prompt",
        option("--prompt", "word " * 2000),
        r"tokens, but the base's context is 1024; shorten",
    ),
    Row(
        86,
        "logits nan",
        call(beyond_fp32, tensor="model.norm.weight"),
        r"logits are NaN or infinite; the base",
        2,
        True,
    ),
    Row(
        86,
        "logits inf",
        call(beyond_fp32, tensor="lm_head.weight"),
        r"logits are NaN or infinite; the base",
        2,
        True,
    ),
    Row(87, "end at the first token", call(first_token_ends), r"^''$", 0),
    Row(88, "half a character", call(half_a_character), r"^True True ''$", 0),
    Row(89, "cache against whole", call(cache_and_whole), r"^True$", 0),
    Row(
        100,
        "prompts of an unknown format",
        lambda b: answered(b, b.file("prompts.xlsx", "x")),
        r"prompts\.xlsx: unknown data format \(suffix '\.xlsx'\); expected \.json, .*\.txt",
    ),
    Row(
        100, "empty standard input", from_standard_input(b"\n"), r"standard input is empty; expected prompts"
    ),
    Row(
        100,
        "a broken line on standard input",
        from_standard_input(b'{"instruction": "a"}\n{"instruction": 3}'),
        r"standard input:2: 'instruction' is the number 3; expected a string",
    ),
    Row(
        100,
        "a table without the instruction on standard input",
        from_standard_input(b"text,label\na,b\n"),
        r"standard input:1: 'text,label' looks like .* without a column 'instruction'; name",
    ),
    Row(101, "one choice", option("--choices", "a"), r"choices holds 1; expected two or more answers"),
    Row(101, "a choice twice", option("--choices", "a,b,a"), r"choices holds 'a' twice; keep one"),
    Row(101, "an empty choice", option("--choices", "a,,b"), r"choices holds an empty answer; write a text"),
    Row(
        101,
        "a long choice",
        option("--choices", "a," + "b " * 2000),
        r"the prompt's \d+ tokens and the \d+ of choice 'b .* exceed the base's context of 1024; shorten",
    ),
    Row(
        101,
        "a long choice for a file",
        lambda b: answered(b, b.records, "--choices", "a," + "b " * 2000),
        r"json:\d+: the prompt's \d+ tokens and the \d+ of choice 'b ",
    ),
]
