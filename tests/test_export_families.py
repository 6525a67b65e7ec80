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
from llama_cpp import Job, computed, needs_llama_cpp
from test_families import CASES, SIZES
from tiny_models import random_ids, randomise
from tokenizer_kinds import HARD
from transformers import AutoModelForCausalLM
from vllm_backend import on_a_backend

import lit_adapter
from lit_adapter.errors import UserError
from lit_adapter.files.read import read_json
from lit_adapter.files.write import write_json
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.text.load import load_tokenizer
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


QUICK = ("qwen2-upper-windows", "qwen3", "mistral-windows", "smollm3")
LACKING = {
    "qwen3-biases-tied": "head norms together with biases",
    "mistral-yarn": "yarn without truncation",
    "smollm3-second": r"layers without rotary positions other than every fourth one \(here 1, 3\)",
    "smollm3-windows": r"layers without rotary positions other than every fourth one \(here 0, 3\)",
}
"""Cases that llama.cpp does not compute, and why."""


def pairs(
    forms: dict[str, AdapterConfig], without_v2: tuple[str, ...], without: Collection[str] = ()
) -> list[Any]:
    """Each case with one form, in turn; most are left to the slow tier, but one of each family."""
    found = []
    for number, name in enumerate(name for name in FAMILY_CASES if name not in without):
        fitting = [form for form in forms if form != "v2" or not name.startswith(without_v2)]
        form = fitting[number % len(fitting)]
        marks = [] if name in QUICK else [pytest.mark.slow]
        found.append(pytest.param(name, forms[form], id=f"{name}, {form}", marks=marks))
    return found


def made(folder: Path, kind: str, config: AdapterConfig, **options: Any) -> tuple[Path, Path]:
    """A converted random base of a family, and an adapter of it with random values."""
    settings = transformers.AutoConfig.for_model(kind, **{**SIZES, **LARGE, **options})
    model = AutoModelForCausalLM.from_config(settings).float()
    randomise(model, 3)
    source = write_hf(model, folder / "source")
    give_a_merge(source / "tokenizer.json")
    base = convert(source, folder / "base")
    adapter = save_random_adapter(base, folder / "adapter.safetensors", config=config)
    info, state = read_adapter(adapter)  # smaller updates, so that rounding does not grow from layer to layer
    small = {name: 0.2 * tensor if ".lora_" in name else tensor for name, tensor in state.items()}
    save_adapter(adapter, small, info)
    return base, adapter


def give_a_merge(path: Path) -> None:
    """Put a merge into a tokenizer, in place of its last added token; llama.cpp reads none without."""
    raw = read_json(path)
    raw["model"]["vocab"]["ab"] = raw["added_tokens"].pop()["id"]
    raw["model"]["merges"] = [["a", "b"]]
    write_json(path, raw)


def ours(base: Path, adapter: Path) -> lit_adapter.AdaptedLlama:
    return lit_adapter.load(adapter=adapter, base=base, device="cpu", dtype="float32")


def loaded(folder: Path, kind: type = AutoModelForCausalLM, **options: Any) -> Any:
    return kind.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **options).eval()


def assert_near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 5e-5) -> None:
    assert float((found - wanted).abs().max() / wanted.abs().max()) < tolerance


