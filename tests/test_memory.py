"""The memory estimate compared with what autograd really keeps, and with the tensors of real models."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from paper import paper
from random_records import encoded
from tiny_models import open_adapter, random_llama
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lit_adapter.data.packing import Packer, shared_preambles
from lit_adapter.device import free_bytes
from lit_adapter.model import loss
from lit_adapter.model.adapter import adapter_parameters
from lit_adapter.model.attention import PackedRow
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.executors import Setting, choose_for_training
from lit_adapter.model.llama import Llama
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.model.loss import row_loss
from lit_adapter.training import memory
from lit_adapter.training.memory import Memory, Sizes

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "bf16-mixed": torch.float32}


def packed(n_records: int = 20, longest: int = 40) -> PackedRow:
    records = encoded(0, n_records, longest=longest)
    packer = Packer(records, shared_preambles(records), mask_prompt=True, row_tokens=100_000)
    return packer.row(list(range(n_records)))


def estimate(model: LlamaConfig, adapter: AdapterConfig, row: PackedRow, **layout: Any) -> Memory:
    return Sizes(model, adapter, row, row, **layout).memory


def kept_for_backward(model: Llama, row: PackedRow, *, recompute: bool = False) -> int:
    """Bytes of every storage that autograd keeps, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        summed = row_loss(model, row, recompute=recompute)
    total = sum(found.values())
    summed.backward()
    return total


ADAPTERS: tuple[dict[str, Any], ...] = (
    {"layers": 1},
    {"layers": 2, "dropout": 0.1},
    {},
    {"version": "v2"},
    {"version": "v2", "layers": 2, "head": True},
    {"version": "v2", "prompt_length": 0},
    {"norms": True, "layers": 1, "gate": "token", "prefix_query": "unrotated"},
    {"norms": True, "prompt_length": 0},
)


@pytest.mark.parametrize(
    ("longest", "precision"),
    [
        *((40, precision) for precision in DTYPES),
        (700, "32-true"),
        *(pytest.param(700, precision, marks=pytest.mark.slow) for precision in list(DTYPES)[1:]),
    ],
)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_activations_are_what_autograd_keeps(adapter: dict[str, Any], longest: int, precision: str) -> None:
    """To the byte: grouped queries, two shared preambles, records of uneven length, also very long ones."""
    model = random_llama(dtype=DTYPES[precision], n_embd=96, head_dim=24, n_hidden=160)
    config = AdapterConfig(**{"prompt_length": 5} | adapter)
    open_adapter(model, config)
    row = packed(4 if longest > 100 else 20, longest=longest)
    with torch.autocast("cpu", torch.bfloat16, enabled="mixed" in precision):
        kept = kept_for_backward(model, row)
    kept += (
        len(row.target_index) * model.config.n_embd * DTYPES[precision].itemsize
    )  # the loss keeps its gradient
    assert estimate(model.config, config, row, precision=precision).activations == kept


