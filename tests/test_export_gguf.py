"""Merged adapters as GGUF files: read back by our own reader, by the gguf package, and run by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizer_kinds as kinds
import torch
from convert_sources import random_llama
from generation_fixtures import save_random_adapter
from llama_cpp import Job, computed, needs_llama_cpp
from test_merge import BARE, NORMS, made
from transformers import AutoTokenizer

import lit_adapter
from lit_adapter.cli.export import main as export_main
from lit_adapter.errors import UserError
from lit_adapter.files.write import write_json
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.text.byte_pairs import Split, byte_level_json
from lit_adapter.text.gguf_export import gguf_tokenizer
from lit_adapter.text.gguf_vocabulary import PRE_TOKENIZERS, write_gguf_tokenizer
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template
from lit_adapter.weights.adapter_file import read_adapter, save_adapter
from lit_adapter.weights.convert import convert
from lit_adapter.weights.export.export import export
from lit_adapter.weights.gguf_file import GGUFSource
from lit_adapter.weights.measure import source_logits

LORA = AdapterConfig(prompt_length=0, norms=True, lora=LoraConfig(rank=3))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
IDS = torch.arange(3, 25)[None]


def exported(folder: Path, config: AdapterConfig, kind: str, **sizes: object) -> tuple[Path, Any]:
    """The GGUF file of a small adapter with random values, and our own model of it."""
    base, adapter = made(folder, config, **sizes)
    export(adapter, folder / "out", base=base, to="gguf", kind=kind)
    ours = lit_adapter.load(adapter=adapter, base=base, device="cpu", dtype="float32")
    return folder / "out" / f"out-{kind.upper()}.gguf", ours


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
        {"head_dim": 32, "rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ],
    ids=["plain", "tied", "biased", "llama3", "linear"],
)
@pytest.mark.parametrize("config", [BARE, NORMS, LORA], ids=["v2", "norms", "lora"])
def test_our_reader_finds_the_adapters_logits(
    tmp_path: Path, config: AdapterConfig, sizes: dict[str, object]
) -> None:
    path, ours = exported(tmp_path, config, "f32", **sizes)
    wanted = ours.logits(IDS)
    torch.testing.assert_close(source_logits(GGUFSource(path), IDS), wanted, rtol=2e-5, atol=2e-5)
    assert (ours.base.logits(IDS) - wanted).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_the_package_reads_every_type(tmp_path: Path, kind: str) -> None:
    """A matrix holds what the package makes of the merged one; one whose rows are no whole blocks is F16."""
    path, _ = exported(tmp_path, NORMS, kind, hidden_size=64, intermediate_size=80)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    plain = random_llama(max_position_embeddings=512, intermediate_size=80).state_dict()
    for name, theirs in {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}.items():
        tensor = tensors[f"blk.1.{theirs}.weight"]
        wanted = kind.upper() if name == "mlp.up_proj" or "16" in kind else "F16"
        assert tensor.tensor_type.name == wanted
        values = plain[f"model.layers.1.{name}.weight"].numpy()
        packed = gguf.quants.quantize(values, tensor.tensor_type)
        assert (packed == tensor.data).all()
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    ends = "Q8_0" if kind[0] == "q" else kind.upper()
    assert tensors["token_embd.weight"].tensor_type.name == tensors["output.weight"].tensor_type.name == ends


def test_ollama_is_told_of_template_and_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = made(tmp_path, NORMS)
    argv = [str(adapter), "--to", "gguf", "--out", str(tmp_path / "mine"), "--base", str(base)]
    assert export_main(argv) == 0
    told = capsys.readouterr().out
    assert "largest logit difference" in told
    assert f"ollama create mine -f {tmp_path / 'mine' / 'Modelfile'}" in told
    text = (tmp_path / "mine" / "Modelfile").read_text()
    assert text.startswith('FROM ./mine-Q8_0.gguf\nTEMPLATE """{{ if .System }}Below is an instruction')
    assert "### Instruction:\n{{ .System }}\n\n### Input:\n{{ .Prompt }}\n\n### Response:{{ else }}" in text
    assert text.endswith('{{ end }}{{ .Response }}</s>"""\nPARAMETER stop "</s>"\nPARAMETER temperature 0\n')
    fields = gguf.GGUFReader(tmp_path / "mine" / "mine-Q8_0.gguf").fields
    assert "### Response:" in fields["tokenizer.chat_template"].contents()
    with pytest.raises(UserError, match="mine: already there; use --overwrite"):
        export_main(argv)
    assert export_main([*argv, "--overwrite", "--type", "f16"]) == 0
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"mine-F16.gguf", "Modelfile"}


