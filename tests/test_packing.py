from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_records import encoded
from tiny_models import open_adapter, random_llama

from lit_adapter.data.encode import Encoded, kinds_of_tasks
from lit_adapter.data.packing import Packer, share_of_step, shared_preambles
from lit_adapter.model import attention
from lit_adapter.model.adapter import adapter_parameters
from lit_adapter.model.attention import CausalView, PackedRow
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.gates import GATE_FORMS
from lit_adapter.model.llama import Llama
from lit_adapter.model.loss import row_loss
from lit_adapter.text.conversation import ANSWER, CONTEXT, NEVER


@dataclass
class Result:
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    n_targets: int


def gradients_of(model: Llama, loss: torch.Tensor, n_targets: int) -> Result:
    names, parameters = zip(*adapter_parameters(model), strict=True)
    found = torch.autograd.grad(loss, parameters)
    return Result(loss.detach(), dict(zip(names, found, strict=True)), n_targets)


def plain(model: Llama, data: Encoded, records: Any, mask_prompt: bool) -> Result:
    """One record at a time, all logits, torch's cross-entropy: nothing packed, shared or chunked."""
    total, count = torch.zeros((), dtype=model.embed_tokens.weight.dtype), 0
    for index in records:
        ids = torch.from_numpy(data.record(index).astype(np.int64))
        labels = ids.clone()
        labels[: data.n_prompt[index] if mask_prompt else 1] = -100
        view = CausalView(model.rotation(torch.arange(len(ids))[None]))
        logits = model.logits(model(ids[None], view))[0]
        total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return gradients_of(model, total, count)


def packed(model: Llama, rows: list[PackedRow]) -> Result:
    total = torch.stack([row_loss(model, row) for row in rows]).sum()
    return gradients_of(model, total, sum(len(row.target_id) for row in rows))


def assert_same(found: Result, wanted: Result, tolerance: float = 1e-10) -> None:
    assert found.n_targets == wanted.n_targets
    assert abs(found.loss - wanted.loss) / wanted.loss < tolerance
    assert found.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        assert gradient.norm() > 0
        error = (found.gradients[name] - gradient).norm() / gradient.norm()
        assert error < tolerance, f"{name}: relative error {error}"


def rounding(found: Result, exact: Result) -> float:
    """How far an fp32 result is from the exact one: loss, and all gradients together, relative."""
    off = torch.stack([(found.gradients[n] - g).norm() for n, g in exact.gradients.items()]).norm()
    size = torch.stack([g.norm() for g in exact.gradients.values()]).norm()
    return max(float(abs(found.loss - exact.loss) / exact.loss), float(off / size))


MODELS: dict[str, tuple[dict[str, Any], AdapterConfig]] = {
    "gqa-top-layers": ({}, AdapterConfig(prompt_length=4, layers=2)),
    "mha-all-layers": ({"n_kv_head": 4}, AdapterConfig(prompt_length=3, prompt_init_std=1.0)),
    "mqa-tied-bias": (
        {"n_kv_head": 1, "tie_embeddings": True, "attention_bias": True, "mlp_bias": True},
        AdapterConfig(prompt_length=5, gate="channel"),
    ),
    "gqa-token": ({}, AdapterConfig(prompt_length=4, gate="token", prefix_query="unrotated")),
    "norms-alone": ({"n_kv_head": 4}, AdapterConfig(prompt_length=0, norms=True)),
    "one-layer": ({"n_layer": 1, "head_dim": 12}, AdapterConfig(prompt_length=1, gate="layer")),
    "last-of-four": ({"n_layer": 4}, AdapterConfig(prompt_length=2, layers=1, gate="identity")),
}


def model_of(name: str, dtype: torch.dtype = torch.float64) -> Llama:
    sizes, adapter = MODELS[name]
    return open_adapter(random_llama(11, dtype, **sizes), adapter, seed=5)


