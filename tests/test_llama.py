from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from tiny_models import from_transformers, random_ids, random_llama, transformers_llama

from lit_adapter.errors import UserError
from lit_adapter.model.attention import CausalView
from lit_adapter.model.config import LlamaConfig, differences
from lit_adapter.model.llama import Llama, RMSNorm
from lit_adapter.model.rope import rotate
from lit_adapter.model.rope_config import RopeConfig

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "wide-heads": {"head_dim": 16},
    "narrow-heads": {"head_dim": 6, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 30},
    "linear-rope": {"rope_parameters": LINEAR},
    "llama3-rope": {"rope_parameters": LLAMA3, "head_dim": 32},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "tied": {"tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
    "all-of-it": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "head_dim": 12,
        "rms_norm_eps": 0.01,
        "rope_parameters": LLAMA3,
    },
    "one-layer": {"num_hidden_layers": 1},
}


def logits(model: Llama, ids: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    position = torch.arange(ids.shape[1]).expand_as(ids)
    return model.logits(model(ids, CausalView(model.rotation(position)), rows))


def test_gradients_of_norm_and_rotation_are_those_of_finite_differences() -> None:
    """With gradients of the norm's weight, which V2 learns, and heads that lie apart in memory."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()
        for shape in ((2, 3, 5), (5,))
    )
    norm = RMSNorm(5, eps=0.1)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,)), (x, weight)
    )
    heads = torch.randn(2, 3, 4, 6, generator=draw, dtype=torch.float64).transpose(1, 2).requires_grad_()
    angle = torch.randn(2, 3, 3, generator=draw, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda y: rotate(y, angle.cos(), angle.sin()), (heads,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES.keys())
def test_logits_equal_transformers(sizes: dict[str, Any], dtype: torch.dtype) -> None:
    theirs = transformers_llama(3, dtype, **sizes)
    ids = random_ids(2, 90)
    with torch.no_grad():
        wanted = theirs(ids).logits
        found = logits(from_transformers(theirs, dtype), ids)
    assert wanted.std() > 0.3  # the comparison sees something
    # Both keep frequencies in fp32, where llama3's blend rounds by the order of its operations.
    exact = 5e-6 if sizes.get("rope_parameters") is LLAMA3 else 1e-9
    tolerance = exact if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_bf16_stays_near_fp32() -> None:
    """Norms, rotations and softmax are wide inside: bf16 logits are off by bf16's own rounding only."""
    narrow, exact = random_llama(5, torch.bfloat16), random_llama(5, torch.float32)
    exact.load_state_dict(narrow.state_dict())
    ids = random_ids(1, 200)
    with torch.no_grad():
        a, b = logits(exact, ids), logits(narrow, ids)
    assert b.dtype == torch.bfloat16
    assert narrow.inverse_frequency.dtype == torch.float32
    assert (a - b.float()).norm() / a.norm() < 0.03


def test_wanted_rows_equal_the_rows_of_all() -> None:
    model, ids = random_llama(1), random_ids(2, 12)
    rows = torch.tensor([0, 3, 3, 11])
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids, rows), logits(model, ids)[:, rows], rtol=0, atol=1e-12)


def test_causal_view_hides_the_future() -> None:
    model, ids = random_llama(2), random_ids(1, 10)
    changed = ids.clone()
    changed[0, 6:] = (changed[0, 6:] + 1) % 61
    with torch.no_grad():
        a, b = logits(model, ids), logits(model, changed)
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=0, atol=1e-12)
    assert (a[:, 6:] - b[:, 6:]).abs().amin(-1).gt(0).all()


ROPES = [
    RopeConfig(),
    RopeConfig(500_000.0),
    RopeConfig(10_000.0, "linear", 4.0),
    RopeConfig(500_000.0, "llama3", 32.0, 1.5, 5.0, 4096),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: f"{rope.kind}-{rope.theta:g}")
def test_configuration_survives_both_round_trips(rope: RopeConfig) -> None:
    config = LlamaConfig(
        101, 5, 6, 3, 36, 10, 50, 1e-6, 4096, rope, tie_embeddings=True, attention_bias=True, mlp_bias=True
    )
    assert LlamaConfig.from_hf(config.to_hf()) == config
    through = transformers.LlamaConfig(**config.to_hf()).to_dict()
    assert LlamaConfig.from_hf(through) == config