@pytest.mark.parametrize("name", ["sentencepiece", "gguf-sentencepiece", "json-bytes", "gguf-bytes", "ranks"])
def test_every_kind_of_tokenizer_comes_back(tmp_path: Path, name: str) -> None:
    for part in ("one", "two"):
        (tmp_path / part).mkdir()
    kind = kinds.MAKERS[name](tmp_path / "one")
    keys = gguf_tokenizer(tmp_path / "one", resolve_template("alpaca", kind.ours), kind.ours.vocab_size + 7)
    assert len(keys["tokens"]) == len(set(keys["tokens"])) == kind.ours.vocab_size + 7
    write_gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in keys.items()}, tmp_path / "two")
    again = load_tokenizer(tmp_path / "two")
    for text in kinds.HARD:
        assert again.encode(text) == kind.ours.encode(text), text
    assert (again.bos_id, again.eos_id, again.add_bos) == (
        kind.ours.bos_id,
        kind.ours.eos_id,
        kind.ours.add_bos,
    )
    assert kind.ours.control_tokens.items() <= again.control_tokens.items()


@pytest.mark.parametrize("split", ["qwen2", "tekken", "llama3", "digits", "gpt2"])
def test_every_split_of_texts_comes_back(tmp_path: Path, split: Split) -> None:
    for part in ("one", "two"):
        (tmp_path / part).mkdir()
    raw = json.loads(kinds.byte_level_json())
    vocab, merges = raw["model"]["vocab"], [tuple(merge) for merge in raw["model"]["merges"]]
    write_json(
        tmp_path / "one" / "tokenizer.json", byte_level_json(vocab, merges, raw["added_tokens"], split)
    )
    write_json(tmp_path / "one" / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    given = load_tokenizer(tmp_path / "one")
    keys = gguf_tokenizer(tmp_path / "one", resolve_template("alpaca", given), given.vocab_size)
    assert PRE_TOKENIZERS[keys["pre"]] == split
    write_gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in keys.items()}, tmp_path / "two")
    again = load_tokenizer(tmp_path / "two")
    for text in [*kinds.HARD, *kinds.CORPUS[:6]]:
        assert again.encode(text) == given.encode(text), text


def test_what_a_gguf_file_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases = [
        (AdapterConfig(prompt_length=2), "has prompts, whose attention has a softmax of its own .*export it"),
        (
            AdapterConfig(version="v2", prompt_length=0, head=True),
            "adapts the output layer, which has no bias",
        ),
    ]
    for number, (config, message) in enumerate(cases):
        base, adapter = made(tmp_path / str(number), config)
        with pytest.raises(UserError, match=message):
            export(adapter, out, base=base, to="gguf")
    base, adapter = made(tmp_path / "odd", NORMS)
    with pytest.raises(UserError, match="--with-base and --dtype are for transformers"):
        export(adapter, out, base=base, to="gguf", with_base=True)
    with pytest.raises(UserError, match="--type f16 is for GGUF files; give --to gguf too"):
        export(adapter, out, base=base, kind="f16")
    assert not out.exists()


