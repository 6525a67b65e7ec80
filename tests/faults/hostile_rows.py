"""Faults 106 to 112: files made to hang, to fill the memory or to steer a terminal; Python arguments."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import OK, Bench, Outcome, Row
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lit_adapter
from lit_adapter.weights.adapter_file import METADATA_KEY

SECONDS = 15
"""Within these, whatever a file holds."""
STEER = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e"
"""Sets a terminal's title, clears it, colours it, and reverses what follows."""
STEERED = r"\\x1b\]0;title\\x07\\x1b\[2J\\x9b31m\\u202e"
SPIN = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"


def soon(tried: Callable[[Bench], Outcome]) -> Callable[[Bench], Outcome]:
    """Try it, and see that it does not take long: in processor time, its processes' included."""

    def timed(bench: Bench) -> Outcome:
        start = sum(os.times()[:4])
        outcome = tried(bench)
        assert sum(os.times()[:4]) - start < SECONDS
        return outcome

    return timed


def gguf(*parts: bytes, keys: int = 1, tensors: int = 0) -> Callable[[Bench], Outcome]:
    """Convert a GGUF file of this header."""
    content = struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys) + b"".join(parts)
    return soon(lambda bench: bench.convert(bench.file("model.gguf", content)))


def array(kind: int, count: int) -> bytes:
    """A key ``a`` that claims an array of so many elements."""
    return struct.pack("<Q1sIIQ", 1, b"a", 9, kind, count)


def described(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def chat(template: str, *, training: bool) -> Callable[[Bench], Outcome]:
    """Train on a base, or ask one, whose own chat template this is."""

    def tried(bench: Bench) -> Outcome:
        folder = bench.strange_base(lambda folder: described(folder, chat_template=template))
        if training:
            return bench.finetune("--data.template", "chat", base=folder)
        return bench.call(lit_adapter.load, base=folder, template="chat", device="cpu", dtype="float32")

    return soon(tried)


def split_by(folder: Path, pattern: str) -> None:
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    first = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [first, raw["pre_tokenizer"]]}
    path.write_text(json.dumps(raw))


def pattern(how: str) -> Callable[[Bench], Outcome]:
    def tried(bench: Bench) -> Outcome:
        if how == "convert":
            source = bench.copy_source()
            split_by(source, "(a+)+$")
            return bench.convert(source)
        folder = bench.strange_base(lambda folder: split_by(folder, "(a+)+$"))
        if how == "finetune":
            return bench.finetune(base=folder)
        return bench.call(lit_adapter.load, base=folder, device="cpu", dtype="float32")

    return soon(tried)


def base_named(bench: Bench) -> Outcome:
    """An adapter whose metadata holds escape sequences."""
    path = bench.file("adapter.safetensors", bench.adapter.read_bytes())
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[METADATA_KEY])
    about["base"] |= {"name": STEER, "weights": "0" * 64}
    save_file(load_file(path), path, metadata={METADATA_KEY: json.dumps(about)})
    return bench.generate("--adapter", path)


def gguf_key(bench: Bench) -> Outcome:
    name = STEER.encode()
    key = struct.pack("<Q", len(name)) + name + struct.pack("<II", 4, 0)
    return bench.convert(bench.file("model.gguf", struct.pack("<4sIQQ", b"GGUF", 3, 0, 2) + key * 2))


def tensor_name(bench: Bench) -> Outcome:
    folder = bench.copy_source()
    state = load_file(folder / "model.safetensors") | {STEER: torch.ones(2)}
    save_file(state, folder / "model.safetensors")
    return bench.convert(folder)


def template_error(bench: Bench) -> Outcome:
    return chat("{{ raise_exception(" + json.dumps(STEER) + ") }}", training=True)(bench)


def record(bench: Bench) -> Outcome:
    """The preview of a data set shows its first record."""
    data = bench.file("steer.json", [OK | {"instruction": STEER, "output": STEER}] * 20)
    outcome = bench.finetune("--dry-run", data=data)
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(outcome.out + outcome.err)
    return outcome


def wrong_types(bench: Bench) -> Outcome:
    """Each must be refused by its parameter's name; the last of them is returned."""
    model = lit_adapter.load(bench.adapter, bench.base, device="cpu", dtype="float32")
    calls: list[tuple[Callable[..., object], Any, dict[str, Any]]] = [
        (lit_adapter.load, 5, {}),
        (model.generate, None, {}),
        (model.generate, ["a"], {}),
        (model.logits, torch.zeros(1, 5000, dtype=torch.long), {}),
        (model.generate, "a", {"max_new_tokens": True}),
    ]
    outcomes = [bench.call(function, argument, **named) for function, argument, named in calls]
    assert [outcome.status for outcome in outcomes] == [2] * len(calls)
    return outcomes[-1]


ROWS = [
    Row(106, "array of 2 to the 40", gguf(array(4, 2**40)), r"model\.gguf: .*key 'a' is an array of 10995"),
    Row(106, "2 to the 40 texts", gguf(array(8, 2**40)), r"key 'a' is an array of 1099511627776 elements"),
    Row(106, "array beyond its file", gguf(array(4, 10**6)), r"damaged \(4000000 bytes are missing at off"),
    Row(106, "text beyond its file", gguf(struct.pack("<Q", 2**62)), r"damaged \(4611686018427387904 bytes"),
    Row(106, "2 to the 60 tensors", gguf(tensors=2**60), r"1152921504606846976 tensors and 1 keys, expec"),
    Row(
        107,
        "arrays 5,000 deep",
        gguf(array(9, 1) + struct.pack("<IQ", 9, 1) * 5000),
        r"key 'a' is an array of arrays",
    ),
    Row(108, "endless template, training", chat(SPIN, training=True), r"chat template fails: takes more th"),
    Row(
        108,
        "endless template, prompting",
        chat(SPIN, training=False),
        r"chat template fails: takes more than 1 s",
        slow=True,
    ),
    Row(109, "doubled text", chat(DOUBLE, training=True), r"fails: needs more than 400 MB of memory"),
    Row(
        109, "padded text", chat("{{ '%999999999s' % 1 }}", training=False), r"fails: needs more than 400 MB"
    ),
    Row(
        109,
        "a range",
        chat("{% for i in range(10**8) %}{% endfor %}", training=True),
        r"fails: Range too big",
    ),
    Row(
        110, "hostile pattern, training", pattern("finetune"), r"tokenizer\.json: the pattern '\(a\+\)\+\$' f"
    ),
    Row(
        110, "hostile pattern, prompting", pattern("load"), r"tokenizer\.json: the pattern '\(a\+\)\+\$' fai"
    ),
    Row(
        110, "hostile pattern, conversion", pattern("convert"), r"tokenizer\.json: the pattern '\(a\+\)\+\$'"
    ),
    Row(111, "name in an adapter", base_named, STEERED),
    Row(111, "key of a GGUF", gguf_key, STEERED),
    Row(111, "name of a tensor", tensor_name, STEERED),
    Row(111, "text of a template", template_error, STEERED),
    Row(111, "name of a file", lambda b: b.generate("--adapter", f"gone{STEER}"), STEERED),
    Row(111, "text of a record", record, STEERED, 0, writes=True),
    Row(112, "types in Python", wrong_types, r"max_new_tokens is True; expected a whole number"),
]
