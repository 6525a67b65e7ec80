"""What cannot be converted is refused in one line that names the file and the tensor, and leaves nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert_sources import random_llama, write_gguf, write_hf, write_meta, write_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from warm_runs import run_code, run_script

from lit_adapter.cli.convert import main as convert_main
from lit_adapter.errors import UserError
from lit_adapter.weights.base_folder import read_fingerprint
from lit_adapter.weights.convert import convert

ONE = "model-00001-of-00003.safetensors"
TWO = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value != "-"}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


def edit_map(folder: Path, tensor: str, shard: str) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"][tensor] = shard
    (folder / INDEX).write_text(json.dumps(content))


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def link_out(folder: Path) -> None:
    (folder / ONE).rename(folder.parent / "elsewhere.safetensors")
    (folder / ONE).symlink_to(folder.parent / "elsewhere.safetensors")


def duplicate(folder: Path) -> None:
    state = load_file(folder / ONE)
    edit_tensors(folder / TWO, lambda two: two.update([next(iter(state.items()))]))


def poke(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["lm_head.weight"][3, 7] = value

    return change


def header_twice(path: Path) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    name = re.search(rb'"lm_head.weight":\{[^}]*\}', header)[0]
    header = header[:-1] + b"," + name + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


SHARDED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard absent": (lambda p: (p / TWO).unlink(), rf"{TWO}: file not found \(listed in {INDEX}"),
    "shard truncated": (lambda p: cut(p / TWO), rf"{TWO}: truncated or damaged"),
    "shard header cut": (lambda p: cut(p / TWO, 0.001), rf"{TWO}: truncated or damaged"),
    "shard empty": (lambda p: (p / TWO).write_bytes(b""), rf"{TWO}: the file is empty"),
    "Git LFS pointer": (
        lambda p: (p / TWO).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
        rf"{TWO}: is a Git LFS pointer.*git lfs pull",
    ),
    "web page": (lambda p: (p / TWO).write_text("\n<!DOCTYPE html><html>"), rf"{TWO}: is a web page"),
    "path upwards": (lambda p: edit_map(p, "lm_head.weight", "../x.safetensors"), "leads out of the folder"),
    "absolute path": (
        lambda p: edit_map(p, "lm_head.weight", "/etc/x.safetensors"),
        "leads out of the folder",
    ),
    "URL": (lambda p: edit_map(p, "lm_head.weight", "https://a.b/x"), "leads out of the folder"),
    "link out": (link_out, rf"{ONE}: is a link that leads out of the folder"),
    "tensor in two shards": (duplicate, rf"{TWO}: tensor lm_head.weight is also in {ONE}"),
    "tensor in another shard": (
        lambda p: edit_map(p, "lm_head.weight", TWO),
        rf"{TWO}: tensor lm_head.weight is missing, which {INDEX} puts there",
    ),
    "no weight map": (lambda p: edit_json(p / INDEX, weight_map="-"), rf"{INDEX}: no weight_map"),
    "index is no JSON": (lambda p: (p / INDEX).write_text("{"), rf"{INDEX}:1:2: not valid JSON"),
}
SINGLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (
        lambda p: edit_tensors(p, lambda s: s.pop("model.norm.weight")),
        "model.safetensors: tensor model.norm.weight is missing",
    ),
    "many missing tensors": (
        lambda p: edit_tensors(p, lambda s: [s.pop(k) for k in list(s) if "mlp" in k]),
        "tensors model.layers.0.mlp.gate_proj.weight, .* and 3 more are missing",
    ),
    "extra tensor": (
        lambda p: edit_tensors(
            p, lambda s: s.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
        ),
        "model.safetensors: tensor model.layers.0.self_attn.q_norm.weight is unknown",
    ),
    "wrong shape": (
        lambda p: edit_tensors(p, lambda s: s.update({"model.norm.weight": torch.ones(65)})),
        r"tensor model.norm.weight has shape \[65\], but the sizes in config.json ask for \[64\]",
    ),
    "not a number": (lambda p: edit_tensors(p, poke(float("nan"))), "lm_head.weight holds NaN or infinite"),
    "infinite": (lambda p: edit_tensors(p, poke(-float("inf"))), "lm_head.weight holds NaN or infinite"),
    "integers": (
        lambda p: edit_tensors(
            p, lambda s: s.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)})
        ),
        "tensor model.norm.weight is I32; expected float32, float16 or bfloat16",
    ),
    "tensor twice": (header_twice, "'lm_head.weight' appears twice"),
    "huge header": (lambda p: p.write_bytes(b"\xff" * 64), "model.safetensors: truncated or damaged"),
    "no weights": (lambda p: p.unlink(), "no weights; expected model.safetensors"),
    "architecture": (
        lambda p: edit_json(p.parent / "config.json", model_type="gpt2"),
        "config.json: model_type is 'gpt2'; expected llama",
    ),
    "quantised": (
        lambda p: edit_json(p.parent / "config.json", quantization_config={"quant_method": "gptq"}),
        "quantised .gptq.",
    ),
    "heads": (
        lambda p: edit_json(p.parent / "config.json", num_key_value_heads=3),
        "cannot share 3 key/value",
    ),
    "end of text": (
        lambda p: edit_json(p.parent / "config.json", eos_token_id=[2, 512]),
        "config.json: eos_token_id is 512; expected an id below vocab_size 512",
    ),
    "tied but different": (
        lambda p: edit_json(p.parent / "config.json", tie_word_embeddings=True),
        "tensor lm_head.weight differs from the embedding.*tie_word_embeddings",
    ),
    "no tokenizer": (
        lambda p: (p.parent / "tokenizer.json").unlink(),
        "no tokenizer; expected tokenizer.json",
    ),
    "junk tokenizer": (
        lambda p: (p.parent / "tokenizer.json").write_bytes(b"\x00\xff" * 9),
        "tokenizer.json",
    ),
    "larger vocabulary": (
        lambda p: write_tokenizer(p.parent, 513),
        "513 ids, but the embedding has .*512 rows",
    ),
}


def refuse(source: Path, pattern: str, **options: Any) -> str:
    """Check one line, and that nothing stays behind."""
    base = source.parent / "base"
    with pytest.raises(UserError, match=pattern) as caught:
        convert(source, base / "out", **options)
    assert "\n" not in str(caught.value)
    assert not base.exists() or not list(base.iterdir())
    return str(caught.value)


@pytest.mark.parametrize("fault", SHARDED)
def test_sharded_folders(tmp_path: Path, fault: str) -> None:
    source = write_hf(random_llama(), tmp_path / "source", "sharded")
    spoil, pattern = SHARDED[fault]
    spoil(source)
    refuse(source, pattern)


@pytest.mark.parametrize("fault", SINGLE)
def test_single_folders(tmp_path: Path, fault: str) -> None:
    source = write_hf(random_llama(), tmp_path / "source")
    spoil, pattern = SINGLE[fault]
    spoil(source / "model.safetensors")
    refuse(source, pattern)


def test_links_into_the_blobs_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = write_hf(random_llama(), tmp_path / "models--a--b" / "snapshots" / "0a1b")
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    assert read_fingerprint(convert(snapshot, tmp_path / "out"))["source"]["name"] == "0a1b"


def test_values_beyond_float16(tmp_path: Path) -> None:
    source = write_hf(random_llama(), tmp_path / "source")
    edit_tensors(source / "model.safetensors", poke(1e5))
    refuse(source, "lm_head.weight holds values beyond the range of float16", dtype="float16")
    convert(source, tmp_path / "out", dtype="bfloat16")


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("variable", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("layout", ["hf", "hf-legacy", "meta"])
def test_pickles_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, layout: str
) -> None:
    model, marker = random_llama(), tmp_path / "marker"
    if layout == "meta":
        source = write_meta(model, tmp_path / "source")
        path = source / "consolidated.00.pth"
    else:
        source = write_hf(model, tmp_path / "source", "bin")
        path = source / "pytorch_model.bin"
    state = torch.load(path, weights_only=True) | {"bomb": Bomb(marker)}
    torch.save(state, path, _use_new_zipfile_serialization=layout != "hf-legacy")
    if variable:
        monkeypatch.setenv(variable, "1")
    refuse(source, f"{path.name}: damaged, or holds other objects than tensors and plain values")
    assert not marker.exists()
    torch.load(path, weights_only=False)["bomb"].close()
    assert marker.exists()  # the bomb was live


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_truncated_pickles(tmp_path: Path, layout: str) -> None:
    source = write_hf(random_llama(), tmp_path / "source", "bin")
    path = source / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    torch.save(state, path, _use_new_zipfile_serialization=layout == "zip")
    if layout == "legacy":
        convert(source, tmp_path / "whole")
    cut(path, 0.7)
    refuse(source, "pytorch_model.bin: truncated or damaged")


def test_pickles_of_something_else(tmp_path: Path) -> None:
    source = write_hf(random_llama(), tmp_path / "source", "bin")
    torch.save({"model": {"a": torch.ones(1)}}, source / "pytorch_model.bin")
    refuse(source, "pytorch_model.bin: 'model' is not a tensor")
    torch.save([torch.ones(1)], source / "pytorch_model.bin")
    refuse(source, "pytorch_model.bin: holds a list; expected named tensors")


META: dict[str, tuple[Callable[[Path], Any], str]] = {
    "last shard absent": (
        lambda p: (p / "consolidated.01.pth").unlink(),
        r"sharded into 2 files consolidated.*\.pth, but 1 are there",
    ),
    "first shard absent": (
        lambda p: (p / "consolidated.00.pth").unlink(),
        "consolidated.00.pth: file not found, but consolidated.01.pth is there",
    ),
    "truncated": (lambda p: cut(p / "consolidated.01.pth"), "consolidated.01.pth: truncated or damaged"),
    "one byte": (
        lambda p: (p / "consolidated.01.pth").write_bytes(b"P"),
        "consolidated.01.pth: truncated or damaged: it does not begin as a torch.save file; fetch it again",
    ),
    "layers": (
        lambda p: edit_json(p / "params.json", n_layers=3),
        "consolidated.00.pth: tensors layers.2.attention_norm.weight, .* missing, .*sizes in params.json",
    ),
    "fewer layers": (lambda p: edit_json(p / "params.json", n_layers=1), "tensors layers.1.* are unknown"),
    "heads": (
        lambda p: edit_json(p / "params.json", n_kv_heads=4),
        r"layers.0.attention.wk.weight has shape \[32, 64\], but the sizes in params.json ask for \[64, 64\]",
    ),
    "no width": (
        lambda p: edit_json(p / "params.json", dim="-"),
        r"rows that divides params.json's dim None",
    ),
    "no heads": (
        lambda p: edit_json(p / "params.json", n_heads="-"),
        "params.json: key 'n_heads' is missing",
    ),
    "quantised": (
        lambda p: edit_json(p / "params.json", quantization_args={"scheme": "int4"}),
        "params.json: key 'quantization_args'",
    ),
    "no tokenizer": (lambda p: (p / "tokenizer.model").unlink(), "no tokenizer.model"),
    "shards differ": (
        lambda p: torch.save(
            torch.load(p / "consolidated.01.pth", weights_only=True) | {"extra": torch.ones(1)},
            p / "consolidated.01.pth",
        ),
        "consolidated.01.pth: tensor extra is not in both",
    ),
    "shapes differ": (
        lambda p: torch.save(
            torch.load(p / "consolidated.01.pth", weights_only=True) | {"norm.weight": torch.ones(3)},
            p / "consolidated.01.pth",
        ),
        r"consolidated.01.pth: tensor norm.weight has shape \[3\], but \[64\] in consolidated.00.pth",
    ),
}


@pytest.mark.parametrize("fault", META)
def test_meta_folders(tmp_path: Path, fault: str) -> None:
    source = write_meta(random_llama(), tmp_path / "source", ranks=2)
    spoil, pattern = META[fault]
    spoil(source)
    refuse(source, pattern)


GGUF: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"architecture": "gemma"},
        "general.architecture is 'gemma', which has norms",
    ),
    "missing": ({"changes": {"blk.1.ffn_up.weight": None}}, "tensor blk.1.ffn_up.weight is missing"),
    "unknown": (
        {"changes": {"extra.weight": np.ones(32, np.float32)}},
        "tensor extra.weight is unknown",
    ),
    "shape": (
        {"changes": {"blk.1.attn_k.weight": np.ones((64, 64), np.float32)}},
        r"tensor blk.1.attn_k.weight has shape \[64, 64\], but the sizes in its keys ask for \[32, 64\]",
    ),
    "not a number": (
        {"changes": {"blk.1.attn_k.weight": np.full((32, 64), np.nan, np.float32)}},
        "blk.1.attn_k.weight holds NaN or infinite",
    ),
    "type": (
        {"changes": {"blk.1.attn_k.weight": np.ones((32, 64), np.int32)}},
        "tensor blk.1.attn_k.weight is of type I32, which cannot be expanded",
    ),
    "type that cannot be expanded": (
        {"changes": {"blk.1.attn_k.weight": np.zeros((32, 292), np.uint8)}},
        "tensor blk.1.attn_k.weight is of type Q8_K, which cannot be expanded",
    ),
    "rope table": ({"rope_freqs": np.linspace(1, 9, 8)}, "rope_freqs.weight follows no LLaMA 3 scaling"),
    "rope table of another size": ({"rope_freqs": np.ones(5)}, "rope_freqs.weight: expected 8 float32"),
    "no tokenizer": ({"tokens": False}, "no tokenizer; key 'tokenizer.ggml.tokens' is missing"),
}


@pytest.mark.parametrize("fault", GGUF)
def test_gguf_files(tmp_path: Path, fault: str) -> None:
    options, pattern = GGUF[fault]
    write_gguf(random_llama(), tmp_path / "model.gguf", **options)
    refuse(tmp_path / "model.gguf", pattern)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.99])
def test_truncated_gguf(tmp_path: Path, share: float) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(random_llama(), path)
    cut(path, share)
    refuse(path, "model.gguf: truncated")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, model = tmp_path_factory.mktemp("sound"), random_llama()
    write_gguf(model, folder / "model.gguf")
    return {
        "gguf": folder / "model.gguf",
        "safetensors": write_hf(model, folder / "hf") / "model.safetensors",
        "bin": write_hf(model, folder / "bin", "bin") / "pytorch_model.bin",
        "pth": write_meta(model, folder / "meta") / "consolidated.00.pth",
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gguf", "safetensors", "bin", "pth"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), tail=st.booleans(), damage=st.binary(min_size=1, max_size=8))
@example(place=0.0, tail=False, damage=b"\xff" * 8)
def test_damaged_bytes_give_a_base_or_one_line(
    sound: dict[str, Path], tmp_path: Path, kind: str, place: float, tail: bool, damage: bytes
) -> None:
    path = sound[kind]
    content = path.read_bytes()
    reach = min(len(content), 20_000)  # where headers and directories are
    start = int(place * reach) + (len(content) - reach if tail else 0)
    try:
        path.write_bytes(content[:start] + damage + content[start + len(damage) :])
        convert(path if kind == "gguf" else path.parent, tmp_path / "base" / "out", overwrite=True)
    except UserError as error:
        message = str(error)
    else:
        message = f"{path}: still whole"
    finally:
        path.write_bytes(content)
    assert path.parent.name in message
    assert {entry.name for entry in (tmp_path / "base").glob("*")} <= {"out"}


def test_sources_that_are_nothing(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(tmp_path / "absent", "absent: no such file or folder")
    refuse(empty, r"no config.json \(Hugging Face\) or params.json \(Meta\) there$")
    (empty / "a.gguf").write_bytes(b"junk")
    refuse(empty, "did you mean .*empty/a.gguf")
    refuse(empty / "a.gguf", "a.gguf: is not a GGUF file")
    (empty / "a.safetensors").write_bytes(b"junk")
    refuse(empty / "a.safetensors", "give the folder that holds it")


def test_outputs_in_the_way(tmp_path: Path) -> None:
    source = write_hf(random_llama(), tmp_path / "source")
    out = convert(source, tmp_path / "out")
    with pytest.raises(UserError, match="already there; use --overwrite"):
        convert(source, out)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    for place, pattern in (
        (mine, "holds something other than a converted base"),
        (mine / "thesis.tex", "is a file"),
        (source, "lies inside the source"),
        (source / "out", "lies inside the source"),
        (tmp_path, "lies inside the source .* or holds it"),
        (mine / "thesis.tex" / "out", "cannot write"),
    ):
        with pytest.raises(UserError, match=pattern):
            convert(source, place, overwrite=True)
    assert (mine / "thesis.tex").read_text() == "years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "source"]


def test_a_failed_replacement_keeps_the_old_base(tmp_path: Path) -> None:
    out = convert(write_hf(random_llama(), tmp_path / "source"), tmp_path / "out")
    before = read_fingerprint(out)
    bad = write_hf(random_llama(seed=1), tmp_path / "bad")
    edit_tensors(bad / "model.safetensors", poke(float("nan")))
    with pytest.raises(UserError, match="NaN"):
        convert(bad, out, overwrite=True)
    assert read_fingerprint(out) == before


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_hf(random_llama(), tmp_path / "source")
    needed = sum(parameter.nbytes for parameter in random_llama().parameters())
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 12_345)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refuse(source, f"needs {needed:,} bytes, but 12,345 are free")


FULL = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from lit_adapter.cli.command import run
from lit_adapter.cli.convert import main as convert_main
run(convert_main)
"""


