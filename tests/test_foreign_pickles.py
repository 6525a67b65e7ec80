"""Torch files of strangers: what an adapter needs is read, nothing else is built, no code runs."""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_adapters import sizes

from lit_adapter.errors import UserError
from lit_adapter.model.config import LlamaConfig
from lit_adapter.weights.adapter_file import BaseIdentity, read_adapter
from lit_adapter.weights.base_search import base_at_hand, find_base
from lit_adapter.weights.foreign.convert import ConversionOptions, convert_adapter
from lit_adapter.weights.foreign.pickles import read_torch_file
from lit_adapter.weights.foreign.recognise import FORMATS, open_adapter, recognise
from lit_adapter.weights.shards import TorchShard


def saved(path: Path, content: Any, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-1.6"])
def test_tensors_containers_and_a_namespace_are_read(tmp_path: Path, legacy: bool) -> None:
    args = argparse.Namespace(lr=None, adapter_layer=30, betas=[0.9, 0.95], out="x", amp=True)
    content = {
        "model": collections.OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.ones(2).bfloat16()),
        "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"betas": (0.9, 0.95)}]},
        "epoch": 4,
        "scaler": {"scale": 65536.0},
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "args": args,
    }
    found = read_torch_file(saved(tmp_path / "x.pth", content, legacy=legacy))
    assert found["args"] == args
    assert torch.equal(found["model"]["a"], content["model"]["a"])
    assert found["optimizer"]["param_groups"] == [{"betas": (0.9, 0.95)}]


class Shell:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {self.marker}",)


