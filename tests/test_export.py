"""Adapters with prefixes as folders that transformers loads by their own modelling file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_merge import made
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_backend import on_a_backend

import lit_adapter
from lit_adapter.cli.export import main as export_main
from lit_adapter.errors import UserError
from lit_adapter.files.read import read_json
from lit_adapter.files.write import write_json
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.gates import GATE_FORMS
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.weights.adapter_file import read_adapter
from lit_adapter.weights.export import transformers_folder as made_here
from lit_adapter.weights.export.export import export

pytestmark = pytest.mark.usefixtures("own_code_cache")
PREFIX = AdapterConfig(prompt_length=3, layers=1)
V2 = AdapterConfig(version="v2", prompt_length=2, head=True)
FORMS = {
    **{gate: AdapterConfig(prompt_length=3, gate=gate) for gate in GATE_FORMS},
    "unrotated": AdapterConfig(prompt_length=4, gate="token", prefix_query="unrotated"),
    "top layer": PREFIX,
    "norms": AdapterConfig(prompt_length=2, norms=True),
    "v2": AdapterConfig(version="v2", prompt_length=2),
    "v2 with head": V2,
    "lora": AdapterConfig(prompt_length=2, norms=True, lora=LoraConfig(rank=3)),
    "lora with stabilised rank": AdapterConfig(
        prompt_length=2, lora=LoraConfig(rank=2, on=("v_proj", "mlp"), rank_stabilised=True)
    ),
    "head alone": AdapterConfig(version="v2", prompt_length=0, head=True),
}


def loaded(
    folder: Path, kind: type = AutoModelForCausalLM, **options: object
) -> transformers.LlamaForCausalLM:
    return kind.from_pretrained(folder, trust_remote_code=True, **options).eval()


def exported(
    folder: Path, config: AdapterConfig = PREFIX, **choices: object
) -> tuple[Path, lit_adapter.AdaptedLlama]:
    """An export of a small adapter with random values, and our own model of it."""
    sizes = choices.pop("sizes", {})
    base, adapter = made(folder, config, **sizes)
    vocabulary = read_json(base / "tokenizer.json")
    export(adapter, folder / "exported", base=base, **choices)
    vocabulary["decoder"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    write_json(folder / "exported" / "tokenizer.json", vocabulary)  # the tests' base has none
    return folder / "exported", lit_adapter.load(adapter=adapter, base=base, device="cpu", dtype="float32")


def _slow_half() -> list[object]:
    """Every form with its base by name and whole; one of the two, in turn, is left to the slow tier."""
    return [
        pytest.param(
            config,
            with_base,
            id=f"{name}, {'whole' if with_base else 'by name'}",
            marks=[pytest.mark.slow] if with_base is bool(number % 2) else [],
        )
        for number, (name, config) in enumerate(FORMS.items())
        for with_base in (False, True)
    ]


@pytest.mark.parametrize(("config", "with_base"), _slow_half())
def test_every_form_gives_the_adapters_logits(tmp_path: Path, config: AdapterConfig, with_base: bool) -> None:
    folder, ours = exported(tmp_path, config, with_base=with_base)
    ids = torch.randint(0, 250, (2, 23), generator=torch.Generator().manual_seed(3))
    wanted = ours.logits(ids)
    assert (ours.base.logits(ids) - wanted).abs().max() > 0.01
    with torch.no_grad():
        torch.testing.assert_close(loaded(folder)(input_ids=ids).logits, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "sizes",
    [
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
        {"head_dim": 32, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ],
    ids=["tied", "biased", "wide heads"],
)
@pytest.mark.parametrize("config", [FORMS["unrotated"], V2, FORMS["lora"]], ids=["prefix", "v2", "lora"])
def test_every_base_gives_the_adapters_logits(
    tmp_path: Path, config: AdapterConfig, sizes: dict[str, object]
) -> None:
    folder, ours = exported(tmp_path, config, with_base=config is V2, sizes=sizes)
    ids = torch.arange(3, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(folder)(input_ids=ids).logits, ours.logits(ids), rtol=2e-5, atol=2e-5
        )


def test_generation_with_a_cache_and_padding_on_the_left_gives_our_answers(tmp_path: Path) -> None:
    folder, ours = exported(tmp_path, FORMS["token"])
    model, tokenizer = (
        loaded(folder),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="left"),
    )
    tokenizer.pad_token = tokenizer.eos_token
    tasks = ["Say it back.", "Count the birds over the north field, slowly.", "x"]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": task}], tokenize=False) for task in tasks
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    found = model.generate(**batch, max_new_tokens=12, do_sample=False)
    answers = tokenizer.batch_decode(found[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    assert answers == [ours.generate(task, max_new_tokens=12) for task in tasks]
    alone = model.generate(**tokenizer(prompts[1], return_tensors="pt"), max_new_tokens=12, use_cache=False)
    assert tokenizer.decode(alone[0], skip_special_tokens=True).endswith(answers[1])


def test_a_pipeline_answers_messages(tmp_path: Path) -> None:
    folder, ours = exported(tmp_path, FORMS["unrotated"], with_base=True)
    pipe = transformers.pipeline("text-generation", model=str(folder), trust_remote_code=True)
    said = pipe([{"role": "user", "content": "Say it back."}], max_new_tokens=9, do_sample=False)
    assert said[0]["generated_text"][-1]["content"] == ours.generate("Say it back.", max_new_tokens=9)


def test_every_attention_of_transformers_computes_it(tmp_path: Path) -> None:
    folder, ours = exported(tmp_path, FORMS["token"])
    ids = torch.arange(3, 25)[None]
    for attention in ("eager", "sdpa"):
        model = loaded(folder, attn_implementation=attention)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, ours.logits(ids), rtol=2e-5, atol=2e-5)


def test_it_keeps_the_rules_of_vllms_transformers_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration builds it, keywords reach the attention function, and that may flatten tokens."""
    folder, ours = exported(tmp_path, FORMS["token"], with_base=True)
    model, seen = on_a_backend(folder, monkeypatch)
    whole = loaded(folder)
    model.load_state_dict(whole.model.state_dict())
    ids = torch.arange(3, 25)[None]
    with torch.no_grad():
        hidden = model(input_ids=ids, use_cache=False, attention_instances={0: 10, 1: 11}, return_dict=False)[
            0
        ]
        torch.testing.assert_close(whole.lm_head(hidden), ours.logits(ids), rtol=2e-5, atol=2e-5)
    assert seen == [10, 11]
    planned = {name for name in model.tp_plan if name.startswith("layers.*.self_attn")}
    linears = {
        name for name, part in model.layers[0].self_attn.named_modules() if isinstance(part, torch.nn.Linear)
    }
    assert planned == {f"layers.*.self_attn.{name}" for name in linears}


