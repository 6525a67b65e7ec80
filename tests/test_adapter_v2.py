"""Norms, alone or beside a prefix, and adapter V2, which adds a bias and scale on every linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finetune_runs import Stopper
from generation_fixtures import CHOICES, decode, script
from paper import paper
from prefix_formula import reference_logits
from random_records import encoded
from tiny_models import halved, logits, open_adapter, random_ids, random_llama

import lit_adapter
from lit_adapter.config import Config, OptimConfig
from lit_adapter.data.packing import Packer, shared_preambles
from lit_adapter.errors import UserError
from lit_adapter.generation.settings import Sampling
from lit_adapter.model import loss
from lit_adapter.model.adapter import (
    adapter_parameters,
    adapter_shapes,
    adapter_state,
    attach,
    parameter_counts,
    plain_base,
)
from lit_adapter.model.affine import join_affine
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.layout import block_layout
from lit_adapter.model.llama import Llama
from lit_adapter.model.matrices import side_by_side
from lit_adapter.training.finetune import finetune
from lit_adapter.training.module import LitAdapter
from lit_adapter.weights.adapter_file import read_adapter

WHOLE = paper(version="v2", prompt_length=3, layers=2, head=True, prompt_init_std=1.0)
BARE = paper(version="v2", prompt_length=0)
NORMS = paper(norms=True, prompt_length=3, layers=2, prompt_init_std=1.0)
ALONE = paper(norms=True, prompt_length=0)
ALL = {"whole": WHOLE, "bare": BARE, "norms": NORMS, "norms alone": ALONE}
BIASED = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())
def test_an_untrained_adapter_is_the_base_bit_for_bit(config: AdapterConfig, dtype: torch.dtype) -> None:
    ids, model = random_ids(2, 17), random_llama(4, dtype, **BIASED)
    with torch.no_grad():
        base = logits(model, ids)
        attach(model, config)
        adapted = logits(model, ids)
    assert torch.equal(base, adapted)
    assert adapted.dtype == dtype
    assert {parameter.dtype for _, parameter in adapter_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize("sizes", [{}, BIASED, {"n_kv_head": 4}, {"tie_embeddings": True}], ids=str)
def test_a_trained_one_follows_the_formula(config: AdapterConfig, sizes: dict[str, Any]) -> None:
    model = open_adapter(random_llama(6, **sizes).double(), config, seed=9)
    ids = random_ids(13, seed=2)
    with torch.no_grad():
        found = logits(model, ids[None])[0]
        wanted = reference_logits(model.config, model.state_dict(), adapter_state(model), "tanh", ids)
        base = reference_logits(model.config, model.state_dict(), {}, "tanh", ids)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert (wanted - base).abs().mean() > 0.05


def test_the_base_stays_what_it_was_and_comes_back_inside_the_block() -> None:
    model, ids = random_llama(6, torch.float32, tie_embeddings=True), random_ids(2, 9)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        base = logits(model, ids)
        open_adapter(model, WHOLE)
        adapted = logits(model, ids)
        with plain_base(model):
            assert torch.equal(logits(model, ids), base)
        assert torch.equal(logits(model, ids), adapted)
    assert not torch.equal(adapted, base)
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
    assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize("sizes", [{}, BIASED, {"n_kv_head": 1, "head_dim": 6}], ids=str)
@pytest.mark.parametrize("config", [*ALL.values(), paper(version="v2")], ids=[*ALL, "headless"])
def test_names_and_shapes_are_those_of_the_module(config: AdapterConfig, sizes: dict[str, Any]) -> None:
    model = random_llama(1, **sizes)
    attach(model, config)
    found = {name: tuple(parameter.shape) for name, parameter in adapter_parameters(model)}
    assert found == adapter_shapes(config, model.config)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == found.keys()


def test_a_7b_adapter_has_the_published_count() -> None:
    """4,279,744 with K 10, L 30 and the head (lit-llama's Adapter V2)."""
    sizes = LlamaConfig(
        vocab_size=32000, n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, head_dim=128, n_hidden=11008
    )
    with torch.device("meta"):
        model = Llama(sizes).requires_grad_(False)
    config = paper(version="v2", prompt_length=10, layers=30, head=True)
    attach(model, config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4_279_744
    assert sum(math.prod(shape) for shape in adapter_shapes(config, sizes).values()) == 4_279_744
    assert parameter_counts(config, sizes) == (
        "prompts 1,228,800 and gates 960, K 10, L 30 of 32; "
        "norms 266,240; biases 1,391,872 and scales 1,391,872, with the output layer's"
    )


@pytest.mark.parametrize("rows", [1, 3, 100], ids=lambda rows: f"chunk-{rows}")
def test_the_loss_through_an_adapted_head_has_exact_gradients(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the head's bias and scale, and of the final norm below it; in fp64, against plain autograd."""
    V, C, M = 23, 8, 7
    monkeypatch.setattr(loss, "CHUNK_LOGITS", rows * V + 1)
    draw = torch.Generator().manual_seed(rows)
    hidden, weight, norm, bias, scale = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((M, C), (V, C), (C,), (V,), (V,))
    )
    leaves = [x.requires_grad_() for x in (hidden, norm, bias, scale)]
    target = torch.randint(0, V, (M,), generator=draw)
    found = loss.target_loss(F.rms_norm(hidden, (C,), norm), weight, target, bias, scale)
    plain = scale * (F.rms_norm(hidden, (C,), norm) @ weight.T + bias)
    wanted = F.cross_entropy(plain, target, reduction="sum")
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x * 0.37, leaves) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())
def test_packed_rows_give_the_gradients_of_single_records(config: AdapterConfig) -> None:
    model, data = open_adapter(random_llama(5), config, seed=1), encoded(4, 9)
    packer = Packer(data, shared_preambles(data), mask_prompt=True, row_tokens=500)
    names, parameters = zip(*adapter_parameters(model), strict=True)
    packed = torch.autograd.grad(loss.row_loss(model, packer.row(list(range(9)))), parameters)
    total = torch.zeros((), dtype=torch.float64)
    for index in range(9):
        ids = torch.from_numpy(data.record(index)).long()
        n_prompt = int(data.n_prompt[index])
        rows = logits(model, ids[None])[0, n_prompt - 1 : -1]
        total = total + F.cross_entropy(rows, ids[n_prompt:], reduction="sum")
    for name, a, b in zip(names, packed, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_a_row_without_targets_reaches_every_parameter() -> None:
    """A process whose share has no target must still take part in DDP's exchange."""
    model, data = open_adapter(random_llama(5), BARE), encoded(4, 3)
    row = Packer(data, shared_preambles(data), mask_prompt=True, row_tokens=500).row([0, 1])
    row.target_index, row.target_id = row.target_index[:0], row.target_id[:0]
    loss.row_loss(model, row).backward()
    assert all(p.grad is not None and not p.grad.any() for _, p in adapter_parameters(model))


@pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())
def test_every_tensor_learns_and_no_block_is_without_gradient(config: AdapterConfig) -> None:
    model = random_llama(2, torch.float32)
    attach(model, config)
    start = adapter_state(model)
    optimizer = LitAdapter(model, OptimConfig(lr=1e-2), 10).configure_optimizers()
    ids = random_ids(4, 12)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    still = [name for name, now in adapter_state(model).items() if torch.equal(start[name], now)]
    # A key's bias changes no softmax as long as its rotation is the query's own: it may stand nearly still.
    assert still == []