@pytest.mark.parametrize("scheme", ["prepend", "first"])
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path: Path, scheme: str) -> None:
    kind = kinds.make_spaced(tmp_path, scheme)
    with pytest.raises(UserError, match=r"tokenizer.json: splits texts in a way that is unknown here"):
        gguf_tokenizer(tmp_path, resolve_template("alpaca", kind.ours), kind.ours.vocab_size)


def test_values_beyond_a_types_range_leave_nothing(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, BARE)
    info, state = read_adapter(adapter)
    state["layers.0.mlp.up_proj.adapter_scale"].fill_(1e7)
    save_adapter(adapter, state, info)
    with pytest.raises(
        UserError, match=r"up_proj.weight holds values beyond the range of f16; use --type bf16"
    ):
        export(adapter, tmp_path / "out", base=base, to="gguf", kind="f16")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


@needs_llama_cpp
@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_llama_cpp_gives_our_greedy_answers(tmp_path: Path, kind: str) -> None:
    """On the real base, from messages to tokens."""
    base, adapter = with_random_lora(real_base(), tmp_path)
    export(adapter, tmp_path / "out", base=base, to="gguf", kind=kind)
    ours = lit_adapter.load(adapter=adapter, base=base, device="cpu", dtype="float32")
    tokenizer = load_tokenizer(base)
    theirs = AutoTokenizer.from_pretrained(base)
    path = str(tmp_path / "out" / f"out-{kind.upper()}.gguf")
    theirs.chat_template = gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents()
    tasks = ["What is the capital of France?", "List three colours.", "12345 + 6789 = ?"]
    prompts = [
        theirs.apply_chat_template([{"role": "user", "content": task}], tokenize=False) for task in tasks
    ]
    template = resolve_template("alpaca", tokenizer)
    ids = [template.encode_prompt(tokenizer, task) for task in tasks]
    jobs = [Job(path, own, 24, prompts, special=True) for own in ids]
    answers = [ours.generate(task, max_new_tokens=24) for task in tasks]
    for found, answer in zip(computed(jobs, tmp_path), answers, strict=True):
        assert found.tokens == ids
        ended = [id_ in tokenizer.stop_ids for id_ in found.greedy]
        assert tokenizer.decode(found.greedy[: [*ended, True].index(True)]).strip() == answer.strip()
    assert answers != [ours.base.generate(task, max_new_tokens=24) for task in tasks]


@needs_llama_cpp
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_llama_cpp_reads_eight_bits_as_we_do(tmp_path: Path) -> None:
    """It rounds what is multiplied to eight bits too, so the distributions are near, not equal."""
    base, adapter = with_random_lora(real_base(), tmp_path)
    export(adapter, tmp_path / "out", base=base, to="gguf", kind="q8_0")
    path = tmp_path / "out" / "out-Q8_0.gguf"
    ours = lit_adapter.load(base=convert(path, tmp_path / "read"), device="cpu", dtype="float32")
    ids = ours.template.encode_prompt(ours.tokenizer, "What is the capital of France?")
    wanted = ours.logits(torch.tensor([ids]))[0].double().log_softmax(-1)
    found = computed([Job(str(path), ids)], tmp_path)[0].log_probabilities
    assert (wanted.exp() * (wanted - found)).sum(-1).max() < 0.03
    assert (wanted.argmax(-1) == found.argmax(-1)).double().mean() > 0.9


def real_base() -> Path:
    root = Path(__file__).parents[1] / "checkpoints" / "smollm2-135m"
    if not root.is_dir():
        pytest.skip("needs checkpoints/smollm2-135m; scripts/download.py smollm2-135m fetches it")
    return root


def with_random_lora(base: Path, folder: Path) -> tuple[Path, Path]:
    """A real base and an adapter that changes its answers, but not into noise."""
    form = AdapterConfig(prompt_length=0, lora=LoraConfig(rank=3))
    return base, save_random_adapter(base, folder / "a.safetensors", 5, form, scale=0.02)
