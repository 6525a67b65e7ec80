"""A base and a V2 adapter without prompts as one plain LLaMA, loaded by transformers."""

from __future__ import annotations

import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from convert_sources import random_llama, write_hf
from generation_fixtures import CHOICES, script

import lit_adapter
from lit_adapter.cli.merge import main as merge_main
from lit_adapter.errors import UserError
from lit_adapter.files.read import read_json
from lit_adapter.model.adapter import adapter_shapes
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template
from lit_adapter.weights import merge as merging
from lit_adapter.weights.adapter_file import AdapterInfo, base_identity, read_adapter, save_adapter
from lit_adapter.weights.convert import convert
from lit_adapter.weights.merge import merge

BARE = AdapterConfig(version="v2", prompt_length=0)
NORMS = AdapterConfig(norms=True, prompt_length=0)


def made(folder: Path, config: AdapterConfig = BARE, **sizes: object) -> tuple[Path, Path]:
    """A converted base, and an adapter of it with random tensors."""
    write_hf(random_llama(max_position_embeddings=512, **sizes), folder / "source")
    base = convert(folder / "source", folder / "base")
    raw = read_json(base / "config.json")
    draw = torch.Generator().manual_seed(5)
    state = {
        name: torch.randn(shape, generator=draw) * 0.3 + (not name.endswith(("bias", "prompt", "gate")))
        for name, shape in adapter_shapes(config, LlamaConfig.from_hf(raw)).items()
    }
    template = resolve_template("alpaca", load_tokenizer(base))
    path = folder / "adapter.safetensors"
    save_adapter(path, state, AdapterInfo(config, base_identity(base), raw, template))
    return base, path


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"attention_bias": True, "mlp_bias": True},
        {"attention_bias": True, "dtype": torch.bfloat16},
    ],
    ids=["plain", "tied", "biased", "bf16"],
)
@pytest.mark.parametrize("config", [BARE, NORMS], ids=["v2", "norms"])
def test_transformers_loads_it_and_gives_the_adapters_logits(
    tmp_path: Path, config: AdapterConfig, sizes: dict[str, object]
) -> None:
    """Norms alone add no biases to a base that has none."""
    base, adapter = made(tmp_path, config, **sizes)
    out = tmp_path / "merged"
    report = merge(adapter, out, base=base)
    assert float(report.split()[3]) < 1e-3
    merged, given = read_json(out / "config.json"), read_json(base / "config.json")
    for bias in ("attention_bias", "mlp_bias"):
        assert merged[bias] is (config is BARE or given[bias])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.arange(3, 25)[None]
    ours = lit_adapter.load(adapter=adapter, base=base, device="cpu", dtype="float32")
    wanted = ours.logits(ids)
    if config is NORMS and not sizes:
        assert report.startswith("largest logit difference 0 ")
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert (ours.base.logits(ids) - wanted).abs().max() > 0.1


def test_it_is_a_base_like_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = made(tmp_path)
    out = tmp_path / "merged"
    argv = [str(adapter), "--out", str(out), "--base", str(base), "--dtype", "bfloat16"]
    assert merge_main(argv) == 0
    assert "largest logit difference" in capsys.readouterr().out
    assert read_json(out / "fingerprint.json")["source"] == {
        "format": "merged",
        "base": "base",
        "adapter": "adapter.safetensors",
    }
    assert script("--base", out, "--prompt", "Say it back.", "--max_new_tokens", "3", *CHOICES)
    with pytest.raises(UserError, match="merged: already there; use --overwrite"):
        merge_main(argv)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            AdapterConfig(prompt_length=2),
            r"has prompts, whose attention has a softmax of its own .*prompt_length 0",
        ),
        (
            AdapterConfig(version="v2", prompt_length=2),
            "has prompts, whose attention has a softmax of its own",
        ),
        (
            AdapterConfig(version="v2", prompt_length=0, head=True),
            "adapts the output layer, which has no bias",
        ),
    ],
)
def test_what_cannot_be_merged_says_why_and_what_to_do(
    tmp_path: Path, config: AdapterConfig, message: str
) -> None:
    base, adapter = made(tmp_path, config)
    with pytest.raises(UserError, match=message):
        merge(adapter, tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("dtype", "scale", "message"),
    [
        (
            "float16",
            1e6,
            r"adapter\.safetensors: merged tensor \S+ holds values beyond the range of float16; use",
        ),
        ("float32", 3e38, r"adapter\.safetensors: its logits are NaN or infinite; train"),
        ("bfloat16", 3e38, r"adapter\.safetensors: its logits are NaN or infinite; train"),
    ],
)
def test_what_overflows_is_an_error_and_leaves_nothing(
    tmp_path: Path, dtype: str, scale: float, message: str
) -> None:
    base, adapter = made(tmp_path)
    info, state = read_adapter(adapter)
    for name, tensor in state.items():
        if name.endswith("mlp.up_proj.adapter_scale"):
            tensor.fill_(scale)
    save_adapter(adapter, state, info)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        merge(adapter, tmp_path / "merged", base=base, dtype=dtype)
    assert sorted(tmp_path.iterdir()) == before


def test_a_merged_model_that_computes_no_numbers_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding has made a number infinite: the older merged model stays."""
    base, adapter = made(tmp_path)
    out = tmp_path / "merged"
    merge(adapter, out, base=base)
    older = {path: path.read_bytes() for path in out.iterdir()}

    def broken(folder: Path, ids: torch.Tensor, plain: object) -> torch.Tensor:
        return logits(folder, ids, plain) * (torch.nan if plain is None else 1.0)

    logits = merging.logits
    monkeypatch.setattr(merging, "logits", broken)
    with pytest.raises(UserError, match=r"merged: its logits are NaN or infinite in float16; use --dtype"):
        merge(adapter, out, base=base, dtype="float16", overwrite=True)
    assert {path: path.read_bytes() for path in out.iterdir()} == older
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("size", [100, 5_000, 60_000])
def test_a_full_disk_names_what_could_not_be_written(tmp_path: Path, size: int) -> None:
    """No file may grow beyond ``size``: the tokenizer, or the weights, do not fit."""
    base, adapter = made(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(UserError) as caught:
            merge(adapter, tmp_path / "merged", base=base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.match(rf"{tmp_path}/merged/[\w.]+: cannot write: File too large", str(caught.value))
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".*"))


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    base, adapter = made(tmp_path)
    own = convert(tmp_path / "source", tmp_path / "own")
    inside = own / "adapter.safetensors"
    adapter.rename(inside)
    for out in (own, base, base / "merged"):
        with pytest.raises(UserError, match=r": lies inside the source .* or holds it; choose another --out"):
            merge(inside, out, base=base, overwrite=True)
    with pytest.raises(UserError, match=r"^/: is the root of the file system; choose another --out"):
        merge(inside, Path("/"), base=base)
    assert inside.is_file()


def test_a_base_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    base, adapter = made(tmp_path)
    odd = base.rename(tmp_path / "odd\udcff")
    with pytest.raises(UserError, match=r"odd.*: not a UTF-8 path; rename the folder"):
        base_identity(odd)
    (tmp_path / "link").symlink_to(odd)
    with pytest.raises(UserError, match=r"odd.*: the folder's name is not UTF-8; rename it"):
        base_identity(tmp_path / "link")
    info, state = read_adapter(adapter)
    save_adapter(adapter, state, replace(info, base=replace(info.base, name="base\ud800")))
    with pytest.raises(UserError, match=r"base\.name is 'base\\ud800'; expected a plain folder name"):
        merge(adapter, tmp_path / "merged")
