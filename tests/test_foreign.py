"""Adapters of other code bases: read as their own logits say, written back bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from finetune_runs import TINY
from foreign_adapters import HERE, IDS, SIZES, base_tensors, converted, logits_of, sizes, write_base
from generation_fixtures import save_random_adapter
from paper import paper
from prefix_formula import reference_logits
from safetensors.torch import load_file, save_file
from tiny_models import transformers_llama
from torch import Tensor

import lit_adapter
from lit_adapter.cli.convert_adapter import SOURCES, TARGETS
from lit_adapter.cli.convert_adapter import main as convert_adapter_main
from lit_adapter.cli.finetune import parse_finetune
from lit_adapter.errors import UserError
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.training.finetune import finetune
from lit_adapter.weights.adapter_file import read_adapter, save_adapter
from lit_adapter.weights.foreign.format import Format
from lit_adapter.weights.foreign.recognise import FORMATS
from lit_adapter.weights.measure import fixed_prompt

FILES = ("lit-llama-v1", "lit-llama-v2", "litgpt-0.5.4-v1", "litgpt-0.5.4-v2")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The base of the files in ``adapters/``, with two and with four key and value heads."""
    folder = tmp_path_factory.mktemp("bases")
    return {groups: write_base(folder, groups) for groups in (2, 4)}


def own_adapter(path: Path, base: Path, config: AdapterConfig, *, equal: bool = False) -> Path:
    """An adapter in our format with random tensors; ``equal``: one value in all gates of a layer."""
    info, state = read_adapter(save_random_adapter(base, path, 7, config))
    for name in state:
        if equal and name.endswith(".gate"):
            state[name] = state[name][:1].expand(len(state[name])).clone()
    save_adapter(path, state, info)
    return path