def test_heads_divided_by_the_plan_give_the_same_sum(tmp_path: Path) -> None:
    """Each of two processes has half of every layer that the plan names, as vLLM divides them."""
    folder, ours = exported(tmp_path, FORMS["channel"], with_base=True)
    whole = loaded(folder)
    ids = torch.arange(3, 25)[None]
    halves = []
    for rank in range(2):
        attention = loaded(folder).model.layers[1].self_attn
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "prefix.strength"):
            axis = {"colwise": 0, "rowwise": 1}[whole.config.base_model_tp_plan[f"layers.*.self_attn.{name}"]]
            linear = attention.get_submodule(name)
            linear.weight = torch.nn.Parameter(linear.weight.chunk(2, axis)[rank])
        halves.append(attention)
    x = torch.randn(1, 22, 64)
    rope = whole.model.rotary_emb(x, torch.arange(22)[None])
    with torch.no_grad():
        parts = [half(x, rope)[0] for half in halves]
        torch.testing.assert_close(sum(parts), whole.model.layers[1].self_attn(x, rope)[0])
    assert ours.logits(ids).isfinite().all()


def test_what_is_saved_again_is_whole(tmp_path: Path) -> None:
    folder, ours = exported(tmp_path, FORMS["norms"])
    loaded(folder).save_pretrained(tmp_path / "again")
    shutil.rmtree(folder)
    ids = torch.arange(3, 25)[None]
    with torch.no_grad():
        found = loaded(tmp_path / "again")(input_ids=ids).logits
    torch.testing.assert_close(found, ours.logits(ids), rtol=2e-5, atol=2e-5)


def test_a_prefix_stays_in_fp32_on_a_bf16_base(tmp_path: Path) -> None:
    folder, _ = exported(tmp_path, FORMS["token"], sizes={"dtype": torch.bfloat16})
    model = loaded(folder)
    kinds = {name.rpartition(".prefix.")[1]: tensor.dtype for name, tensor in model.named_parameters()}
    assert kinds == {"": torch.bfloat16, ".prefix.": torch.float32}