@pytest.mark.parametrize("mask_prompt", [True, False], ids=["answers", "all-tokens"])
@pytest.mark.parametrize("share", [True, False], ids=["shared-heads", "whole-records"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_equal_one_record_at_a_time(name: str, share: bool, mask_prompt: bool) -> None:
    model, data = model_of(name), encoded(3, cut=True)
    heads = shared_preambles(data) if share else {}
    assert len(heads) == (2 if share else 0)
    wanted = plain(model, data, range(len(data)), mask_prompt)
    for row_tokens in (1000, 60):
        packer = Packer(data, heads, mask_prompt=mask_prompt, row_tokens=row_tokens)
        rows = [packer.row(row) for row in packer.assign(np.arange(len(data)))]
        assert (len(rows) == 1) == (row_tokens == 1000)
        assert packer.n_targets(np.arange(len(data))) == wanted.n_targets
        assert_same(packed(model, rows), wanted)


@pytest.mark.parametrize("query", ["rotated", "unrotated"])
@pytest.mark.parametrize("gate", GATE_FORMS)
def test_packed_rows_of_every_form_equal_one_record_at_a_time(gate: Any, query: Any) -> None:
    config = AdapterConfig(prompt_length=3, layers=2, gate=gate, prefix_query=query, norms=True)
    model, data = open_adapter(random_llama(11), config, seed=5), encoded(3, 8, cut=True)
    packer = Packer(data, shared_preambles(data), mask_prompt=True, row_tokens=1000)
    assert_same(packed(model, [packer.row(list(range(8)))]), plain(model, data, range(8), True))


@pytest.mark.parametrize("name", MODELS)
def test_fp32_is_near_fp64(name: str) -> None:
    data = encoded(4, 12)
    wanted = plain(model_of(name), data, range(12), True)
    packer = Packer(data, shared_preambles(data), mask_prompt=True, row_tokens=500)
    found = packed(model_of(name).to(torch.float32), [packer.row(list(range(12)))])
    assert_same(found, wanted, tolerance=2e-4)


@pytest.mark.parametrize("share", [True, False])
def test_long_segments_take_the_fused_kernel_and_agree(share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = model_of("gqa-top-layers"), encoded(5, cut=True)
    packer = Packer(data, shared_preambles(data) if share else {}, mask_prompt=True, row_tokens=1000)
    row = packer.row(list(range(len(data))))
    monkeypatch.setattr(attention, "MOST_SCORED", 0)
    assert_same(packed(model, [row]), plain(model, data, range(len(data)), True))


@pytest.mark.slow
@settings(max_examples=25, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    n_records=st.integers(1, 14),
    longest=st.integers(2, 30),
    row_tokens=st.integers(70, 300),
    n_processes=st.integers(1, 3),
    share=st.booleans(),
    mask_prompt=st.booleans(),
    name=st.sampled_from(sorted(MODELS)),
)
def test_any_batch_cut_any_way(
    seed: int,
    n_records: int,
    longest: int,
    row_tokens: int,
    n_processes: int,
    share: bool,
    mask_prompt: bool,
    name: str,
) -> None:
    """All processes' shares of a step, together, are the step: also where a process has no record.

    In fp64 to rounding; in fp32 as near to that as one record at a time is.
    """
    model, data = model_of(name), encoded(seed, n_records, cut=True, longest=longest)
    heads = shared_preambles(data) if share else {}
    packer = Packer(data, heads, mask_prompt=mask_prompt, row_tokens=row_tokens)
    records = np.random.default_rng(seed).permutation(n_records)
    shares = [share_of_step(packer, records, 0, rank, n_processes) for rank in range(n_processes)]
    assert len({len(part.rows) for part in shares}) == 1  # as many backward passes on every process
    assert sorted(r for part in shares for row in part.records for r in row) == list(range(n_records))
    rows = [row for part in shares for row in part.rows]
    assert {part.n_targets for part in shares} == {sum(len(row.target_id) for row in rows)}
    assert {part.n_tokens for part in shares} == {len(data.ids)}
    wanted = plain(model, data, range(n_records), mask_prompt)
    assert shares[0].n_targets == wanted.n_targets
    assert_same(packed(model, rows), wanted)
    narrow = model_of(name).to(torch.float32)
    usual = rounding(plain(narrow, data, range(n_records), mask_prompt), wanted)
    assert rounding(packed(narrow, rows), wanted) < 3 * usual + 2e-6


def test_a_row_without_records_gives_zero_loss_and_zero_gradients() -> None:
    """With fewer records than processes, the others still run a backward pass, which DDP waits for."""
    model, data = model_of("gqa-top-layers"), encoded(1, 1)
    packer = Packer(data, {}, mask_prompt=True, row_tokens=100)
    empty = share_of_step(packer, np.array([0]), 0, 1, 2)
    assert empty.records == [[]]
    found = packed(model, empty.rows)
    assert (found.loss.item(), found.n_targets) == (0.0, 0)
    assert all(not gradient.any() for gradient in found.gradients.values())


def test_a_head_never_reaches_into_an_answer() -> None:
    """Records that are equal to the end share their prompt, not what is learned."""
    ids = np.tile(np.arange(2, 12), 3).astype(np.int32)
    same = {"variant": np.zeros(3, np.int8), "source_row": np.arange(3, dtype=np.int32)}
    data = Encoded(
        ids=ids,
        start=np.array([0, 10, 20]),
        length=np.full(3, 10, np.int32),
        kinds=kinds_of_tasks(np.full(3, 10), np.array([7, 9, 8])),
        n_prompt=np.array([7, 9, 8], np.int32),
        whole=np.ones(3, np.bool_),
        **same,
    )
    assert shared_preambles(data)[0].tolist() == list(range(2, 9))
    model = model_of("gqa-top-layers")
    packer = Packer(data, shared_preambles(data), mask_prompt=True, row_tokens=100)
    assert_same(packed(model, [packer.row([0, 1, 2])]), plain(model, data, range(3), True))


def conversations(seed: int, n_records: int = 7) -> Encoded:
    """Records with several answers each, some of them not learned; most begin alike."""
    draw = np.random.default_rng(seed)
    ids, kinds = [], []
    for index in range(n_records):
        tokens, what = (list(range(20, 26)), [CONTEXT] * 6) if index % 3 else ([], [])
        for _ in range(draw.integers(1, 5)):
            asked, answered = draw.integers(1, 9, 2)
            tokens += draw.integers(2, 61, asked + answered).tolist()
            what += [CONTEXT] * asked + [ANSWER if draw.random() < 0.7 else NEVER] * answered
        ids.append(np.array([*tokens, 5, 6]))
        kinds.append(np.array([*what, ANSWER, ANSWER]))
    return Encoded(
        ids=np.concatenate(ids).astype(np.int32),
        start=np.cumsum([0, *map(len, ids[:-1])]).astype(np.int64),
        length=np.array([*map(len, ids)], np.int32),
        kinds=np.concatenate(kinds).astype(np.int8),
        n_prompt=np.array([int((one == ANSWER).argmax()) for one in kinds], np.int32),
        variant=np.zeros(n_records, np.int8),
        whole=np.ones(n_records, np.bool_),
        source_row=np.arange(n_records, dtype=np.int32),
    )


@pytest.mark.parametrize("mask_prompt", [True, False], ids=["answers", "all-tokens"])
@pytest.mark.parametrize("seed", range(3))
def test_packed_conversations_equal_padded_ones(seed: int, mask_prompt: bool) -> None:
    """Loss and gradients of one padded batch, where every token sees its own conversation alone."""
    model, data = model_of("gqa-top-layers"), conversations(seed)
    longest = int(data.length.max())
    ids, labels = torch.zeros(len(data), longest, dtype=torch.long), torch.full((len(data), longest), -100)
    for row in range(len(data)):
        tokens = torch.from_numpy(data.record(row).astype(np.int64))
        kinds = torch.from_numpy(data.kinds[data.start[row] :][: data.length[row]])
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = tokens.where(
            kinds >= (ANSWER if mask_prompt else CONTEXT), torch.tensor(-100)
        )
    position = torch.arange(longest).expand_as(ids)
    logits = model.logits(model(ids, CausalView(model.rotation(position))))
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    wanted = gradients_of(model, loss, int((labels[:, 1:] != -100).sum()))

    for heads in ({0: np.arange(20, 26)}, {}):
        packer = Packer(data, heads, mask_prompt=mask_prompt, row_tokens=70)
        found = packed(model, [packer.row(row) for row in packer.assign(np.arange(len(data)))])
        assert found.n_targets == packer.n_targets(np.arange(len(data)))
        assert_same(found, wanted)


def test_conversations_share_how_they_begin() -> None:
    data = conversations(0)
    alike = [row for row in range(len(data)) if row % 3]
    assert [
        int(n) for n in Packer(data, {0: np.arange(20, 26)}, mask_prompt=True, row_tokens=70).n_preamble
    ] == [6 * (row in alike) for row in range(len(data))]
