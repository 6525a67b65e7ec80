"""What `lit_adapter` exports: wrong arguments are errors of Python's kinds, in Python's words."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lit_adapter
from lit_adapter import AdaptedLlama, Sampling, UserError
from lit_adapter.cli.command import run
from lit_adapter.cli.generate import main as generate_main


def as_command(options: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run ``lit-adapter generate`` in this process and return its status and standard error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate.py", "--device", "cpu", *map(str, options)])
        with pytest.raises(SystemExit) as left:
            run(generate_main)
    return int(left.value.code or 0), capsys.readouterr().err


LOADS = [
    ({"adapter": 5}, TypeError, r"^adapter is 5; expected a path \(str or os.PathLike\)$"),
    ({"adapter": b"a"}, TypeError, r"^adapter is of type bytes; expected a path"),
    ({"base": 5}, TypeError, r"^base is 5; expected a path"),
    ({"base": "b", "device": 0}, TypeError, r"^device is 0; expected auto, cpu or cuda"),
    ({"base": "b", "dtype": 16}, TypeError, r"^dtype is 16; expected auto, float32, bfloat16, float16"),
    ({"base": "b", "dtype": ["float32"]}, TypeError, r"^dtype is of type list; expected auto, float32"),
    ({"base": "b", "template": True}, TypeError, r"^template is True; expected text \(str\)"),
    ({}, ValueError, r"^give an adapter, a base, or both"),
    ({"adapter": "gone.safetensors"}, ValueError, r"^gone.safetensors: no such adapter file"),
    ({"adapter": "."}, ValueError, r"^\.: is a folder; name the adapter's file$"),
    (
        {"base": "gone"},
        ValueError,
        r"^gone: no converted base there; python scripts/download.py ORG/NAME --out gone fetches",
    ),
]


@pytest.mark.parametrize(("given", "kind", "message"), LOADS)
def test_load_refuses_in_pythons_kind(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        lit_adapter.load(**given)
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "int8"])
def test_a_precision_that_no_base_is_loaded_in(tiny_base: Path, dtype: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"^dtype is '?{dtype}'?; expected auto, float32, bfloat16, float16"
    ):
        lit_adapter.load(base=tiny_base, device="cpu", dtype=dtype)


HELLO = [{"role": "user", "content": "a"}]
CALLS: list[tuple[Callable[[AdaptedLlama], object], type[Exception], str]] = [
    (lambda m: m.generate(None), TypeError, r"^instruction is None; expected text \(str\)$"),
    (lambda m: m.generate(["a", "b"]), TypeError, r"^instruction is of type list; expected text"),
    (lambda m: m.generate("a", 5), TypeError, r"^input is 5; expected text"),
    (lambda m: m.stream(None), TypeError, r"^instruction is None"),  # at the call, not at the first piece
    (lambda m: m.generate("a", max_new_tokens=True), TypeError, r"^max_new_tokens is True; expected a whole"),
    (lambda m: m.generate("a", max_new_tokens=2.0), TypeError, r"^max_new_tokens is 2.0; expected a whole"),
    (lambda m: m.generate("a", max_new_tokens="2"), TypeError, r"^max_new_tokens is '2'; expected a whole"),
    (lambda m: m.generate("a", max_new_tokens=None), TypeError, r"^max_new_tokens is None; expected a whole"),
    (lambda m: m.generate("a", temperature="1"), TypeError, r"^temperature is '1'; expected a number"),
    (lambda m: m.generate("a", temperature=[1, 2]), TypeError, r"^temperature is of type list; expected a n"),
    (lambda m: m.generate("a", temperature=10**400), TypeError, r"^temperature is 1000"),
    (lambda m: m.generate("a", top_p=True), TypeError, r"^top_p is True; expected a number"),
    (lambda m: m.generate("a", stop=5), TypeError, r"^stop is 5; expected a sequence of texts, or None"),
    (lambda m: m.generate("a", stop=[5]), TypeError, r"^an element of stop is 5; expected text"),
    (lambda m: m.generate("a", stop_ids=[1.5]), TypeError, r"^an element of stop_ids is 1.5; expected a wh"),
    (lambda m: m.generate("a", temprature=1), TypeError, r"'temprature'; did you mean 'temperature'"),
    (lambda m: m.generate("a", seed=-1), ValueError, r"^seed is -1; expected a whole number from 0"),
    (lambda m: m.generate_batch([("a", "")], batch_size=0), ValueError, r"^batch_size is 0; expected 1 or"),
    (lambda m: m.generate_batch([("a", "")], batch_size=True), TypeError, r"^batch_size is True; expected a"),
    (
        lambda m: m.logits([[1, 2]]),
        TypeError,
        r"^ids is of type list; expected a tensor of token ids \[B, T\]",
    ),
    (lambda m: m.logits(torch.ones(1, 4)), TypeError, r"^ids is of dtype torch.float32; expected token ids"),
    (lambda m: m.logits(torch.tensor([1, 2])), ValueError, r"^ids has shape \[2\]; expected \[B, T\]"),
    (lambda m: m.logits(torch.zeros(1, 0, dtype=torch.long)), ValueError, r"^ids has shape \[1, 0\]"),
    (
        lambda m: m.logits(torch.zeros(1, 1025, dtype=torch.long)),
        ValueError,
        r"^ids has 1025 positions, but the base's context is 1024; shorten it",
    ),
    (
        lambda m: m.logits(torch.tensor([[0, 9999]])),
        ValueError,
        r"^ids holds 9999; expected token ids from 0",
    ),
    (lambda m: m.logits(torch.tensor([[0, -1]])), ValueError, r"^ids holds -1; expected token ids from 0"),
    (
        lambda m: m.logits(torch.zeros(1, 2, dtype=torch.long).to_sparse()),
        TypeError,
        r"^ids is a sparse",
    ),
    (lambda m: m.logits(torch.zeros(1, 2, dtype=torch.long, device="meta")), TypeError, r"^ids is a sparse"),
    (lambda m: m.generate("a", top_k=torch.tensor(True)), TypeError, r"^top_k is of type Tensor; expected"),
    (lambda m: m.generate("a", top_p=torch.tensor(True)), TypeError, r"^top_p is of type Tensor; expected"),
    (lambda m: m.generate("a", top_k=torch.tensor([1, 2])), TypeError, r"^top_k is of type Tensor; expected"),
    (lambda m: m.generate("a", top_p=np.True_), TypeError, r"^top_p is of type bool; expected a number"),
    (lambda m: m.generate("a", top_p=np.array("1")), TypeError, r"^top_p is of type ndarray; expected a num"),
    (lambda m: m.generate("a", top_p=bytearray(b"1")), TypeError, r"^top_p is of type bytearray; expected"),
    (lambda m: m.choose("a", choices={"a": 1, "b": 2}), TypeError, r"^choices is of type dict; expected a l"),
    (lambda m: m.generate(" "), ValueError, r"^instruction is empty; write the task$"),
    (lambda m: m.generate_batch(["a", ""]), ValueError, r"^the instruction of tasks\[1\] is empty; write"),
    (lambda m: m.choose("", choices=["a", "b"]), ValueError, r"^the instruction of tasks\[0\] is empty"),
    (lambda m: m.chat(HELLO, tools=5), TypeError, r"^tools is 5; expected a list of objects, or None$"),
    (lambda m: m.chat(HELLO, tools="x"), TypeError, r"^tools is 'x'; expected a list of objects, or None$"),
    (
        lambda m: m.chat(HELLO, tools=[{"a": object()}]),
        ValueError,
        r"'tools' is not a JSON value: Object of t",
    ),
    (
        lambda m: m.continue_batch([[1], [-1]]),
        ValueError,
        r"^prompts\[1\] holds -1; expected token ids from 0",
    ),
    (lambda m: m.continue_batch([[9999, 1]]), ValueError, r"^prompts\[0\] holds 9999; expected token ids fr"),
    (lambda m: m.continue_batch([1, 2]), TypeError, r"^prompts\[0\] is 1; expected a list of token ids$"),
    (lambda m: m.continue_batch([[1.5]]), TypeError, r"^an element of prompts\[0\] is 1.5; expected a whole"),
    (lambda m: m.continue_batch("ab"), TypeError, r"^prompts is of type str; expected a list of token id"),
    (lambda m: m.with_adapter(5), TypeError, r"^path is 5; expected a path"),
]


@pytest.mark.parametrize(("call", "kind", "message"), CALLS)
def test_a_call_is_refused_in_pythons_kind(
    model: AdaptedLlama, call: Callable[[AdaptedLlama], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        call(model)
    assert isinstance(caught.value, UserError)


def test_numbers_of_other_libraries_and_other_sequences_are_taken(model: AdaptedLlama) -> None:
    plain = {
        "max_new_tokens": 12,
        "temperature": 0.75,
        "top_p": 0.5,
        "top_k": 50,
        "seed": 3,
        "stop": ("\0",),
        "stop_ids": (7,),
    }
    other = {
        "max_new_tokens": np.int32(12),
        "temperature": torch.tensor(0.75),
        "top_p": np.float32(0.5),
        "top_k": torch.tensor(50),
        "seed": np.int64(3),
        "stop": "\0",
        "stop_ids": np.array([7]),
    }
    assert Sampling(**other) == Sampling(**plain)
    assert {type(value) for value in vars(Sampling(**other)).values()} <= {int, float, tuple}
    assert model.generate("Say it back.", **other) == model.generate("Say it back.", **plain)
    assert Sampling(stop=None, stop_ids=None) == Sampling(stop=[], stop_ids=set()) == Sampling()


def test_an_adapter_of_another_base_is_refused_in_the_callers_words(
    tiny_base: Path,
    fused_base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One check, two audiences: a parameter of `load`, an option of the command."""
    with pytest.raises(UserError, match=r"give its own base with base=\.\.\.$"):
        lit_adapter.load(adapter, fused_base, device="cpu", dtype="float32")
    status, err = as_command(["--adapter", adapter, "--base", fused_base, "--prompt", "a"], capsys)
    assert (status, err.count("\n")) == (2, 1)
    assert re.fullmatch(r"error: .*give its own base with --base\n", err)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"give its folder with base=\.\.\.$"
    ):  # the command's words have ended
        lit_adapter.load(adapter, device="cpu", dtype="float32")
    assert as_command(["--adapter", adapter, "--prompt", "a"], capsys)[1].endswith(
        "give its folder with --base\n"
    )