@pytest.mark.parametrize("adapter", [{}, {"norms": True, "layers": 2}])
@pytest.mark.parametrize(
    "sizes",
    [
        {"qkv_bias": True},
        {"head_norms": True},
        {"window": 9, "windowed_layers": (0, 2)},
        {"unrotated_layers": (1,)},
    ],
    ids=["qwen2", "qwen3", "mistral", "smollm3"],
)
def test_activations_of_every_family_are_what_autograd_keeps(
    sizes: dict[str, Any], adapter: dict[str, Any]
) -> None:
    model = random_llama(dtype=torch.float32, n_layer=4, **sizes)
    config = AdapterConfig(prompt_length=5, **adapter)
    open_adapter(model, config)
    row = packed()
    kept = kept_for_backward(model, row) + len(row.target_index) * model.config.n_embd * 4
    assert estimate(model.config, config, row, precision="32-true").activations == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("adapter", "vocab"), [({}, 3000), ({"version": "v2", "head": True}, 3000), ({}, 61)]
)
def test_the_peak_of_a_step_stays_within(
    dtype: torch.dtype, adapter: dict[str, Any], vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the logits are the largest of what is held for a moment, and where a layer's own tensors are."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 2**18)
    monkeypatch.setattr(memory, "CHUNK_LOGITS", 2**18)
    model = random_llama(dtype=dtype, vocab_size=vocab, n_embd=96, head_dim=24, n_hidden=160)
    config, row = AdapterConfig(prompt_length=5, **adapter), packed()
    open_adapter(model, config)
    row_loss(model, row).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        row_loss(model, row).backward()
    events: Any = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    most = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    precision = "32-true" if dtype == torch.float32 else "bf16-true"
    found = estimate(model.config, config, row, precision=precision)
    assert most <= found.activations + found.workspace < 1.5 * most


@pytest.mark.parametrize("precision", DTYPES)
def test_recomputed_layers_keep_their_input_and_one_layer_at_a_time(precision: str) -> None:
    model = random_llama(dtype=DTYPES[precision], n_layer=6, n_embd=96, head_dim=24, n_hidden=160)
    config, row = AdapterConfig(prompt_length=5), packed()
    open_adapter(model, config)
    with torch.autocast("cpu", torch.bfloat16, enabled="mixed" in precision):
        inputs = kept_for_backward(model, row, recompute=True)
    found = estimate(model.config, config, row, precision=precision, recompute=True).activations
    whole = estimate(model.config, config, row, precision=precision).activations
    assert inputs < found < whole / 2
    assert found == pytest.approx(inputs + whole / 6, rel=0.25)


def test_weights_and_adapter_are_counted_to_the_byte() -> None:
    for tied in (False, True):
        model = random_llama(dtype=torch.float32, tie_embeddings=tied, attention_bias=True, mlp_bias=True)
        base = sum(parameter.numel() for parameter in model.parameters())
        config = AdapterConfig(prompt_length=7, layers=2, gate="channel")
        open_adapter(model, config)
        trained = sum(parameter.numel() for _, parameter in adapter_parameters(model))
        row = packed()
        for precision, size in (("32-true", 4), ("bf16-true", 2), ("bf16-mixed", 4), ("16-mixed", 4)):
            found = estimate(model.config, config, row, precision=precision)
            assert (found.weights, found.adapter) == (base * size, trained * 16)


def test_weights_that_are_sharded_are_a_shard_an_output_layer_and_three_layers() -> None:
    model = random_llama(dtype=torch.float32)
    layer = sum(parameter.numel() for parameter in model.layers[0].parameters())
    config, row = AdapterConfig(), packed()
    whole = estimate(model.config, config, row, precision="32-true")
    shared = estimate(model.config, config, row, precision="32-true", shards=4)
    assert shared.weights == -(-whole.weights // 4) + 4 * (3 * layer + model.lm_head.weight.numel())
    assert replace(shared, weights=0) == replace(whole, weights=0)
    grouped = estimate(model.config, config, row, precision="32-true", shards=4, tensor_parallel=2)
    held = whole.weights - 4 * 3 * layer // 2  # of a group; of three layers each has half
    assert grouped.weights == -(-held // 2) + 4 * (3 * layer // 2 + model.lm_head.weight.numel())
    n_layer = model.config.n_layer
    for n in range(1, n_layer + 1):
        mixed = estimate(model.config, config, row, precision="32-true", shards=4, whole_layers=n)
        sharded = -(-(whole.weights - 4 * n * layer) // 4)
        embeddings = model.embed_tokens.weight.numel()
        gathered = max(min(3, n_layer - n) * layer, embeddings) + model.lm_head.weight.numel()
        assert mixed.weights == sharded + 4 * (gathered + n * layer)


def test_activations_grow_with_row_and_layers() -> None:
    model = random_llama().config
    one, two = (estimate(model, AdapterConfig(), packed(n), precision="32-true") for n in (20, 40))
    assert two.activations > 1.5 * one.activations
    fewer = estimate(model, AdapterConfig(layers=1), packed(), precision="32-true")
    assert fewer.activations < one.activations / 3
    assert two.weights == one.weights


def test_free_memory_is_the_machines_or_the_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tighter of the two counts; file cache that the container may drop is free."""
    meminfo, group, cpu = tmp_path / "meminfo", tmp_path / "group", torch.device("cpu")
    monkeypatch.setattr("lit_adapter.device.MEMINFO", meminfo)
    monkeypatch.setattr("lit_adapter.device.CGROUP", group)
    meminfo.write_text("MemTotal:  900 kB\nMemAvailable:     500 kB\n")
    assert free_bytes(cpu) == 500 * 1024
    group.mkdir()
    (group / "memory.max").write_text("400000\n")
    (group / "memory.current").write_text("300000\n")
    (group / "memory.stat").write_text("anon 1000\ninactive_file 50000\n")
    assert free_bytes(cpu) == 150_000
    (group / "memory.max").write_text("max\n")
    old = group / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("9000\n")
    (old / "memory.usage_in_bytes").write_text("8000\n")
    assert free_bytes(cpu) == 1000
    (old / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert free_bytes(cpu) == 500 * 1024
    meminfo.unlink()
    assert free_bytes(cpu) is None


def test_free_memory_of_this_machine_is_a_plausible_number() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is not None
    assert 2**24 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_fused_blocks_keep_the_values_that_their_node_saves() -> None:
    """6 C + 2 M numbers a token with as many key as query heads; C when the rest is computed again."""
    model = replace(random_llama().config, n_kv_head=4, head_dim=16, n_embd=64)
    row, config = packed(), paper()
    plain = len(row.ids) * model.n_embd
    one, two = (
        estimate(replace(model, n_layer=n), config, row, precision="bf16-true", device="cuda").activations
        for n in (2, 3)
    )
    C, M, H = model.n_embd, model.n_hidden, model.n_head
    assert two - one == len(row.ids) * (2 * (6 * C + 2 * M) + 8 * H)
    one, two = (
        estimate(
            replace(model, n_layer=n), config, row, precision="bf16-true", device="cuda", recompute=True
        ).activations
        for n in (2, 3)
    )
    assert two - one == 2 * plain
    forms = [replace(config, layers=layers, norms=norms) for layers in (1, None) for norms in (False, True)]
    top, normed_top, all_, norms = (
        estimate(model, form, row, precision="bf16-true", device="cuda").activations for form in forms
    )
    assert top < all_
    lora, v2 = replace(config, lora=LoraConfig(rank=3)), replace(config, version="v2")
    one, two = (
        estimate(replace(model, n_layer=n), lora, row, precision="bf16-true", device="cuda").activations
        for n in (2, 3)
    )
    rows = 16 + 8 + 8 + 8  # 9, 3, 6 and 3 of the groups, filled up
    assert two - one == len(row.ids) * (2 * (6 * C + 2 * M + rows) + 8 * H)
    one, two = (
        estimate(replace(model, n_layer=n), v2, row, precision="bf16-true", device="cuda").activations
        for n in (2, 3)
    )
    assert two - one == len(row.ids) * (2 * (8 * C + 2 * M) + 8 * H)
    assert norms - all_ == normed_top - top == 2 * len(row.target_index) * C
    halves = {"precision": "bf16-true", "device": "cuda", "shards": 2, "tensor_parallel": 2}
    one, two = (estimate(replace(model, n_layer=n), config, row, **halves).activations for n in (2, 3))
    assert two - one == len(row.ids) * (2 * (2 * C + 4 * C // 2 + 2 * M // 2) + 8 * H // 2)


def test_the_fused_executor_is_planned_where_it_applies() -> None:
    model, config = replace(random_llama().config, head_dim=16), AdapterConfig()
    gpu = Setting(torch.device("cuda"), torch.bfloat16)
    form = replace(config, gate="token", prefix_query="unrotated", norms=True)
    dropped = replace(config, dropout=0.1, lora=LoraConfig(rank=2, dropout=0.1))
    for own in (config, form, replace(form, prompt_length=0), dropped, replace(config, version="v2")):
        assert choose_for_training(model, own, gpu).name == "fused"
        assert choose_for_training(model, own, gpu, tensor_parallel=2).name == "fused"
    assert choose_for_training(replace(model, attention_bias=True, mlp_bias=True), form, gpu).name == "fused"
    for setting in (replace(gpu, dtype=torch.float32), Setting(torch.device("cpu"), torch.bfloat16)):
        assert choose_for_training(model, config, setting).name == "modules"
    for other, adapter, why in (
        (replace(model, head_dim=80), config, "the attention heads have 80 channels"),
    ):
        assert choose_for_training(other, adapter, gpu).why_not_fast == why
