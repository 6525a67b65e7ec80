from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from paper import paper
from prefix_formula import reference_logits
from tiny_models import from_transformers, logits, open_adapter, random_ids, random_llama, transformers_llama

from lit_adapter.errors import UserError
from lit_adapter.generation.adapter import attached
from lit_adapter.model.adapter import (
    adapter_parameters,
    adapter_shapes,
    adapter_state,
    attach,
    check_adapter_state,
    load_adapter_state,
)
from lit_adapter.model.config import LlamaConfig

FORMS = ["tanh", "identity", "layer", "channel", "token"]
QUERIES = ["rotated", "unrotated"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_closed_gates_are_the_base_bit_for_bit(form: Any, dtype: torch.dtype) -> None:
    ids, model = random_ids(2, 17), random_llama(4, dtype)
    with torch.no_grad():
        base = logits(model, ids)
        attach(model, paper(prompt_length=5, gate=form, prompt_init_std=1.0))
        adapted = logits(model, ids)
    assert torch.equal(base, adapted)
    assert adapted.dtype == dtype


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("form", FORMS)
def test_open_gates_follow_the_formula(form: Any, query: Any, heads: tuple[int, int]) -> None:
    model = random_llama(6, n_head=heads[0], n_kv_head=heads[1], head_dim=10).double()
    base_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = paper(prompt_length=3, layers=2, gate=form, prefix_query=query, prompt_init_std=1.0)
    open_adapter(model, adapter, seed=9)
    ids = random_ids(13, seed=2)
    with torch.no_grad():
        found = logits(model, ids[None])[0]
        base = reference_logits(model.config, base_state, {}, form, ids)
        wanted = reference_logits(model.config, base_state, adapter_state(model), form, ids, query)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert (wanted - base).abs().mean() > 0.05  # the gates are open


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "qkvo-bias"])
def test_formula_covers_biases(bias: bool) -> None:
    """A bias of o_proj is added once, to the sum of both branches."""
    model = random_llama(6, attention_bias=bias, mlp_bias=bias, tie_embeddings=bias).double()
    open_adapter(model, paper(prompt_length=4, prompt_init_std=1.0))
    ids = random_ids(9)
    with torch.no_grad():
        wanted = reference_logits(model.config, model.state_dict(), adapter_state(model), "tanh", ids)
        torch.testing.assert_close(logits(model, ids[None])[0], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_layer_gates_equal_peft(n_kv_head: int) -> None:
    theirs = transformers_llama(8, torch.float64, num_key_value_heads=n_kv_head)
    model = from_transformers(theirs)
    settings = peft.AdaptionPromptConfig(adapter_len=6, adapter_layers=2, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(theirs, settings).eval()
    torch.manual_seed(0)
    state = {}
    for index in (1, 2):
        attention = adapted.base_model.model.model.layers[index].self_attn
        attention.adaption_gate.data.normal_()
        state[f"layers.{index}.self_attn.prefix.prompt"] = attention.adaption_prompt.detach()[0]
        state[f"layers.{index}.self_attn.prefix.gate"] = attention.adaption_gate.detach()
    open_adapter(model, paper(prompt_length=6, layers=2, gate="layer"))
    ids = random_ids(2, 21)
    with torch.no_grad():
        load_adapter_state(model, state)
        wanted, found = adapted(input_ids=ids).logits, logits(model, ids)
    # PEFT's prefix softmax is in fp32 also in an fp64 model.
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_only_the_adapter_learns_and_lower_blocks_need_no_graph() -> None:
    model = random_llama(1, torch.float32, n_layer=4)
    attach(model, paper(layers=2))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in adapter_parameters(model)}
    assert learning == set(adapter_shapes(paper(layers=2), model.config))
    seen: dict[int, bool] = {}
    for index, block in enumerate(model.layers):
        block.register_forward_hook(lambda m, a, out, index=index: seen.update({index: out.requires_grad}))
    logits(model, random_ids(1, 6)).sum().backward()
    assert seen == {0: False, 1: False, 2: True, 3: True}
    assert all(p.grad is None for n, p in model.named_parameters() if n not in learning)


@pytest.mark.parametrize("form", FORMS)
def test_gates_open_first_and_then_every_tensor_learns(form: Any) -> None:
    model = random_llama(2, torch.float32)
    attach(model, paper(prompt_length=4, gate=form))
    start = adapter_state(model)
    optimizer = torch.optim.AdamW([p for _, p in adapter_parameters(model)], lr=1e-2, weight_decay=0.0)
    ids = random_ids(4, 12)
    for step in range(3):
        loss = torch.nn.functional.cross_entropy(
            logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moved = {name: not torch.equal(start[name], now) for name, now in adapter_state(model).items()}
        if step == 0:
            assert moved == {name: name.endswith(".gate") for name in start}
    assert all(moved.values())
    assert all((tensor != start[name]).any(-1).all() for name, tensor in adapter_state(model).items())


def test_adapter_stays_fp32_on_a_bf16_base() -> None:
    model = random_llama(3, torch.bfloat16)
    attach(model, paper(prompt_length=3, gate="identity"))
    assert {p.dtype for _, p in adapter_parameters(model)} == {torch.float32}
    gate = model.layers[-1].self_attn.prefix.gate
    with torch.no_grad():
        gate.fill_(0.5)
    optimizer = torch.optim.SGD([gate], lr=1.0)
    logits(model, random_ids(1, 8)).float().sum().backward()
    assert gate.grad.dtype == torch.float32
    gate.grad.fill_(-0.001)
    optimizer.step()
    assert gate.tolist() == pytest.approx([0.501] * 4, abs=1e-6)


def test_bf16_prefix_is_near_the_formula() -> None:
    model = random_llama(3, torch.bfloat16)
    open_adapter(model, paper(prompt_length=5, prompt_init_std=1.0))
    ids = random_ids(15)
    with torch.no_grad():
        wide = {name: tensor.double() for name, tensor in model.state_dict().items()}
        wanted = reference_logits(model.config, wide, adapter_state(model), "tanh", ids)
        found = logits(model, ids[None])[0].double()
    assert (found - wanted).norm() / wanted.norm() < 0.04


def test_dropout_acts_while_training_only() -> None:
    model = random_llama(2)
    open_adapter(model, paper(prompt_length=8, dropout=0.5, prompt_init_std=1.0))
    ids = random_ids(1, 10)
    without = random_llama(2)
    open_adapter(without, paper(prompt_length=8, prompt_init_std=1.0))
    with torch.no_grad():
        assert torch.equal(logits(model.eval(), ids), logits(without.train(), ids))
        first, second = logits(model.train(), ids), logits(model, ids)
    assert not torch.equal(first, second)


def test_prompts_come_from_the_seed() -> None:
    models = [random_llama(n_layer=2, n_embd=400, n_head=4) for _ in range(3)]
    for model, seed in zip(models, (7, 7, 8), strict=True):
        attach(model, paper(prompt_length=50, prompt_init_std=0.3), seed)
    one, same, other = (adapter_state(model) for model in models)
    assert all(torch.equal(one[name], same[name]) for name in one)
    name = "layers.0.self_attn.prefix.prompt"
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one["layers.1.self_attn.prefix.prompt"])
    assert one[name].std().item() == pytest.approx(0.3, rel=0.05)
    assert one[name].mean().abs() < 0.3 / math.sqrt(20_000) * 5


def test_attach_refuses_more_layers_than_there_are() -> None:
    with pytest.raises(UserError, match=r"adapter\.layers is 4; the base has 3 layers"):
        attach(random_llama(), paper(layers=4))


PROMPT, GATE = "layers.2.self_attn.prefix.prompt", "layers.2.self_attn.prefix.gate"
DAMAGES = {
    "missing": (lambda s: s.pop(GATE), rf"x.bin: .* do not fit this model: 1 missing \({GATE}\)"),
    "extra": (lambda s: s.update(wte=torch.zeros(1)), r"1 unexpected \(wte\)"),
    "shape": (
        lambda s: s.update({PROMPT: s[PROMPT][1:]}),
        rf"{PROMPT} has shape \[9, 32\]; expected \[10, 32\]",
    ),
    "broadcastable": (lambda s: s.update({GATE: s[GATE][:1]}), rf"{GATE} has shape \[1\]; expected \[4\]"),
    "nan": (lambda s: s[GATE].__setitem__(1, math.nan), f"{GATE} holds values that are not finite"),
    "infinite": (lambda s: s[PROMPT].__setitem__((3, 1), math.inf), f"{PROMPT} holds values that are not"),
    "integers": (lambda s: s.update({GATE: torch.ones(4, dtype=torch.long)}), f"{GATE} holds values"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(damage: Any, message: str) -> None:
    model = random_llama(1, torch.float32)
    attach(model, paper(layers=1))
    before, state = adapter_state(model), adapter_state(model)
    state[PROMPT] += 1
    damage(state)
    with pytest.raises(UserError, match=message):
        load_adapter_state(model, state, "x.bin")
    assert all(torch.equal(before[name], now) for name, now in adapter_state(model).items())


def test_many_wrong_names_are_shortened() -> None:
    shapes = adapter_shapes(paper(), random_llama().config)
    with pytest.raises(UserError, match=r"6 missing \(\S+, \S+, \.\.\.\)$"):
        check_adapter_state(shapes, {}, "a")


def test_state_survives_a_round_trip() -> None:
    one, other = random_llama(1, torch.bfloat16), random_llama(1, torch.bfloat16)
    open_adapter(one, paper(), seed=3)
    attach(other, paper(), seed=4)
    load_adapter_state(other, adapter_state(one))
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert torch.equal(logits(one, ids), logits(other, ids))


def test_a_7b_adapter_has_the_papers_count() -> None:
    """1,229,760 numbers for LLaMA 7B with K 10 and L 30: 30 (10 * 4096 + 32); the paper rounds to 1.2 M."""
    llama_7b = LlamaConfig(
        vocab_size=32000, n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, head_dim=128, n_hidden=11008
    )
    shapes = adapter_shapes(paper(prompt_length=10, layers=30), llama_7b)
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_229_760


@pytest.mark.parametrize("gate", FORMS)
def test_strengths_of_many_layers_and_the_gradient_of_a_gate(gate: Any) -> None:
    """As the CUDA path asks for them: all layers' at once, and the gate's own gradient from that of c(g)."""
    model = open_adapter(random_llama(0), paper(layers=3, prompt_length=2, gate=gate))
    prefixes = [block.self_attn.prefix for block in model.layers]
    form, axes = prefixes[0].form, prefixes[0].axes
    together = form.strength(torch.stack([prefix.gate for prefix in prefixes]), axes)
    torch.testing.assert_close(together, torch.stack([prefix.strength() for prefix in prefixes]))
    for prefix in prefixes:
        strength = prefix.strength()
        whole = strength.expand(model.config.n_head, axes[1], model.config.head_dim)
        dwhole = torch.randn(whole.shape, dtype=whole.dtype)
        (wanted,) = torch.autograd.grad(whole, prefix.gate, dwhole)
        with torch.no_grad():
            torch.testing.assert_close(form.gradient(strength, dwhole), wanted)


def test_what_is_registered_on_an_adapter_s_modules_is_not_on_its_base() -> None:
    base, config = random_llama().requires_grad_(False), paper(layers=1, prompt_length=2)
    model = attached(base, config, adapter_state(open_adapter(random_llama(), config)), "test")
    assert model.layers[0].mlp.gate_proj.weight is base.layers[0].mlp.gate_proj.weight
    seen: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model.train()
    assert not any(module.training for module in base.eval().modules())
    assert model.layers[0].mlp.gate_proj.training
    logits(base, random_ids(1, 3))
    assert seen == []