def older_spelling(raw: dict[str, Any], key: str) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, as transformers 4 wrote them."""
    raw = dict(raw)
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    return raw


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: f"{rope.kind}-{rope.theta:g}")
def test_both_spellings_of_rope_say_the_same(rope: RopeConfig, key: str) -> None:
    config = LlamaConfig(101, 5, 6, 3, 36, 10, 50, rope=rope)
    assert LlamaConfig.from_hf(older_spelling(config.to_hf(), key)) == config


def test_absent_keys_take_their_defaults() -> None:
    raw = LlamaConfig(101, 5, 4, 4, 32, 8, 50).to_hf()
    for key in ("head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings", "num_key_value_heads"):
        del raw[key]
    del raw["rope_parameters"]
    assert LlamaConfig.from_hf(raw) == LlamaConfig(101, 5, 4, 4, 32, 8, 50)


def test_from_meta_knows_the_published_models() -> None:
    small = {"dim": 4096, "n_layers": 32, "n_heads": 32, "norm_eps": 1e-6}
    first = LlamaConfig.from_meta(small, vocab_size=32_000, n_hidden=11_008)
    assert first == LlamaConfig(32_000, 32, 32, 32, 4096, 128, 11_008, 1e-6, 2048)
    large = {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-5}
    large |= {"rope_theta": 500_000.0, "use_scaled_rope": True}
    third = LlamaConfig.from_meta(large, vocab_size=128_256, n_hidden=8192)
    # Meta's own defaults for the flag: factor 8, 1, 4, 8192 (Llama 3.1).
    assert third.rope == RopeConfig(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert (third.n_kv_head, third.head_dim, third.context_length) == (8, 64, 131_072)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 0}, "meta: there are 0 attention heads; expected 1 or more"),
        ({"n_heads": "4"}, "meta: a value has the wrong type"),
        ({"dim": 30}, "meta: dim 30 is not a multiple of the 4 attention heads"),
        ({"norm_eps": "x"}, "meta: a value has the wrong type"),
        ({"n_kv_heads": 0}, "meta: model config: n_kv_head is 0"),
        ({"use_scaled_rope": True, "rope_scaling_factor": -8}, "meta: model config: rope factor is -8"),
    ],
)
def test_meta_s_sizes_that_no_llama_has_are_refused(change: dict[str, Any], message: str) -> None:
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "max_seq_len": None} | change
    with pytest.raises(UserError, match=message):
        LlamaConfig.from_meta(params, vocab_size=101, n_hidden=50, source="meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "cfg: model_type is 'mamba'; expected llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; a llama model uses 'silu'"),
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"head_dim": 7}, "head_dim is 7; rotary positions need an even number"),
        ({"head_dim": None, "hidden_size": 34}, "hidden_size 34 is not a multiple"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope' is not known"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "four"}}, "rope factor is 'four'; expected a"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "key 'factor' is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; here rotary positions turn whole"),
        ({"rope_parameters": {"rope_type": "linear"}}, "key 'factor' is missing"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.0}},
            "rope factor is 0.0; expected a number above 0",
        ),
        ({"head_dim": None, "num_attention_heads": 0}, "cfg: there are 0 attention heads"),
        ({"head_dim": None, "num_attention_heads": "4"}, "cfg: a value has the wrong type"),
        ({"num_key_value_heads": 0}, "n_kv_head is 0"),
        ({"rms_norm_eps": -1e-5}, "norm_eps is -1e-05; expected a number between 0 and 1"),
        ({"rms_norm_eps": float("nan")}, "norm_eps is nan"),
        ({"rope_theta": float("inf"), "rope_parameters": None}, "rope theta is inf"),
        ({"rope_theta": 0, "rope_parameters": None}, "rope theta is 0.0"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "expected less than high_freq_factor 4.0"),
        (
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 0}},
            "original_context_length is 0",
        ),
        ({"num_hidden_layers": 0}, "n_layer is 0; expected a whole number above 0"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
    ],
)
def test_what_is_no_llama_is_refused(change: dict[str, Any], message: str) -> None:
    raw = LlamaConfig(101, 5, 4, 2, 32, 8, 50).to_hf() | change
    with pytest.raises(UserError, match=message):
        LlamaConfig.from_hf(raw, source="cfg")


def test_differences_name_both_values() -> None:
    one = LlamaConfig(101, 5, 4, 2, 32, 8, 50)
    assert differences(one, one) == []
    assert differences(one, dataclasses.replace(one, n_layer=6)) == ["n_layer 5 and 6"]
