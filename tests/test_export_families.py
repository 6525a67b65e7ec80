"""Adapters of every family as folders for transformers and as GGUF files, with each option of the family."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from convert_sources import write_hf
from generation_fixtures import save_random_adapter
from llama_cpp_logits import llama_cpp_logits, opened
from test_families import CASES, SIZES
from tiny_models import random_ids, randomise
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lit_adapter
from lit_adapter.errors import UserError
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.weights.adapter_file import read_adapter, save_adapter
from lit_adapter.weights.convert import convert
from lit_adapter.weights.export.export import export
from lit_adapter.weights.gguf_file import GGUFSource
from lit_adapter.weights.measure import source_logits

pytestmark = pytest.mark.usefixtures("own_code_cache")
LORA = LoraConfig(rank=2, on=("all",))
PREFIXES = {
    "tanh": AdapterConfig(prompt_length=3),
    "layer": AdapterConfig(prompt_length=3, layers=2, gate="layer"),
    "unrotated": AdapterConfig(prompt_length=4, gate="token", prefix_query="unrotated"),
    "channel": AdapterConfig(prompt_length=2, gate="channel", norms=True),
    "identity": AdapterConfig(prompt_length=3, gate="identity", norms=True, lora=LORA),
    "v2": AdapterConfig(prompt_length=2, version="v2", head=True),
}
MERGED = {
    "norms": AdapterConfig(prompt_length=0, norms=True),
    "lora": AdapterConfig(prompt_length=0, norms=True, lora=LORA),
    "v2": AdapterConfig(prompt_length=0, version="v2"),
}
NORMS = MERGED["norms"]
FAMILY_CASES = {name: case for name, case in CASES.items() if case[0] != "llama"}
LARGE = {"vocab_size": 512, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
IDS = random_ids(2, 40, vocab=512)


LACKING = {
    "qwen3-biases-tied": "norms of heads together with biases",
    "mistral-yarn": "yarn without truncation",
    "smollm3-second": "no rotary positions in the layers 1, 3; its smollm3 has none in every fourth one",
    "smollm3-windows": "no rotary positions in the layers 0, 3; its smollm3",
}
"""Cases that llama.cpp does not compute, and why."""


def pairs(forms: dict[str, AdapterConfig], without: Collection[str] = ()) -> list[Any]:
    """Each case with one form, in turn; half of them, all families among them, are left to the slow tier."""
    found = []
    for number, name in enumerate(name for name in FAMILY_CASES if name not in without):
        fitting = [form for form in forms if form != "v2" or not name.startswith("qwen3")]
        form = fitting[number % len(fitting)]
        marks = [pytest.mark.slow] if number % 2 else []
        found.append(pytest.param(name, forms[form], id=f"{name}, {form}", marks=marks))
    return found


def made(folder: Path, kind: str, config: AdapterConfig, **options: Any) -> tuple[Path, Path]:
    """A converted random base of a family, and an adapter of it with random values."""
    settings = transformers.AutoConfig.for_model(kind, **{**SIZES, **LARGE, **options})
    model = AutoModelForCausalLM.from_config(settings).float()
    randomise(model, 3)
    base = convert(write_hf(model, folder / "source"), folder / "base")
    adapter = save_random_adapter(base, folder / "adapter.safetensors", config=config)
    info, state = read_adapter(adapter)  # smaller updates, so that rounding does not grow from layer to layer
    small = {name: 0.2 * tensor if ".lora_" in name else tensor for name, tensor in state.items()}
    save_adapter(adapter, small, info)
    return base, adapter


def ours(base: Path, adapter: Path) -> lit_adapter.AdaptedLlama:
    return lit_adapter.load(adapter=adapter, base=base, device="cpu", dtype="float32")


def loaded(folder: Path, kind: type = AutoModelForCausalLM, **options: Any) -> Any:
    return kind.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **options).eval()


def assert_near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 5e-5) -> None:
    assert float((found - wanted).abs().max() / wanted.abs().max()) < tolerance


@pytest.mark.parametrize(("name", "config"), pairs(PREFIXES))
def test_a_folder_gives_the_adapters_logits_and_its_cache_too(
    tmp_path: Path, name: str, config: AdapterConfig
) -> None:
    """Beyond the window's length, whole and step by step, with the base in the folder or beside it."""
    kind, options = FAMILY_CASES[name]
    base, adapter = made(tmp_path, kind, config, **options)
    export(adapter, tmp_path / "out", base=base, with_base=len(name) % 2 == 0)
    model, mine = loaded(tmp_path / "out"), ours(base, adapter)
    wanted = mine.logits(IDS)
    assert (mine.base.logits(IDS) - wanted).abs().max() > 0.1
    with torch.no_grad():
        assert_near(model(input_ids=IDS).logits, wanted)
        steps = model.generate(
            IDS[:, :9], max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    assert_near(torch.stack(steps.logits, 1), mine.logits(steps.sequences)[:, 8:-1])


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "smollm3"])
def test_a_family_keeps_the_rules_of_vllms_transformers_backend(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration builds it, keywords reach the attention function, and the plan names its layers."""
    base, adapter = made(tmp_path, kind, PREFIXES["unrotated"], sliding_window=None)
    export(adapter, tmp_path / "out", base=base, with_base=True)
    seen: list[int] = []

    def flat(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **rest):  # type: ignore[no-untyped-def]
        seen.append(attention_instances[module.layer_idx])
        length, n_group = query.shape[2], query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(n_group, dim=1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling
        )
        return out.transpose(1, 2).reshape(length, -1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flat", flat)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    config._attn_implementation = "flat"
    model = AutoModel.from_config(config, trust_remote_code=True).eval()
    assert model.is_backend_compatible()
    whole = loaded(tmp_path / "out")
    model.load_state_dict(whole.model.state_dict())
    given = {"attention_instances": {layer: 10 + layer for layer in range(4)}}
    with torch.no_grad():
        hidden = model(input_ids=IDS[:1], use_cache=False, return_dict=False, **given)[0]
        assert_near(whole.lm_head(hidden), ours(base, adapter).logits(IDS[:1]))
    assert seen == [10, 11, 12, 13]
    parts = model.layers[0].self_attn.named_modules()
    linears = {name for name, part in parts if isinstance(part, torch.nn.Linear)}
    assert {f"layers.*.self_attn.{name}" for name in linears} <= set(model.tp_plan)


def test_two_families_live_in_one_process(tmp_path: Path) -> None:
    """Their classes have other names, though the model type is the same."""
    for kind in ("qwen3", "mistral"):
        base, adapter = made(tmp_path / kind, kind, PREFIXES["tanh"], sliding_window=None)
        export(adapter, tmp_path / kind / "out", base=base)
        model = loaded(tmp_path / kind / "out")
        assert type(model).__name__ == f"LitAdapter{kind.capitalize()}ForCausalLM"
        with torch.no_grad():
            assert_near(model(input_ids=IDS).logits, ours(base, adapter).logits(IDS))


@pytest.mark.parametrize(("name", "config"), pairs(MERGED, LACKING))
def test_a_gguf_file_gives_the_adapters_logits(tmp_path: Path, name: str, config: AdapterConfig) -> None:
    """By our own reader: within the window, which llama.cpp does not have."""
    kind, options = FAMILY_CASES[name]
    base, adapter = made(tmp_path, kind, config, **options)
    report = export(adapter, tmp_path / "out", base=base, to="gguf", kind="f32")
    path, model = tmp_path / "out" / "out-F32.gguf", ours(base, adapter)
    length = options.get("sliding_window") or 40
    assert any(f"for texts of up to {length} tokens" in line for line in report) == (length < 40)
    source, wanted = GGUFSource(path), model.logits(IDS[:1, :length])
    assert source.config.context_length == (length if length < 40 else SIZES["max_position_embeddings"])
    assert_near(source_logits(source, IDS[:1, :length]), wanted)
    assert (model.base.logits(IDS[:1, :length]) - wanted).abs().max() > 0.1


@pytest.mark.parametrize("name", LACKING)
def test_what_llama_cpp_does_not_compute_is_refused(tmp_path: Path, name: str) -> None:
    kind, options = FAMILY_CASES[name]
    base, adapter = made(tmp_path, kind, NORMS, **options)
    with pytest.raises(UserError, match=f"cannot go into a GGUF file: llama.cpp lacks {LACKING[name]}"):
        export(adapter, tmp_path / "out", base=base, to="gguf")
    assert not (tmp_path / "out").exists()


def test_v2_on_norms_of_heads_is_refused_by_every_export(tmp_path: Path) -> None:
    for number, config in enumerate((MERGED["v2"], PREFIXES["v2"])):
        base, adapter = made(tmp_path / str(number), "qwen3", config)
        for to in ("transformers", "gguf")[: 2 - number]:
            with pytest.raises(UserError, match="cannot be merged into a qwen3 model: no family"):
                export(adapter, tmp_path / "out", base=base, to=to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mistral", {"sliding_window": None, "head_dim": 16}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("qwen3", {"head_dim": 128}),  # the only size that transformers' reader of these files knows
    ],
)
def test_transformers_reads_a_gguf_file_with_the_adapters_logits(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    base, adapter = made(tmp_path, kind, MERGED["lora"], **options)
    export(adapter, tmp_path / "out", base=base, to="gguf", kind="f32")
    model = loaded(tmp_path / "out", gguf_file="out-F32.gguf")
    assert model.config.model_type == ("llama" if kind == "mistral" else kind)
    with torch.no_grad():
        assert_near(model(input_ids=IDS).logits, ours(base, adapter).logits(IDS))


@pytest.mark.parametrize(("name", "config"), pairs(MERGED, LACKING))
def test_llama_cpp_gives_the_adapters_logits(tmp_path: Path, name: str, config: AdapterConfig) -> None:
    kind, options = FAMILY_CASES[name]
    base, adapter = made(tmp_path, kind, config, **options)
    export(adapter, tmp_path / "out", base=base, to="gguf", kind="f32")
    path = tmp_path / "out" / "out-F32.gguf"
    ids = IDS[0, : GGUFSource(path).config.context_length].tolist()
    found = llama_cpp_logits(opened(path, 64), ids)
    assert_near(found, ours(base, adapter).logits(torch.tensor([ids]))[0], 2e-4)
