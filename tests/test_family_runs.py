"""Tiny models of every family through the commands: runs, resumed ones, answers, merging, other formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from finetune_runs import Stopper
from generation_fixtures import save_random_adapter
from paper import paper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_sharding import processes
from tiny_models import randomise

import lit_adapter
from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.training.finetune import finetune
from lit_adapter.weights.adapter_file import METADATA_KEY, read_adapter, save_adapter
from lit_adapter.weights.base_folder import read_config
from lit_adapter.weights.convert import convert
from lit_adapter.weights.export.export import export
from lit_adapter.weights.foreign.convert import ConversionOptions, convert_adapter
from lit_adapter.weights.merge import merge

WINDOW = {"sliding_window": 20, "use_sliding_window": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 20, "head_dim": 16},
    "qwen2": {**WINDOW, "max_window_layers": 2},
    "qwen3": {"head_dim": 16, **WINDOW, "max_window_layers": 3},
    "smollm3": {"tie_word_embeddings": True},
}
LORA = AdapterConfig(prompt_length=0, lora=LoraConfig(rank=2, on=("all",)))
V2 = AdapterConfig(version="v2", prompt_length=0)
IDS = torch.arange(3, 60)[None]
pytestmark = pytest.mark.usefixtures("own_code_cache")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    """A converted base of each family, with the tokenizer of the tiny one; its source is beside it."""
    made = {}
    for kind, options in FAMILIES.items():
        folder = tmp_path_factory.mktemp(kind)
        shutil.copytree(tiny_base.parent / "source", folder / "source")
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 320}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
        sizes |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False}
        config = transformers.AutoConfig.for_model(kind, **{**sizes, **options})
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        randomise(model, 7)
        model.save_pretrained(folder / "source")
        made[kind] = convert(folder / "source", folder / kind)
    return made


def theirs(folder: Path, **options: Any) -> Any:
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, **options).eval()


def logits(adapter: Path, base: Path) -> torch.Tensor:
    return lit_adapter.load(adapter=adapter, base=base, device="cpu", dtype="float32").logits(IDS)


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found - wanted).abs().max() / wanted.abs().max()) < 5e-5


@pytest.mark.parametrize(
    "kind", [kind if kind == "qwen3" else pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES]
)
def test_a_run_learns_stops_resumes_answers_and_is_exported(
    kind: str, bases: dict[str, Path], tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """A dry run tells the plan, a resumed run ends with the same bytes, and transformers loads its export."""
    options = ["--base", str(bases[kind]), "--optim.epochs", "1", "--trainer.samples", "0"]
    whole, run = tiny(*options, out="whole"), tiny(*options)
    tried = Stopper()
    assert finetune(run, say=tried, dry_run=True) == 0
    assert tried.lines[-1].startswith("dry run: no run was started")
    assert not Path(run.out).exists()
    assert finetune(whole, say=Stopper()) == 0
    assert finetune(run, say=Stopper("step 3/")) == 143
    assert finetune(run, resume="last", say=Stopper()) == 0
    files = [Path(config.out) / "adapter.safetensors" for config in (whole, run)]
    assert files[0].read_bytes() == files[1].read_bytes()
    info, state = read_adapter(files[0])
    assert info.model.family == kind
    assert all(bool(tensor.any()) for tensor in state.values())
    model = lit_adapter.load(adapter=files[0], base=bases[kind], device="cpu", dtype="float32")
    text = model.generate("Repeat the words 3 times in order.", max_new_tokens=8)
    assert text == "".join(model.stream("Repeat the words 3 times in order.", max_new_tokens=8))
    export(files[0], tmp_path / "exported", base=bases[kind])
    exported = theirs(tmp_path / "exported", trust_remote_code=True)
    with torch.no_grad():
        assert near(exported(input_ids=IDS).logits, model.logits(IDS))


@pytest.mark.parametrize("kind", FAMILIES)
def test_lora_goes_to_peft_and_back_and_merges_into_its_own_family(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[kind]
    ours = save_random_adapter(base, tmp_path / "ours.safetensors", config=LORA)
    info, state = read_adapter(ours)  # smaller updates, so that rounding does not grow from layer to layer
    save_adapter(ours, {name: 0.2 * tensor for name, tensor in state.items()}, info)
    wanted = logits(ours, base)
    convert_adapter(ours, tmp_path / "peft", ConversionOptions(to="peft-lora", base=base))
    adapted = peft.PeftModel.from_pretrained(theirs(base.parent / "source"), tmp_path / "peft").eval()
    merge(ours, tmp_path / "merged", base=base)
    with torch.no_grad():
        assert near(adapted(input_ids=IDS).logits, wanted)
        assert near(theirs(tmp_path / "merged")(input_ids=IDS).logits, wanted)
    assert read_config(tmp_path / "merged").family == kind
    adapted.save_pretrained(tmp_path / "again")
    convert_adapter(tmp_path / "again", tmp_path / "back.safetensors", ConversionOptions(base=base))
    before, after = (load_file(path) for path in (ours, tmp_path / "back.safetensors"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("kind", "written"), [("mistral", "smollm3"), ("qwen2", "smollm3"), ("smollm3", "smollm3")]
)
def test_v2_merges_into_the_nearest_family_that_has_its_biases(
    kind: str, written: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[kind]
    ours = save_random_adapter(base, tmp_path / "ours.safetensors", config=V2)
    said = merge(ours, tmp_path / "merged", base=base)
    assert (f"written as {written}" in said) == (written != kind)
    assert read_config(tmp_path / "merged").family == written
    with torch.no_grad():
        assert near(theirs(tmp_path / "merged")(input_ids=IDS).logits, logits(ours, base))


def test_v2_on_norms_of_heads_has_no_family(bases: dict[str, Path], tmp_path: Path) -> None:
    ours = save_random_adapter(bases["qwen3"], tmp_path / "ours.safetensors", config=V2)
    with pytest.raises(UserError, match=r"cannot be merged into a qwen3 model: no family .* has head norms"):
        merge(ours, tmp_path / "merged", base=bases["qwen3"])
    assert not (tmp_path / "merged").exists()


def test_prompts_of_mistral_go_to_peft_and_back(bases: dict[str, Path], tmp_path: Path) -> None:
    base, form = bases["mistral"], paper(prompt_length=5, layers=2, gate="layer")
    ours = save_random_adapter(base, tmp_path / "ours.safetensors", config=form)
    convert_adapter(ours, tmp_path / "peft", ConversionOptions(to="peft", base=base))
    adapted = peft.PeftModel.from_pretrained(theirs(base.parent / "source"), tmp_path / "peft").eval()
    with torch.no_grad():
        assert near(adapted(input_ids=IDS).logits, logits(ours, base))
    convert_adapter(tmp_path / "peft", tmp_path / "back.safetensors", ConversionOptions(base=base))
    assert near(logits(tmp_path / "back.safetensors", base), logits(ours, base))


@pytest.mark.parametrize(("kind", "to"), [("qwen2", "peft"), ("qwen3", "litgpt"), ("mistral", "lit-llama")])
def test_what_another_code_base_has_no_model_for_is_refused(
    kind: str, to: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    ours = save_random_adapter(bases[kind], tmp_path / "ours.safetensors")
    with pytest.raises(UserError, match=f"{to} adapters are for bases of .*; this one is of {kind}"):
        convert_adapter(
            ours, tmp_path / "theirs", ConversionOptions(to=to, base=bases[kind], allow_lossy=True)
        )


def test_an_adapter_that_treats_its_prefix_in_another_way_is_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    path = save_random_adapter(bases["qwen3"], tmp_path / "ours.safetensors")
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()[METADATA_KEY])
    assert described["prefix"] == {"keys": "pass the norm of keys", "windows": "do not hide it"}
    described["prefix"]["keys"] = "as projected"
    save_file(load_file(path), path, metadata={METADATA_KEY: json.dumps(described)})
    with pytest.raises(UserError, match=r"its metadata says that prefixes .*as projected"):
        read_adapter(path)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "smollm3"])
def test_two_processes_share_a_base(
    kind: str, tensor_parallel: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Sharded by FSDP2, and with the heads of a layer shared; norms of heads are whole in each."""
    for found in processes(bases[kind], "float32", tmp_path / "store", 2, tensor_parallel, norms=True):
        assert found["same_tokens"]
        assert found["loss"] < 1e-5
        assert found["gradient"] < 1e-5