def test_biases_scales_and_norms_have_a_rate_of_their_own_and_do_not_decay() -> None:
    model = random_llama(2, torch.float32)
    attach(model, WHOLE)
    optimizer = LitAdapter(model, OptimConfig(lr=1e-2, weight_decay=0.5), 10).configure_optimizers()
    first, second = optimizer.param_groups
    assert (first["lr_scale"], first["weight_decay"]) == (1.0, 0.5)
    assert (second["lr_scale"], second["weight_decay"]) == (0.1, 0.0)
    assert [len(group["params"]) for group in (first, second)] == [4, 7 + 3 * 7 * 2 + 2]
    assert {p.ndim for p in second["params"]} == {1}


@pytest.mark.parametrize(("v2", "share"), [(False, 0.3), (True, 0.2)], ids=["norms", "v2"])
def test_norms_have_a_rate_of_their_own_and_do_not_decay(v2: bool, share: float) -> None:
    """In V2 they have the rate of biases and scales."""
    model = random_llama(2, torch.float32)
    attach(model, paper(version="v2" if v2 else "v1", norms=True, prompt_length=3, layers=2))
    config = OptimConfig(lr=1e-2, weight_decay=0.5, lr_scale_norms=0.3, lr_scale_v2=0.2)
    optimizer = LitAdapter(model, config, 10).configure_optimizers()
    first, second = optimizer.param_groups
    assert (first["lr_scale"], first["weight_decay"]) == (1.0, 0.5)
    assert (second["lr_scale"], second["weight_decay"]) == (share, 0.0)
    assert [len(group["params"]) for group in (first, second)] == [4, 7 + 3 * 7 * 2 if v2 else 5]