def stated(path: Path) -> dict[str, Any]:
    return json.loads((HERE / f"{path}.json").read_text())


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_library_itself_gives_its_logits(
    tmp_path: Path, bases: dict[int, Path], name: str
) -> None:
    """Random gates, grouped queries for litgpt; the logits were computed by the library."""
    told, out = stated(Path(name)), tmp_path / "adapter.safetensors"
    lines = converted(HERE / f"{name}.pth", out, bases[told["groups"]])
    found = logits_of(out, told["groups"])[:, :12]
    # Both libraries rotate in fp32.
    torch.testing.assert_close(found, torch.tensor(told["logits"], dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert f"{name[:6]}" in lines[0]
    config = read_adapter(out)[0].adapter
    assert (config.version, config.prompt_length, config.layers) == (name[-2:], 3, 1)
    assert (config.gate, config.head) == ("identity", name.endswith("v2"))
    report = "\n".join(lines)
    assert f"{name[-2:].upper()}, 1 of 2 layers (1 to 1), K 3, gates identity per head" in report
    assert "bit for bit" in report
    assert "largest difference 0 between source and target form" in report


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_recent_litgpt_agrees_where_its_gates_are_closed(
    tmp_path: Path, bases: dict[int, Path], version: str
) -> None:
    """Since 0.5.5 its prefix reads wrong rows; its logits were computed with gates of 0."""
    name, out = f"litgpt-0.5.13-{version}", tmp_path / "adapter.safetensors"
    lines = converted(HERE / f"{name}.pth", out, bases[2])
    assert any("litgpt 0.5.5 and later project the prefix through wrong rows" in line for line in lines)
    info, state = read_adapter(out)
    assert all(bool(tensor.any()) for tensor in state.values())
    closed = {name: tensor * (not name.endswith(".gate")) for name, tensor in state.items()}
    save_adapter(out, closed, info)
    found, wanted = logits_of(out, 2)[:, :12], torch.tensor(stated(Path(name))["logits"], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lit-llama-v1", "lit-llama-v2", "litgpt-0.5.13-v1", "litgpt-0.5.13-v2"])
def test_there_and_back_is_the_same_file_bit_for_bit(
    tmp_path: Path, bases: dict[int, Path], name: str
) -> None:
    source, there, back = HERE / f"{name}.pth", tmp_path / "adapter.safetensors", tmp_path / "back.pth"
    converted(source, there, bases[stated(Path(name))["groups"]])
    target = "litgpt" if name.startswith("litgpt") else "lit-llama"
    converted(there, back, None, to=target)
    before, after = (torch.load(path, weights_only=True) for path in (source, back))
    if target == "litgpt":
        assert before.keys() == after.keys() == {"model"}
        before, after = before["model"], after["model"]
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key], tensor), key


@pytest.mark.parametrize(
    ("target", "version", "head"),
    [
        *((target, "v1", False) for target in ("lit-llama", "litgpt", "peft")),
        *((target, "v2", head) for target in ("lit-llama", "litgpt") for head in (False, True)),
    ],
)
def test_ours_there_and_back(
    tmp_path: Path, bases: dict[int, Path], target: str, version: str, head: bool
) -> None:
    """An untrained head is left out again, and one that was trained is kept."""
    form = "layer" if target == "peft" else "identity"
    config = paper(version=version, prompt_length=3, layers=2, gate=form, head=head)
    ours = own_adapter(tmp_path / "ours.safetensors", bases[4], config)
    there, back = tmp_path / "there", tmp_path / "back.safetensors"
    converted(ours, there, None, to=target)
    converted(there, back, bases[4])
    (one, before), (other, after) = read_adapter(ours), read_adapter(back)
    assert one.adapter == other.adapter
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# The official code is not installable; its file and forward are written here from the published layout.


def official(path: Path, *, single: bool = False, **more: Any) -> tuple[dict[str, Tensor], Path]:
    draw = torch.Generator().manual_seed(3)
    H, C = SIZES["heads"], SIZES["width"]
    gate = (1,) if single else (1, H, 1, 1)
    tensors = {
        "adapter_query.weight": torch.randn(6, C, generator=draw),
        "layers.0.attention.gate": torch.zeros(gate),
        "layers.1.attention.gate": torch.randn(gate, generator=draw),
    }
    torch.save({"model": tensors, **more} if more else tensors, path)
    return tensors, path


@pytest.mark.parametrize("single", [False, True], ids=["per-head", "before-april-2023"])
@pytest.mark.parametrize("gate", ["tanh", "identity"])
@pytest.mark.parametrize("groups", [2, 4])
def test_the_official_adapter(
    tmp_path: Path, bases: dict[int, Path], gate: str, single: bool, groups: int
) -> None:
    tensors, source = official(tmp_path / "adapter.pth", single=single)
    out = tmp_path / "adapter.safetensors"
    lines = converted(source, out, bases[groups], gate=gate)
    prefix = "layers.1.self_attn.prefix"
    own = {
        f"{prefix}.prompt": tensors["adapter_query.weight"],
        f"{prefix}.gate": tensors["layers.1.attention.gate"].flatten().expand(SIZES["heads"]),
    }
    config = LlamaConfig.from_hf(sizes(groups))
    wanted = reference_logits(config, base_tensors(groups), own, gate, torch.tensor(IDS))
    torch.testing.assert_close(logits_of(out, groups), wanted, rtol=1e-6, atol=1e-6)
    assert "decided   layers: the top 1, whose gates are open" in lines
    form = "identity per layer" if single and gate == "identity" else f"{gate} per head"
    assert any(f"1 of 2 layers (1 to 1), K 6, gates {form}" in line for line in lines)


def test_the_official_training_checkpoint_says_its_layers(tmp_path: Path, bases: dict[int, Path]) -> None:
    """Its base's tensors are left alone, its optimizer and scaler read and ignored."""
    import argparse

    args = argparse.Namespace(adapter_layer=2, adapter_len=3, lr=None, betas=[0.9, 0.95], output_dir="x")
    more = {"optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 4, "scaler": {"scale": 65536.0}}
    tensors, source = official(tmp_path / "checkpoint-4.pth", args=args, **more)
    content = torch.load(source, weights_only=False)
    content["model"]["layers.0.attention.wq.weight"] = torch.ones(4, 4)
    content["model"]["layers.0.attention.gate"] = torch.ones(1, SIZES["heads"], 1, 1)
    torch.save(content, source)
    out = tmp_path / "adapter.safetensors"
    lines = converted(source, out, bases[2], gate="tanh")
    assert "decided   layers: 2, as the checkpoint's args say" in lines
    info, state = read_adapter(out)
    assert (info.adapter.prompt_length, info.adapter.layers) == (3, 2)
    table = tensors["adapter_query.weight"]
    assert torch.equal(state["layers.0.self_attn.prefix.prompt"], table[:3])
    assert torch.equal(state["layers.1.self_attn.prefix.prompt"], table[3:])


@pytest.mark.parametrize("n_kv_head", [4, 2], ids=["mha", "gqa"])
def test_peft_loads_ours_and_gives_our_logits(tmp_path: Path, n_kv_head: int) -> None:
    from lit_adapter.weights.convert import convert

    sizes = {"vocab_size": 260, "num_key_value_heads": n_kv_head, "bos_token_id": 256, "eos_token_id": 257}
    theirs = transformers_llama(4, torch.float32, **sizes)
    source = tmp_path / "source"
    theirs.save_pretrained(source)
    from convert_sources import write_tokenizer

    write_tokenizer(source, 260)
    base = convert(source, tmp_path / "base")
    config = paper(prompt_length=5, layers=2, gate="layer")
    ours, folder = tmp_path / "ours.safetensors", tmp_path / "for-peft"
    _, state = read_adapter(save_random_adapter(base, ours, 1, config))
    assert any("largest difference 0 " in line for line in converted(ours, folder, base, to="peft"))

    ids = torch.arange(3, 20)[None]
    plain = theirs(input_ids=ids).logits
    adapted = peft.PeftModel.from_pretrained(theirs, folder).eval()
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits
    model = lit_adapter.load(adapter=ours, base=base, device="cpu", dtype="float32")
    torch.testing.assert_close(model.logits(ids), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - plain).abs().max() > 0.5

    again, pickled = tmp_path / "again", tmp_path / "pickled"
    adapted.save_pretrained(again)
    adapted.save_pretrained(pickled, safe_serialization=False)
    assert not (pickled / "adapter_model.safetensors").exists()
    for source in (again, again / "adapter_model.safetensors", pickled):
        back = tmp_path / "back.safetensors"
        converted(source, back, base, overwrite=True)
        assert all(torch.equal(read_adapter(back)[1][name], tensor) for name, tensor in state.items())
        assert read_adapter(back)[0].adapter == config


def test_gates_that_differ_go_to_peft_only_if_asked_and_are_measured(
    tmp_path: Path, bases: dict[int, Path]
) -> None:
    config = paper(prompt_length=3, layers=2, gate="tanh")
    ours, out = own_adapter(tmp_path / "a.safetensors", bases[2], config), tmp_path / "out"
    with pytest.raises(
        UserError, match=r"peft has one gate per layer, and the gates differ, by up to \d\.\d+ .*--allow"
    ):
        converted(ours, out, bases[2], to="peft")
    assert not out.exists()
    report = "\n".join(converted(ours, out, bases[2], to="peft", allow_lossy=True))
    assert "changed   2 gates, tanh per head to identity per layer: LOSSY" in report
    assert "largest difference 0 " not in report
    state = read_adapter(ours)[1]
    written = peft.utils.load_peft_weights(str(out))
    for layer in (0, 1):
        mean = state[f"layers.{layer}.self_attn.prefix.gate"].double().tanh().mean()
        found = written[f"base_model.model.model.layers.{layer}.self_attn.adaption_gate"]
        assert found.item() == pytest.approx(mean.item(), rel=1e-6)
    equal = own_adapter(tmp_path / "b.safetensors", bases[2], config, equal=True)
    assert "the same function" in "\n".join(converted(equal, tmp_path / "out2", bases[2], to="peft"))


@pytest.mark.parametrize("target", ["lit-llama", "litgpt", "peft"])
def test_gates_per_token_become_their_mean_only_if_asked(
    tmp_path: Path, bases: dict[int, Path], target: str
) -> None:
    config = paper(prompt_length=3, layers=2, gate="token")
    ours, out = own_adapter(tmp_path / "a.safetensors", bases[4], config), tmp_path / "out"
    one = "per layer" if target == "peft" else "per head"
    with pytest.raises(UserError, match=rf"{target} has one gate {one}, and the gates differ, by .*--allow"):
        converted(ours, out, bases[4], to=target)
    report = "\n".join(converted(ours, out, bases[4], to=target, allow_lossy=True))
    assert f"identity per head and prompt token to identity {one}: LOSSY" in report
    back = tmp_path / "back.safetensors"
    converted(out, back, bases[4])
    gates = {name: t for name, t in read_adapter(ours)[1].items() if name.endswith(".gate")}
    for name, gate in gates.items():
        mean = gate.double().view(4, 3).mean(1) if target != "peft" else gate.double().mean()[None]
        torch.testing.assert_close(read_adapter(back)[1][name].double(), mean, rtol=1e-6, atol=1e-7)
    told = float(report.split("largest difference ")[1].split()[0])
    ids = fixed_prompt(bases[4])[0].tolist()
    measured = (logits_of(ours, 4, ids) - logits_of(back, 4, ids)).abs().max()
    assert told == pytest.approx(measured.item(), rel=0.01)


def test_a_gate_per_head_is_the_same_gate_for_every_token(tmp_path: Path, bases: dict[int, Path]) -> None:
    ours = own_adapter(tmp_path / "a.safetensors", bases[2], paper(prompt_length=3, gate="tanh"))
    converted(ours, tmp_path / "b.safetensors", bases[2], to_gate="token")
    assert read_adapter(tmp_path / "b.safetensors")[0].adapter.gate == "token"
    found = logits_of(tmp_path / "b.safetensors", 2)
    torch.testing.assert_close(found, logits_of(ours, 2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", ["lit-llama", "litgpt"])
def test_norms_of_upper_layers_alone_go_to_no_v2_file(
    tmp_path: Path, bases: dict[int, Path], target: str
) -> None:
    """Which would have ones in place of the base's norms below them."""
    ours = own_adapter(tmp_path / "ours.safetensors", bases[4], paper(norms=True, layers=1, gate="identity"))
    with pytest.raises(UserError, match=r"trains none below layer \d; train one with adapter\.layers null"):
        converted(ours, tmp_path / "there.pth", bases[4], to=target)
    assert not (tmp_path / "there.pth").exists()


@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("target", ["lit-llama", "litgpt"])
def test_norms_go_to_a_v2_file(tmp_path: Path, bases: dict[int, Path], target: str, length: int) -> None:
    """With biases of 0 and scales of 1: the same function."""
    config = paper(norms=True, prompt_length=length, gate="identity")
    ours = own_adapter(tmp_path / "ours.safetensors", bases[4], config)
    there, back = tmp_path / "there.pth", tmp_path / "back.safetensors"
    report = "\n".join(converted(ours, there, bases[4], to=target))
    assert "; norms of all layers" in report
    assert "added     biases of 0 and scales of 1" in report
    assert "largest difference 0 between source and target form" in report
    converted(there, back, bases[4])
    assert read_adapter(back)[0].adapter.version == "v2"
    torch.testing.assert_close(logits_of(back, 4), logits_of(ours, 4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["tanh", "layer", "channel"])
def test_gates_into_the_identity_form(tmp_path: Path, bases: dict[int, Path], form: Any) -> None:
    config = paper(prompt_length=3, layers=2, gate=form)
    ours = own_adapter(tmp_path / "ours.safetensors", bases[2], config, equal=form == "channel")
    there, back = tmp_path / "there.pth", tmp_path / "back.safetensors"
    converted(ours, there, None, to="litgpt")
    converted(there, back, bases[2])
    assert read_adapter(back)[0].adapter.gate == "identity"
    torch.testing.assert_close(logits_of(back, 2), logits_of(ours, 2), rtol=1e-6, atol=1e-6)


def test_gates_into_the_tanh_form_only_where_a_tanh_reaches(tmp_path: Path, bases: dict[int, Path]) -> None:
    ours = own_adapter(tmp_path / "a.safetensors", bases[2], paper(prompt_length=3, gate="identity"))
    with pytest.raises(
        UserError, match=r"scales its prefix by \S+, but a tanh stays below 1; use --to-gate id"
    ):
        converted(ours, tmp_path / "b.safetensors", bases[2], to_gate="tanh")
    info, state = read_adapter(ours)
    small = {name: tensor * (0.3 if name.endswith("gate") else 1) for name, tensor in state.items()}
    save_adapter(ours, small, info)
    converted(ours, tmp_path / "b.safetensors", bases[2], to_gate="tanh")
    assert read_adapter(tmp_path / "b.safetensors")[0].adapter.gate == "tanh"
    found = logits_of(tmp_path / "b.safetensors", 2)
    torch.testing.assert_close(found, logits_of(ours, 2), rtol=1e-6, atol=1e-6)


def test_the_old_scalar_gate_of_lit_llama(tmp_path: Path, bases: dict[int, Path]) -> None:
    old = torch.load(HERE / "lit-llama-v1.pth", weights_only=True)
    name = "transformer.h.1.attn.gating_factor"
    for value in (torch.tensor([0.4]), torch.tensor(0.4)):
        old[name] = value
        torch.save(old, tmp_path / "old.pth")
        lines = converted(tmp_path / "old.pth", tmp_path / "old.safetensors", bases[4], overwrite=True)
        assert any("gates identity per layer" in line for line in lines)
        old[name] = torch.full((1, 4, 1, 1), 0.4)
        torch.save(old, tmp_path / "new.pth")
        converted(tmp_path / "new.pth", tmp_path / "new.safetensors", bases[4], overwrite=True)
        found, wanted = (logits_of(tmp_path / f"{age}.safetensors", 4) for age in ("old", "new"))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_old_gate_shape_of_litgpt(tmp_path: Path, bases: dict[int, Path]) -> None:
    new = torch.load(HERE / "litgpt-0.5.4-v1.pth", weights_only=True)
    name = "transformer.h.1.attn.gating_factor"
    assert new["model"][name].shape == (1, 1, 4, 1)
    new["model"][name] = new["model"][name].permute(0, 2, 1, 3).contiguous()
    torch.save(new, tmp_path / "old.pth")
    shutil.copy(HERE / "litgpt-0.5.4-v1.pth", tmp_path / "new.pth")
    for age in ("old", "new"):
        lines = converted(tmp_path / f"{age}.pth", tmp_path / f"{age}.safetensors", bases[2])
        assert "litgpt" in lines[0]
    old, new = (read_adapter(tmp_path / f"{age}.safetensors")[1] for age in ("old", "new"))
    assert all(torch.equal(old[key], tensor) for key, tensor in new.items())


def test_templates_are_those_the_code_bases_train_with(tmp_path: Path, bases: dict[int, Path]) -> None:
    for name, kind in (("lit-llama-v1", "alpaca"), ("litgpt-0.5.4-v1", "alpaca-newline")):
        out = tmp_path / f"{name}.safetensors"
        lines = converted(HERE / f"{name}.pth", out, bases[stated(Path(name))["groups"]])
        assert read_adapter(out)[0].template.kind == kind
        assert any(f"template: {kind}, which {name[:6]}" in line for line in lines)
    text = "Q: {instruction} {input} A:"
    converted(HERE / "lit-llama-v1.pth", tmp_path / "c.safetensors", bases[4], template=text)
    assert read_adapter(tmp_path / "c.safetensors")[0].template.text == text


def test_a_run_starts_from_an_imported_adapter(
    tmp_path: Path, bases: dict[int, Path], tiny_records: Path
) -> None:
    start = tmp_path / "start.safetensors"
    converted(HERE / "litgpt-0.5.4-v2.pth", start, bases[2])
    own = [
        *("--base", bases[2], "--data.train", tiny_records, "--out", tmp_path / "run", "--init-from", start),
        *("--adapter.version", "v2", "--adapter.head", "true", "--adapter.gate", "identity"),
        *("--adapter.layers", 1, "--adapter.prompt_length", 3, "--optim.max_steps", 1, "--optim.lr", 0),
        *("--data.template", "{instruction} {input}:", "--data.max_length", 128, "--trainer.samples", 0),
    ]
    config = parse_finetune(["--config", str(TINY), *map(str, own)]).config
    lines: list[str] = []
    finetune(config, say=lines.append)
    assert f"starting from {start}" in lines
    assert f"{start}: its template is alpaca-newline; this run uses custom" in lines
    before, after = read_adapter(start)[1], read_adapter(tmp_path / "run" / "adapter.safetensors")[1]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_script_prints_its_report(
    tmp_path: Path, bases: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.safetensors"
    argv = [str(HERE / "lit-llama-v2.pth"), "--out", str(out), "--base", str(bases[4])]
    assert convert_adapter_main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("source", "found", "decided", "exact", "reordered", "logits", "wrote"),
    ]


MISTAKES = {
    "nothing": ("missing.pth", {}, r"missing\.pth: no such adapter file or folder"),
    "no base": ("lit-llama-v1.pth", {"base": None}, r"does not say which base it belongs to; .* --base"),
    "gate": ("lit-llama-v1.pth", {"gate": "tanh"}, "--gate is for an official source"),
    "official": ("official.pth", {}, r"does not say how its gates act; add --gate tanh"),
    "template": (
        "ours.safetensors",
        {"template": "alpaca"},
        "--template is for a source of another format",
    ),
    "to gate": ("ours.safetensors", {"to": "peft", "to_gate": "layer"}, "--to-gate is for --to ours"),
    "already": ("ours.safetensors", {}, "is in our format already; add --to with another"),
    "grouped": ("ours.safetensors", {"to": "lit-llama"}, "lit-llama has no model with grouped queries"),
    "v2": (
        "v2.safetensors",
        {"to": "peft"},
        "has no norms, biases or scales, so it cannot hold a V2",
    ),
    "base": ("ours.safetensors", {"to": "peft", "base": 4}, "trained on base 'base-2' .*, not on 'base-4'"),
    "unknown": ("unknown.pth", {}, r"no adapter of a known format: it has a, b, \.\.\.; known are official"),
    "closed": ("closed.pth", {"gate": "tanh"}, "0 open gates in 2 layers do not say how many layers"),
    "from": (
        "litgpt-0.5.13-v2.pth",
        {"given": "lit-llama"},
        r"tensor transformer\.h\.0\.rms_1\.scale is mis",
    ),
    "not from peft": (
        "peft",
        {"given": "litgpt"},
        r"peft: --from says litgpt, but it is peft, recognised by adapter_config\.json; leave --from out",
    ),
    "not from peft's file": (
        "peft/adapter_model.safetensors",
        {"given": "ours"},
        "says ours, but it is peft",
    ),
    "not from ours": (
        "ours.safetensors",
        {"given": "official", "to": "litgpt"},
        "--from says official, but it is ours, recognised by its metadata",
    ),
    "not ours": ("litgpt-0.5.13-v2.pth", {"given": "ours"}, "--from says ours, but it is litgpt, recognised"),
    "peft onto a file": (
        "ours.safetensors",
        {"to": "peft", "out": "v2.safetensors"},
        r"v2\.safetensors: is a file; with --to peft --out names a folder",
    ),
    "a file onto a folder": (
        "ours.safetensors",
        {"to": "litgpt", "out": "peft"},
        "peft: is a folder; with --to litgpt --out names a file",
    ),
    **{
        f"unrotated to {target}": (
            "unrotated.safetensors",
            {"to": target, "base": 4, "allow_lossy": True},
            f"{target} attends to prompts by rotated queries alone, so it cannot hold an adapter of adapter",
        )
        for target in ("lit-llama", "litgpt", "peft")
    },
    "norms to peft": (
        "norms.safetensors",
        {"to": "peft"},
        "so it cannot hold an adapter with norms; use --to",
    ),
    "empty": ("empty.pth", {}, r"empty\.pth: the file is empty; fetch it again"),
}


@pytest.mark.parametrize(("name", "options", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(
    tmp_path: Path, bases: dict[int, Path], name: str, options: dict[str, Any], message: str
) -> None:
    own_adapter(tmp_path / "ours.safetensors", bases[2], paper(prompt_length=3, gate="layer"))
    own_adapter(tmp_path / "v2.safetensors", bases[2], paper(version="v2", prompt_length=3))
    unrotated = paper(prompt_length=3, prefix_query="unrotated")
    own_adapter(tmp_path / "unrotated.safetensors", bases[4], unrotated)
    own_adapter(tmp_path / "norms.safetensors", bases[2], paper(prompt_length=3, norms=True))
    plain = own_adapter(tmp_path / "plain.safetensors", bases[2], paper(prompt_length=3), equal=True)
    converted(plain, tmp_path / "peft", bases[2], to="peft")
    (tmp_path / "empty.pth").touch()
    tensors, _ = official(tmp_path / "official.pth")
    torch.save({key: value * 0 for key, value in tensors.items()}, tmp_path / "closed.pth")
    torch.save({key: torch.ones(2) for key in "abc"}, tmp_path / "unknown.pth")
    for path in HERE.glob("*.pth"):
        shutil.copy(path, tmp_path)
    options = {"base": 2, **options}
    base = bases[options["base"]] if options["base"] else None
    out = tmp_path / options.pop("out", "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    asked = {key: value for key, value in options.items() if key != "base"}
    with pytest.raises(UserError, match=message):
        converted(tmp_path / name, out, base, overwrite=out.exists(), **asked)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_command_line_offers_every_format() -> None:
    assert set(SOURCES) == {"auto", *FORMATS}
    assert set(TARGETS) == {name for name, form in FORMATS.items() if type(form).write is not Format.write}


def test_what_is_there_is_not_overwritten(tmp_path: Path, bases: dict[int, Path]) -> None:
    source, out = tmp_path / "source.pth", tmp_path / "out"
    shutil.copy(HERE / "litgpt-0.5.4-v1.pth", source)
    out.write_text("precious")
    with pytest.raises(UserError, match=r"out: already there; use --overwrite"):
        converted(source, out, bases[2])
    for taken, to in ((source, "ours"), (bases[2] / "model.safetensors", "ours"), (bases[2], "peft")):
        if to == "peft":
            (taken / "adapter_config.json").write_text("{}")
        with pytest.raises(UserError, match=r": --out is also an input"):
            converted(source, taken, bases[2], to=to, overwrite=True, allow_lossy=True)
    (bases[2] / "adapter_config.json").unlink()
    converted(source, out, bases[2], overwrite=True)
    assert read_adapter(out)[0].adapter.prompt_length == 3


@pytest.mark.parametrize("target", ["lit-llama", "litgpt"])
def test_v2_without_prompts_there_and_back(tmp_path: Path, bases: dict[int, Path], target: str) -> None:
    config = paper(version="v2", prompt_length=0)
    ours, there, back = (tmp_path / name for name in ("ours.safetensors", "there.pth", "back.safetensors"))
    own_adapter(ours, bases[4], config)
    assert any(
        line.startswith("found     V2, 0 of 2 layers; norms")
        for line in converted(ours, there, None, to=target)
    )
    converted(there, back, bases[4])
    before, after = read_adapter(ours)[1], read_adapter(back)[1]
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_named_file_of_a_peft_folder_is_read_and_none_of_its_files_replaced(
    tmp_path: Path, bases: dict[int, Path]
) -> None:
    config = paper(prompt_length=3, layers=2, gate="layer")
    ours, folder = own_adapter(tmp_path / "ours.safetensors", bases[2], config), tmp_path / "peft"
    converted(ours, folder, bases[2], to="peft")
    whole, other = folder / "adapter_model.safetensors", folder / "other.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(whole).items()}, other)
    back = tmp_path / "back.safetensors"
    converted(other, back, bases[2])
    assert all(torch.equal(read_adapter(back)[1][name], 2 * t) for name, t in read_adapter(ours)[1].items())
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for source, out, to in (
        (folder, whole, "ours"),
        (whole, folder, "peft"),
        (folder, folder, "peft"),
        (other, folder, "peft"),
    ):
        with pytest.raises(UserError, match=r"adapter_\S+: --out is also an input"):
            converted(source, out, bases[2], to=to, overwrite=True)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json: file not found"):
        converted(other, back, bases[2], overwrite=True)