def in_int8(library: str) -> object:
    if library == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip(library)
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize("with_base", [False, True], ids=["by name", "whole"])
@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_the_base_is_loaded_in_int8_and_the_adapter_as_it_is(
    tmp_path: Path, library: str, with_base: bool
) -> None:
    form = in_int8(library)
    folder, ours = exported(tmp_path, FORMS["norms"], with_base=with_base)
    model = loaded(folder, quantization_config=form, dtype=torch.float32)
    found = dict(model.named_parameters())
    file = load_file(folder / ("model.safetensors" if with_base else "adapter.safetensors"))
    learned = {name: tensor for name, tensor in file.items() if ".prefix." in name or "norm" in name}
    assert {name.split(".")[-2] for name in learned} >= {"prefix", "strength", "input_layernorm", "norm"}
    for name, tensor in learned.items():
        assert (type(found[name]), found[name].dtype) == (torch.nn.Parameter, torch.float32), name
        assert torch.equal(found[name], tensor), name
    matrices = [name for name in found if name.endswith("_proj.weight")]
    assert len(matrices) == 7 * model.config.num_hidden_layers
    assert all(type(found[name]) is not torch.nn.Parameter for name in matrices)

    ids = torch.arange(3, 25)[None]
    wanted = ours.logits(ids)
    by_adapter = (ours.base.logits(ids) - wanted).abs().max()
    with torch.no_grad():
        assert 0 < (model(input_ids=ids).logits - wanted).abs().max() < 0.05 * by_adapter
        answer = model.generate(ids, max_new_tokens=8, do_sample=False)
        greedy = model(input_ids=answer).logits.argmax(-1)
    n_prompt = ids.shape[1]
    assert answer.shape[1] > n_prompt
    assert torch.equal(answer[:, n_prompt:], greedy[:, n_prompt - 1 : -1])


def test_without_its_code_it_is_refused_rather_than_a_plain_llama(tmp_path: Path) -> None:
    folder, _ = exported(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_a_base_that_moved_is_named_and_another_one_refused(tmp_path: Path) -> None:
    folder, _ = exported(tmp_path)
    assert read_json(folder / "config.json")["base_model"] == "../base"
    moved = (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"base: the base of .* is not there; give its folder with base_model="):
        loaded(folder)
    assert loaded(folder, base_model=str(moved))
    fingerprint = read_json(moved / "fingerprint.json")
    write_json(moved / "fingerprint.json", {**fingerprint, "weights": "0" * 64})
    with pytest.raises(OSError, match="is another base than the one that"):
        loaded(folder, base_model=str(moved))


def test_the_class_itself_loads_a_subfolder_with_its_own_configuration(tmp_path: Path) -> None:
    """A revision takes the same way: both are options of the folder that the configuration is read from."""
    folder, ours = exported(tmp_path)
    ids = torch.arange(3, 25)[None]
    model = type(loaded(folder)).from_pretrained(tmp_path, subfolder="exported").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, ours.logits(ids), rtol=2e-5, atol=2e-5)


def test_a_base_of_the_hub_is_named_with_its_commit(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, PREFIX)
    fingerprint = read_json(base / "fingerprint.json")
    origin = {"model": "org/name", "format": "huggingface", "revision": "main", "commit": "c0ffee"}
    write_json(base / "fingerprint.json", {**fingerprint, "source": origin})
    info, state = read_adapter(adapter)
    told = made_here._write_reference(
        made_here.Adapted(adapter, info, state, base), tmp_path, tmp_path / "out"
    )
    assert (told["base_model"], told["base_revision"]) == ("org/name", "c0ffee")


def test_an_adapter_that_merges_becomes_a_plain_llama(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = made(tmp_path, AdapterConfig(norms=True, prompt_length=0))
    assert export_main([str(adapter), "--out", str(tmp_path / "out"), "--base", str(base)]) == 0
    assert "it is a plain model of base and adapter" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_what_an_export_may_replace(tmp_path: Path) -> None:
    base, adapter = made(tmp_path)
    base, adapter = made(tmp_path / "other", PREFIX)
    out = tmp_path / "out"
    export(adapter, out, base=base)
    with pytest.raises(UserError, match="out: already there; use --overwrite"):
        export(adapter, out, base=base)
    before = {path.name for path in out.iterdir()}
    export(adapter, out, base=base, overwrite=True)
    assert {path.name for path in out.iterdir()} == before
    with pytest.raises(UserError, match="lies inside the source"):
        export(adapter, base / "inside", base=base)
    with pytest.raises(UserError, match="holds something other than an exported adapter"):
        export(adapter, tmp_path / "source", base=base, overwrite=True)
    with pytest.raises(UserError, match="--dtype is for a base in the folder; give --with-base too"):
        export(adapter, tmp_path / "new", base=base, dtype="bfloat16")
    assert not (tmp_path / "new").exists()
