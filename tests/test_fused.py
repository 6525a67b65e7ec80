"""Blocks computed whole by the CUDA kernels, compared with fp64 and with the modules' own computation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from random_records import encoded
from tiny_models import open_adapter, random_llama
from torch import Tensor

from lit_adapter.data.packing import Packer, shared_preambles
from lit_adapter.model import tiles
from lit_adapter.model.adapter import adapter_parameters
from lit_adapter.model.attention import BaseView, PackedRow, SegmentView
from lit_adapter.model.block_weights import prepare
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.executors import choose
from lit_adapter.model.llama import Llama
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.model.loss import target_loss
from lit_adapter.model.rope_config import RopeConfig

YARN = RopeConfig(kind="yarn", factor=4.0, original_context_length=64, attention_factor=0.8)
"""Above 1, it would sharpen the attention of random weights so much that bf16 alone makes errors of 0.2."""
CASES: list[dict[str, Any]] = [
    {"head_dim": 64, "n_kv_head": 2, "gate": "tanh", "prompt_length": 10},
    {
        "head_dim": 128,
        "n_kv_head": 4,
        "gate": "identity",
        "prefix_query": "unrotated",
        "prompt_length": 3,
        "layers": 2,
    },
    {"head_dim": 16, "n_kv_head": 1, "gate": "channel", "prompt_length": 17},
    {"head_dim": 64, "n_kv_head": 4, "gate": "layer", "prompt_length": 64, "mask_prompt": False},
    {"head_dim": 64, "n_kv_head": 2, "layers": 2, "lora": LoraConfig(rank=3)},
    {"head_dim": 16, "n_kv_head": 4, "prompt_length": 0, "lora": LoraConfig(rank=16, on=("mlp", "k_proj"))},
    {"head_dim": 32, "n_kv_head": 1, "gate": "token", "prompt_length": 5},
    {
        "head_dim": 128,
        "n_kv_head": 2,
        "gate": "token",
        "prefix_query": "unrotated",
        "prompt_length": 10,
        "norms": True,
    },
    {"head_dim": 64, "n_kv_head": 2, "prompt_length": 0, "norms": True},
    {"head_dim": 64, "n_kv_head": 2, "sizes": {"attention_bias": True, "mlp_bias": True}},
    {"head_dim": 64, "n_kv_head": 2, "sizes": {"head_norms": True}, "layers": 2},
    {
        "head_dim": 32,
        "n_kv_head": 1,
        "sizes": {"head_norms": True, "window": 9, "windowed_layers": (0, 2)},
        "norms": True,
        "prefix_query": "unrotated",
        "lora": LoraConfig(rank=3, on=("attention",)),
    },
    {"head_dim": 64, "n_kv_head": 2, "sizes": {"window": 5, "windowed_layers": (0, 1, 2), "qkv_bias": True}},
    {"head_dim": 16, "n_kv_head": 4, "sizes": {"unrotated_layers": (1, 2)}, "prefix_query": "unrotated"},
    {"head_dim": 64, "n_kv_head": 2, "gate": "token", "prefix_query": "unrotated", "sizes": {"rope": YARN}},
    {"head_dim": 64, "n_kv_head": 2, "version": "v2", "layers": 2, "sizes": {"rope": YARN}},
    {
        "head_dim": 32,
        "n_kv_head": 1,
        "sizes": {"head_norms": True, "qkv_bias": True, "mlp_bias": True},
        "version": "v2",
        "prompt_length": 0,
    },
]


def model_of(case: dict[str, Any], seed: int) -> Llama:
    """A model in fp64 whose every weight is a bf16 number."""
    sizes = {key: case[key] for key in ("head_dim", "n_kv_head")} | case.get("sizes", {})
    model = random_llama(seed, **sizes, n_head=4, n_embd=96, n_hidden=80)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().double()
    fields = AdapterConfig.__dataclass_fields__
    adapter = AdapterConfig(**{key: value for key, value in case.items() if key in fields})
    return open_adapter(model, adapter, seed=seed)


def row_of(case: dict[str, Any], seed: int, n_records: int = 20) -> PackedRow:
    data = encoded(seed, n_records, cut=bool(seed % 2), longest=60)
    mask_prompt = case.get("mask_prompt", True)
    packer = Packer(data, shared_preambles(data), mask_prompt=mask_prompt, row_tokens=100_000)
    return packer.row(list(range(n_records)))


def placed(model: Llama, base: torch.dtype, adapter: torch.dtype, device: str = "cuda") -> Llama:
    frequency = model.inverse_frequency
    model = model.to(device, base)
    for _, parameter in adapter_parameters(model):
        parameter.data = parameter.data.to(adapter)
    model.inverse_frequency = frequency.to(device)
    return model


def loss_and_gradients(model: Llama, row: PackedRow, view: BaseView) -> tuple[Tensor, dict[str, Tensor]]:
    ids, _, target_index, target_id = row.inputs(model.embed_tokens.weight.device)
    hidden = model(ids[None], view, target_index)[0]
    loss = target_loss(hidden, model.lm_head.weight, target_id)
    names, parameters = zip(*adapter_parameters(model), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return loss.detach().double(), dict(zip(names, (g.double() for g in gradients), strict=True))


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The relative error of all gradients together."""
    difference = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return (difference / sum(float(g.square().sum()) for g in wanted.values())) ** 0.5