class Call:
    """Anything callable, called when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


class Stated:
    """An object of a class of its own, with a state."""


def hostile(marker: Path) -> dict[str, Any]:
    shell = Shell(marker)
    code = f"open({str(marker)!r}, 'w')"
    return {
        "alone": shell,
        "in the model": {"model": {"adapter_query.weight": shell}},
        "in the optimizer": {"model": {}, "optimizer": {"state": [shell]}},
        "in args": {"model": {}, "args": argparse.Namespace(lr=shell)},
        "as a key": {"model": {("a", 1): torch.ones(1)}},
        "eval": {"x": Call(eval, code)},
        "exec": {"x": Call(exec, code)},
        "getattr": {"x": Call(getattr, "", "join")},
        "import": {"x": Call(__import__, "os")},
        "torch.load": {"x": Call(torch.load, str(marker))},
        "a path": {"args": argparse.Namespace(out=Path("x"))},
        "a class": {"model": Stated},
        "an object": {"model": Stated()},
        "a nested namespace": {"args": argparse.Namespace(inner=argparse.Namespace(a=1))},
        "a tensor in args": {"args": argparse.Namespace(a=torch.ones(1))},
        "a set": {"x": {1, 2}},
        "a counter": {"x": collections.Counter("ab")},
        "a dtype": {"x": torch.float32},
        "sparse": {"x": torch.ones(2, 2).to_sparse()},
        "a namespace called": {"x": Call(argparse.Namespace, 3)},
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("name", hostile(Path("x")))
def test_everything_else_is_refused_and_nothing_runs(tmp_path: Path, name: str, legacy: bool) -> None:
    marker = tmp_path / "marker"
    path = saved(tmp_path / "x.pth", hostile(marker)[name], legacy=legacy)
    with pytest.raises(UserError, match=r"x\.pth: .") as caught:
        read_torch_file(path)
    assert not marker.exists()
    assert "\n" not in str(caught.value)


def test_the_hostile_files_would_run(tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    for name in ("in args", "eval"):
        marker = tmp_path / name.replace(" ", "-")
        torch.load(saved(tmp_path / "x.pth", hostile(marker)[name]), weights_only=False)
        assert marker.exists()


def test_a_plain_pickle_and_a_foreign_zip_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Shell(marker)))
    foreign = tmp_path / "foreign.pth"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Shell(marker)))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    for path in (plain, foreign):
        with pytest.raises(UserError, match=rf"{path.name}: (damaged|truncated)"):
            read_torch_file(path)
    assert not marker.exists()


def test_a_file_cut_or_changed_anywhere_is_refused_or_read_whole(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"model": {"transformer.h.1.attn.gating_factor": torch.ones(1, 4, 1, 1)}}, stream)
    whole, path = stream.getvalue(), tmp_path / "x.pth"
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError):
            read_torch_file(path)
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            recognise(open_adapter(path))
        except UserError:
            continue


@pytest.mark.parametrize("content", [b"P", b"PK", b"weights, once", b"\x1f\x8b\x08\x00" + bytes(90)])
@pytest.mark.parametrize("read", [read_torch_file, TorchShard])
def test_what_begins_otherwise_is_called_damaged(tmp_path: Path, content: bytes, read: Any) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    reason = "truncated or damaged: it does not begin as a torch.save file; fetch it again"
    assert str(caught.value) == f"{path}: {reason}"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("content", [b"\x80" * 8, b"\x80\x04\x95\x0c"])
@pytest.mark.parametrize("read", [read_torch_file, TorchShard])
def test_torchs_own_words_are_left_out(tmp_path: Path, content: bytes, read: Any) -> None:
    """Its warning of another pickle protocol, and its advice of several lines."""
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"\((EOFError|Unsupported operand 149)\)|objects than tensors, "):
        read(path)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    content: Any = 1
    for _ in range(30):
        content = [content]
    with pytest.raises(UserError, match="nested more than 20 deep"):
        read_torch_file(saved(tmp_path / "x.pth", {"x": content}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list; expected named tensors"),
        ({"model": {}}, "holds a dict; expected named tensors"),
        ({"a": 3}, "'a' is not a tensor; expected named tensors only"),
        ({"a": torch.ones(1, dtype=torch.int64)}, r"tensor a is torch\.int64; expected floating point"),
    ],
)
def test_what_is_no_adapter(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_adapter(saved(tmp_path / "x.pth", content))


PROMPT, GATE = "transformer.h.1.attn.adapter_wte.weight", "transformer.h.1.attn.gating_factor"
QUERY = "base_model.model.model.layers.{}.self_attn.adaption_prompt"
WHOLE = torch.ones(3, 16)
STRANGE = {
    "0-d": (PROMPT, torch.tensor(1.0), r"has shape \[\]; expected K x 16"),
    "leading zero": (PROMPT.replace("1", "01"), WHOLE, r"tensor \S+01\S+ does not belong to an adapter"),
    "other digits": (PROMPT.replace("1", "\u0661"), WHOLE, r"tensor \S+ does not belong to an adapter"),
    "expanded": (PROMPT, torch.zeros(1).expand(10**11, 48), "is declared larger than the file's data"),
    "meta": (PROMPT, torch.ones(3, 16, device="meta"), "is not a dense tensor"),
    "nested": (PROMPT, torch.nested.nested_tensor([WHOLE]), "not a dense tensor|holds other objects"),
    "float4": (PROMPT, WHOLE.byte().view(torch.float4_e2m1fn_x2), r"is torch\.float4_\S+; expected floating"),
    "peft": (QUERY.format("01"), WHOLE, "adaption_prompt is missing in every layer"),
}


@pytest.mark.parametrize(("name", "tensor", "message"), STRANGE.values(), ids=STRANGE.keys())
def test_strange_tensors_are_refused(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    model = LlamaConfig.from_hf(sizes(2))
    path = saved(tmp_path / "x.pth", {name: tensor, GATE: torch.ones(1, 4, 1, 1)})

    def read() -> None:
        format_name = "peft" if "adaption" in name else "lit-llama"
        FORMATS[format_name].read(open_adapter(path), model)

    with pytest.raises(UserError, match=message):
        read()


def test_a_shard_with_changed_bytes_is_refused_or_read(tmp_path: Path) -> None:
    whole = saved(tmp_path / "x.bin", {"a": torch.ones(2)}).read_bytes()
    for place in range(0, len(whole), 3):
        (tmp_path / "y.bin").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            TorchShard(tmp_path / "y.bin")
        except UserError:
            continue


def test_a_path_that_cannot_be_looked_at(tmp_path: Path) -> None:
    long = tmp_path / ("a" * 300)
    for attempt in (
        lambda: open_adapter(long),
        lambda: read_adapter(long),
        lambda: convert_adapter(long, tmp_path / "out", ConversionOptions()),
        lambda: convert_adapter(tmp_path / "x", long, ConversionOptions()),
    ):
        with pytest.raises(UserError, match=r"a{300}: cannot read: File name too long"):
            attempt()
    base = BaseIdentity(long.name, "weights", "tokenizer")
    assert base_at_hand(base, tmp_path / "x") is None
    with pytest.raises(UserError, match=r"no converted base checkpoints/a{300} in "):
        find_base(base, tmp_path / "x")