@pytest.mark.slow
def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source = write_hf(random_llama(), tmp_path / "source")
    done = run_code(FULL, source, "--out", tmp_path / "base" / "out")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*cannot write: File too large.* bytes free.*\n", done.stderr)
    assert list((tmp_path / "base").iterdir()) == []


def test_the_script_converts_and_refuses_in_one_line(tmp_path: Path) -> None:
    source = write_hf(random_llama(), tmp_path / "source")
    done = run_script("convert.py", source, "--out", tmp_path / "out", "--dtype", "float16")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote {tmp_path / 'out'}\n"
    (source / "model.safetensors").write_text("<html>")
    done = run_script("convert.py", source, "--out", tmp_path / "out", "--overwrite")
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: {source / 'model.safetensors'}: is a web page, not the file itself; fetch it again\n"
    )


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (["a", "--out", "b", "--overwrit"], "unknown option '--overwrit'; did you mean '--overwrite'?"),
        (["a", "--out", "b", "--dtyp=float32"], "unknown option '--dtyp'; did you mean '--dtype'?"),
        (["a", "--out", "b", "--dtype", "int8"], "int8"),
        (["a"], "the following arguments are required: out; see --help"),
        (["a", "b", "--out", "c"], "unrecognized arguments: b; see --help"),
    ],
)
def test_command_line_mistakes(argv: list[str], pattern: str) -> None:
    with pytest.raises(UserError, match=re.escape(pattern)) as caught:
        convert_main(argv)
    assert "\n" not in str(caught.value)