def test_cached_decoding_equals_full_passes() -> None:
    model = open_adapter(random_llama(7, torch.float32), WHOLE)
    prompt = random_ids(9, seed=5).tolist()
    new = [
        token
        for _, token in decode(model, [prompt], Sampling(max_new_tokens=6), frozenset())
        if token is not None
    ]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
    assert new == ids[len(prompt) :]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompt_length": 0},
            r"length is 0; expected 1 or more \(0 is for adapter\.version v2, norms or lora\)",
        ),
        ({"head": True}, r"adapter\.head is true; it needs adapter\.version v2"),
        (
            {"version": "v2", "prompt_length": 0, "layers": 2},
            r"adapter\.layers is 2, but with adapter\.prompt_",
        ),
        ({"version": "v3"}, r"adapter\.version is 'v3'; expected v1 or v2"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        paper(**settings)


V2 = ("--adapter.version", "v2")
NORMED = ("--adapter.norms", "true")
FORM = ("--adapter.gate", "token", "--adapter.prefix_query", "unrotated")
KINDS = {
    "whole": [*V2, "--adapter.head", "true"],
    "bare": [*V2, "--adapter.prompt_length", "0"],
    "norms": [*NORMED, *FORM],
    "norms alone": [*NORMED, "--adapter.prompt_length", "0"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["norms", "whole", "bare", "norms alone"])
def test_a_run_learns_resumes_to_the_byte_and_answers(
    tiny: Callable[..., Config], tiny_base: Path, kind: str
) -> None:
    options = ["--adapter.layers", "3" if kind in ("whole", "norms") else "null"]
    options += KINDS[kind]
    lines = Stopper()
    assert finetune(tiny(*options, out="whole"), say=lines) == 0
    norms = 336 if kind == "norms" else 432  # seven of the nine: none below the lowest prefix
    assert any(f"norms {norms}" in line for line in lines.lines)
    assert any("; biases " in line and "scales " in line for line in lines.lines) == (V2[0] in options)
    path = Path(tiny(*options, out="whole").out) / "adapter.safetensors"
    assert finetune(tiny(*options, out="cut"), say=Stopper("step 6/")) == 143
    assert finetune(tiny(*options, out="cut"), resume="last", say=Stopper()) == 0
    assert (Path(tiny(*options, out="cut").out) / "adapter.safetensors").read_bytes() == path.read_bytes()
    info, state = read_adapter(path)
    assert ("norms" in info.adapter.parts, info.adapter.version) == (True, "v2" if V2[0] in options else "v1")
    assert all(bool(tensor.any()) for name, tensor in state.items() if name.endswith("adapter_bias"))
    model = lit_adapter.load(adapter=path, base=tiny_base, device="cpu", dtype="float32")
    ids = random_ids(1, 12)
    base = model.base.logits(ids)
    plain = lit_adapter.load(base=tiny_base, device="cpu", dtype="float32")
    assert torch.equal(base, plain.logits(ids))
    assert not torch.equal(base, model.logits(ids))
    shown = script("--adapter", path, "--base", tiny_base, "--prompt", "Say it back.", "--compare", *CHOICES)
    assert "--- plain base ---" in shown


def test_v2_has_a_default_rate_of_its_own(tiny: Callable[..., Config]) -> None:
    lines = Stopper()
    finetune(tiny(*V2, "--optim.lr", "null", "--optim.max_steps", "1"), say=lines)
    assert any("; lr 0.01 " in line for line in lines.lines)


@pytest.mark.parametrize("half", [None, 0, 1])
def test_joined_biases_and_scales_and_their_gradients_are_those_of_the_layers(half: int | None) -> None:
    """The arithmetic of the CUDA executors, whose own tests need a GPU; also where two share the heads."""
    model = halved(open_adapter(random_llama(5, attention_bias=True), paper(version="v2"), seed=1), half)
    layout = block_layout(model.config.shard(model.n_shards))
    for block in model.layers:
        joined = join_affine(block, layout)
        assert joined.keys() == layout.groups.keys()
        for group, affine in joined.items():
            first = affine.modules[0].outputs.start or 0
            with torch.no_grad():
                affine.modules[0].adapter_scale[first] = 0
            x = torch.randn(7, layout[layout.groups[group][0]].n_in, dtype=torch.float64, requires_grad=True)
            wanted = torch.cat([module(x) for module in affine.modules], dim=1)
            matrix = affine.applied(side_by_side(*affine.modules))
            with torch.no_grad():
                y, total = matrix(x), torch.ones_like(wanted)
                matrix.add_to(total, x)
                torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(total, y + 1, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(matrix.outputs(slice(3, 9))(x), y[:, 3:9], rtol=1e-12, atol=1e-12)
            dy = torch.randn_like(y)
            found = affine.gradients((dy * y).sum(0), dy.sum(0))
            *exact, dx = torch.autograd.grad(wanted, [*affine.parameters, x], dy)
            assert found[1][first] == 0  # an output of 0 does not tell what it was scaled from
            exact[1][first] = 0
            for a, b in zip(found, exact, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=group)
            torch.testing.assert_close(matrix.backward(dy), dx, rtol=1e-9, atol=1e-9)