def exactly_and_by_modules(case: dict[str, Any], row: PackedRow, seed: int, device: str) -> tuple[Any, ...]:
    """The loss and gradients in fp64 and by the modules in bf16; and the model, in bf16."""
    model = placed(model_of(case, seed), torch.float64, torch.float64, device)
    place = row.position[None].to(device)
    exact = loss_and_gradients(model, row, SegmentView(row, model.rotation(place)))
    model = placed(model, torch.bfloat16, torch.float32, device)
    return exact, loss_and_gradients(model, row, SegmentView(row, model.rotation(place))), model


@pytest.mark.parametrize("number", range(len(CASES)))
def test_cases_are_fit_for_bf16(number: int) -> None:
    """Also where no GPU computes them: the kernels' errors are measured by the modules' own."""
    exact, modules, _ = exactly_and_by_modules(CASES[number], row_of(CASES[number], number), number, "cpu")
    assert error(modules[1], exact[1]) < 0.12


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_loss_and_gradients_are_as_near_to_fp64_as_the_modules_come(
    number: int, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_adapter.model.fused import FusedView

    monkeypatch.setattr(tiles, "VISITS", 2)  # a preamble's gradient is summed in parts, as in long rows
    case, row = CASES[number], row_of(CASES[number], number)
    exact, modules, model = exactly_and_by_modules(case, row, number, "cuda")
    place = row.position[None].cuda()
    for laid_out in (False, True):  # False: as the shards of a base are gathered
        if laid_out:
            prepare(model)
        assert choose(model, "training").name == "fused"
        view = FusedView(model, row, model.rotation(place), recompute=recompute)
        full = view.all_queries.get(None)  # in a short window no key tile has several parts
        assert full is None or len(full.sum_tile)
        fused = loss_and_gradients(model, row, view)
        assert abs(fused[0] - exact[0]) / exact[0] < 2e-3
        # Two ways to round the same bf16 products: 0.8 to 1.25 times each other's error.
        assert error(modules[1], exact[1]) < 0.12
        assert error(fused[1], exact[1]) < 1.5 * error(modules[1], exact[1])


@pytest.mark.gpu
@pytest.mark.parametrize("part", [(0, None), (64, None), (0, 64)])
def test_a_product_in_fp8_is_near_the_exact_one(part: tuple[int, int | None]) -> None:
    """Three bits of mantissa in either factor: an error of some percent."""
    from lit_adapter.model.kernels.rows import quantise
    from lit_adapter.model.matrices import Float8Matrix

    generator = torch.Generator("cuda").manual_seed(0)
    weight, x, dy = (
        torch.randn(*shape, device="cuda", generator=generator).bfloat16()
        for shape in ((160, 96), (37, 96), (37, 160))
    )
    some = slice(*part)
    matrix = Float8Matrix.of(weight * 3).outputs(some)
    exact = x.double() @ (3 * weight.double())[some].T
    back = dy.double()[:, some] @ (3 * weight.double())[some]
    assert (matrix(quantise(x)) - exact).norm() / exact.norm() < 0.05
    assert (matrix.backward(quantise(dy[:, some])) - back).norm() / back.norm() < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("number", [0, *(n for n, case in enumerate(CASES) if "lora" in case)])
def test_fp8_is_near_bf16(number: int, recompute: bool) -> None:
    """Three bits of mantissa; the wiring is right if the gradients still point the same way."""
    from lit_adapter.model.fused import FusedView

    case, row = CASES[number], row_of(CASES[number], number)
    results = []
    for float8 in (False, True):
        model = placed(model_of(case, number), torch.bfloat16, torch.float32)
        prepare(model, float8=float8)
        assert choose(model, "training").name == "fused"
        rotation = model.rotation(row.position[None].cuda())
        results.append(loss_and_gradients(model, row, FusedView(model, row, rotation, recompute=recompute)))
    assert abs(results[1][0] - results[0][0]) / results[0][0] < 0.02
    assert error(results[1][1], results[0][1]) < 0.6


@pytest.mark.gpu
def test_a_row_without_targets_has_no_loss_and_no_gradient() -> None:
    from lit_adapter.model.fused import FusedView

    row = row_of(CASES[0], 0)
    row.target_index, row.target_id = row.target_index[:0], row.target_id[:0]
    model = placed(model_of(CASES[0], 0), torch.bfloat16, torch.float32)
    view = FusedView(model, row, model.rotation(row.position[None].cuda()))
    loss, gradients = loss_and_gradients(model, row, view)
    assert float(loss) == 0
    assert not any(bool(gradient.any()) for gradient in gradients.values())


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("number", [0, 5, 7, 11])
def test_with_dropout_blocks_learn_what_modules_learn_that_drop_the_same(
    number: int, recompute: bool
) -> None:
    from dropped import Dropped, dropping

    from lit_adapter.model.fused import FusedView

    case, row = CASES[number] | {"dropout": 0.3 * (number != 5)}, row_of(CASES[number], number)
    if "lora" in case:
        case |= {"lora": replace(case["lora"], dropout=0.2)}
    model = placed(model_of(case, number), torch.bfloat16, torch.float32)
    rotation = model.rotation(row.position[None].cuda())
    prepare(model)
    torch.manual_seed(number)
    view = FusedView(model, row, rotation, recompute=recompute)
    fused = loss_and_gradients(model, row, view)
    model = placed(model, torch.float64, torch.float64)
    with dropping(Dropped(model, row, view.seeds)):
        exact = loss_and_gradients(model, row, SegmentView(row, rotation))
    whole = loss_and_gradients(model.eval(), row, SegmentView(row, rotation))
    assert abs(fused[0] - exact[0]) / exact[0] < 2e-3
    assert error(fused[1], exact[1]) < 0.18
    assert abs(whole[0] - exact[0]) / exact[0] > 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["fp32", "long prompt"])
def test_what_the_kernels_do_not_compute_is_left_to_the_modules(what: str) -> None:
    config = AdapterConfig(prompt_length=65 if what == "long prompt" else 4)
    model = open_adapter(random_llama(0, head_dim=16), config)
    dtype = torch.float32 if what == "fp32" else torch.bfloat16
    executor = choose(placed(model, dtype, torch.float32), "training")
    assert executor.name == "modules"
    assert executor.why_not_fast