@pytest.mark.parametrize(("name", "config"), pairs(PREFIXES, ("qwen3",)))
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
        if options.get("sliding_window") == 1:
            return  # transformers' own cache keeps all keys of this window
        steps = model.generate(
            IDS[:, :9], max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    assert_near(torch.stack(steps.logits, 1), mine.logits(steps.sequences)[:, 8:-1])


@pytest.mark.parametrize(
    "kind",
    ["qwen3", *[pytest.param(kind, marks=pytest.mark.slow) for kind in ("mistral", "qwen2", "smollm3")]],
)
def test_a_family_keeps_the_rules_of_vllms_transformers_backend(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration builds it, keywords reach the attention function, and the plan names its layers."""
    base, adapter = made(tmp_path, kind, PREFIXES["unrotated"], sliding_window=None)
    export(adapter, tmp_path / "out", base=base, with_base=True)
    model, seen = on_a_backend(tmp_path / "out", monkeypatch)
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "smollm3"])
def test_a_pipeline_and_lm_eval_take_a_family(tmp_path: Path, kind: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    base, adapter = made(tmp_path, kind, PREFIXES["unrotated"])
    folder, mine = tmp_path / "out", ours(base, adapter)
    export(adapter, folder, base=base)
    decoder = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = read_json(folder / "tokenizer.json") | {"decoder": {"type": "ByteLevel", **decoder}}
    write_json(folder / "tokenizer.json", tokenizer)  # the tests' base has no decoder
    pipe = transformers.pipeline("text-generation", model=str(folder), trust_remote_code=True)
    said = pipe([{"role": "user", "content": "Say it back."}], max_new_tokens=9, do_sample=False)
    assert said[0]["generated_text"][-1]["content"] == mine.generate("Say it back.", max_new_tokens=9)
    harness = HFLM(
        pretrained=str(folder), trust_remote_code=True, device="cpu", dtype="float32", batch_size=2
    )
    asked = [("The cat", " sat down."), ("Count to", " three slowly, please")]
    found = harness.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked])
    for (context, text), (log_likelihood, _) in zip(asked, found, strict=True):
        ids, start = harness.tok_encode(context + text), len(harness.tok_encode(context))
        logs = mine.logits(torch.tensor([ids]))[0].log_softmax(-1)
        wanted = sum(float(logs[at - 1, ids[at]]) for at in range(start, len(ids)))
        assert log_likelihood == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("name", "config"), pairs(MERGED, ("qwen3", "smollm3"), LACKING))
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
    message = f"adapter.safetensors: cannot go into a GGUF file: llama.cpp lacks {LACKING[name]}"
    with pytest.raises(UserError, match=message):
        export(adapter, tmp_path / "out", base=base, to="gguf")
    assert not (tmp_path / "out").exists()


def test_v2_on_smollm3_is_no_gguf_file(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "smollm3", MERGED["v2"])
    with pytest.raises(UserError, match=r"lacks layers without rotary positions together with bias"):
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


@needs_llama_cpp
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_llama_cpp_gives_the_adapters_logits_and_greedy_answers(tmp_path: Path) -> None:
    """Of every case, in one process; within the window, which it does not have."""
    jobs, wanted = [], []
    for name, (kind, options) in {**FAMILY_CASES, "llama-yarn": CASES["llama-yarn"]}.items():
        for form, config in MERGED.items():
            biased = form == "v2" and kind in ("qwen3", "smollm3")
            if biased or name in LACKING:
                continue
            folder = tmp_path / name / form
            base, adapter = made(folder, kind, config, **options)
            export(adapter, folder / "out", base=base, to="gguf", kind="f32")
            path, model = folder / "out" / "out-F32.gguf", ours(base, adapter)
            length = options.get("sliding_window") or 40
            ids = IDS[0, :length].tolist()
            n_more = 12 if length == 40 else 0
            answer = [*ids]
            for _ in range(n_more):
                answer.append(int(model.logits(torch.tensor([answer]))[0, -1].argmax()))
            jobs.append(Job(str(path), ids, n_more, HARD[3:12]))
            tokens = [load_tokenizer(base).encode(text) for text in HARD[3:12]]
            logs = model.logits(torch.tensor([ids]))[0].double().log_softmax(-1)
            wanted.append((name, form, logs, answer[length:], tokens))
    for (name, form, logs, answer, tokens), found in zip(wanted, computed(jobs, tmp_path), strict=True):
        likely = logs > -12
        assert float((found.log_probabilities - logs)[likely].abs().max()) < 1e-4, (name, form)
        assert (found.greedy[: len(answer)], found.tokens) == (answer, tokens), (name, form)