def test_help_lists_every_setting_with_its_default() -> None:
    listed = re.findall(r"- ``(\w+)`` \((.*?)\)", str(AdaptedLlama.generate.__doc__))
    defaults = {field.name: field.default for field in fields(Sampling)}
    assert dict(listed) == {name: "none" if value == () else repr(value) for name, value in defaults.items()}


def test_repr_says_what_is_loaded(model: AdaptedLlama, tiny_base: Path, adapter: Path) -> None:
    base, file = str(tiny_base), str(adapter)
    assert repr(model) == f"AdaptedLlama(base={base!r}, adapter={file!r}, device='cpu', dtype='float32')"
    assert repr(model.base) == f"AdaptedLlama(base={base!r}, adapter=None, device='cpu', dtype='float32')"
    assert repr(model.base.with_adapter(file)) == repr(model)


def test_what_is_exported_is_there() -> None:
    assert set(lit_adapter.__all__) <= set(dir(lit_adapter))
    assert {name: getattr(lit_adapter, name).__name__ for name in lit_adapter.__all__} == {
        name: name for name in lit_adapter.__all__
    }


def test_a_forked_process_is_refused_not_hung(model: AdaptedLlama) -> None:
    """Computing there would wait for PyTorch's threads, which a fork does not copy."""
    calls = [
        lambda: model.generate("a"),
        lambda: model.logits(torch.zeros(1, 2, dtype=torch.long)),
        lambda: model.base,
        lambda: model.with_adapter("a"),
    ]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a hang is a failure
        for call in calls:
            try:
                call()
            except UserError as error:
                os.write(write, f"{error}\n".encode())
        os._exit(0)
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    with os.fdopen(read) as answer:
        lines = answer.read().splitlines()
    assert len(lines) == len(calls)
    assert set(lines) == {
        f"the model was loaded in process {os.getpid()}, from which this one, {child}, was forked; PyTorch's "
        "threads do not survive that: load it here, or start processes by 'spawn'"
    }
    assert isinstance(model.generate("a", max_new_tokens=1), str)
