"""lit-llama's and litgpt's adapters, V1 and V2: two spellings of one layout.

A layer's query, key and value projections are one linear there, with all queries first, then keys, then
values. lit-llama rotates neighbours as Meta does, so the query and key rows of V2's biases and scales are
reordered; prompts and gates are not. Before 0.5.5, litgpt laid the rows group by group instead: a group's
queries, its key, its value. All train V2's output head always.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.gates import GateName
from lit_adapter.model.layout import block_layout
from lit_adapter.weights.plain import LAYER, PlainAdapter, State, prefix, take, top_layers
from lit_adapter.weights.source import half_split_rows, neighbour_rows

Shape = tuple[int, ...]
QUERY, KEY, VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
KINDS = ("bias", "scale")


@dataclass(frozen=True)
class Dialect:
    """How one of the two spells it."""

    name: str
    fused: str
    """The joint projection of queries, keys and values."""
    linears: Mapping[str, str]
    """The other linear layers, from our names."""
    norms: Mapping[str, str]
    final_norm: str
    gate_shape: Callable[[int], Shape]
    """From the number of heads."""
    meta_rows: bool
    """Whether query and key rows are in Meta's order."""
    grouped: bool
    """Whether it has models with fewer key and value heads than query heads, and with biases."""
    by_group: bool = False
    """Whether the joint projection's rows lie group by group."""


LIT_LLAMA = Dialect(
    name="lit-llama",
    fused="attn.c_attn",
    linears={
        "self_attn.o_proj": "attn.c_proj",
        "mlp.gate_proj": "mlp.c_fc1",
        "mlp.up_proj": "mlp.c_fc2",
        "mlp.down_proj": "mlp.c_proj",
    },
    norms={"input_layernorm": "rms_1.scale", "post_attention_layernorm": "rms_2.scale"},
    final_norm="transformer.ln_f.scale",
    gate_shape=lambda n_head: (1, n_head, 1, 1),
    meta_rows=True,
    grouped=False,
)
LITGPT = Dialect(
    name="litgpt",
    fused="attn.qkv",
    linears={
        "self_attn.o_proj": "attn.proj",
        "mlp.gate_proj": "mlp.fc_1",
        "mlp.up_proj": "mlp.fc_2",
        "mlp.down_proj": "mlp.proj",
    },
    norms={"input_layernorm": "norm_1.weight", "post_attention_layernorm": "norm_2.weight"},
    final_norm="transformer.ln_f.weight",
    gate_shape=lambda n_head: (1, 1, n_head, 1),
    meta_rows=False,
    grouped=True,
)
LITGPT_BEFORE_055 = replace(LITGPT, fused="attn.attn", by_group=True)
"""Read only: later litgpt cannot read such a V2 file itself."""
WRONG_ROWS = (
    "litgpt 0.5.5 and later project the prefix through wrong rows of the joint query, key and value layer: "
    "wherever gates are open, its own logits differ from this formula, which is lit-llama's"
)


def read(tensors: State, model: LlamaConfig, dialect: Dialect, source: str) -> PlainAdapter:
    """Return the adapter that a file of the dialect holds.

    Raises:
        UserError: tensors that are missing, unknown, or not of this base's sizes.
    """
    left = dict(tensors)
    layers = sorted(int(m[1]) for m in map(_PROMPT.fullmatch, tensors) if m)
    n_prompts = top_layers(layers, model.n_layer, source)
    length, gate = 0, "identity"
    state: State = {}
    for layer in layers:
        stem = f"transformer.h.{layer}.attn"
        name = f"{stem}.adapter_wte.weight"
        if left[name].ndim != 2:
            raise UserError(
                f"{source}: {name} has shape {list(left[name].shape)}; expected K x {model.n_embd}"
            )
        length = length or len(left[name])
        state[f"{prefix(layer)}.prompt"] = take(left, name, (length, model.n_embd), source)
        name = f"{stem}.gating_factor"
        single = name in left and left[name].numel() == 1 and model.n_head > 1
        gate = "layer" if single else gate
        state[f"{prefix(layer)}.gate"] = take(left, name, (1 if single else model.n_head,), source)
    notes = ["gates: one a layer, as lit-llama had them at first"] if gate == "layer" else []
    version, head = "v1", False
    if any(name.endswith(".adapter_scale") for name in left):
        version = "v2"
        state |= _read_v2(left, model, dialect, source)
        head = _is_trained(state)
        if not head:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("lm_head.")}
            notes.append("output head: bias 0 and scale 1 throughout, so left out")
    if left:
        raise UserError(f"{source}: tensor {min(left)} is not one of an adapter of {dialect.name}")
    config = AdapterConfig(
        version="v2" if version == "v2" else "v1",
        prompt_length=length,
        layers=n_prompts or None,
        gate=_form(gate),
        head=head,
    )
    return PlainAdapter(config, state, notes)


_PROMPT = re.compile(rf"transformer\.h\.{LAYER}\.attn\.adapter_wte\.weight")


def _form(gate: str) -> GateName:
    return "layer" if gate == "layer" else "identity"


def _is_trained(state: State) -> bool:
    return bool(state["lm_head.adapter_bias"].any() or (state["lm_head.adapter_scale"] != 1).any())


def _read_v2(left: State, model: LlamaConfig, dialect: Dialect, source: str) -> State:
    widths, state = _widths(model), {}
    joint = [widths[name] for name in (QUERY, KEY, VALUE)]
    for layer in range(model.n_layer):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        for norm, name in dialect.norms.items():
            state[f"{ours}.{norm}.adapter_weight"] = take(left, f"{theirs}.{name}", (model.n_embd,), source)
        for kind in KINDS:
            for linear, name in dialect.linears.items():
                tensor = take(left, f"{theirs}.{name}.adapter_{kind}", (widths[linear],), source)
                state[f"{ours}.{linear}.adapter_{kind}"] = tensor
            fused = take(left, f"{theirs}.{dialect.fused}.adapter_{kind}", (sum(joint),), source)
            parts = _reordered(_split(fused, model, dialect), model, dialect, half_split_rows)
            for linear, part in zip((QUERY, KEY, VALUE), parts, strict=True):
                state[f"{ours}.{linear}.adapter_{kind}"] = part.clone()
    state["norm.adapter_weight"] = take(left, dialect.final_norm, (model.n_embd,), source)
    for kind in KINDS:
        state[f"lm_head.adapter_{kind}"] = take(left, f"lm_head.adapter_{kind}", (model.vocab_size,), source)
    return state


def _widths(model: LlamaConfig) -> dict[str, int]:
    return {linear.name: linear.n_out for linear in block_layout(model).linears}


def _split(fused: Tensor, model: LlamaConfig, dialect: Dialect) -> list[Tensor]:
    """Return query, key and value rows of the joint projection's."""
    widths = _widths(model)
    if not dialect.by_group:
        return list(fused.split([widths[name] for name in (QUERY, KEY, VALUE)]))
    G, D = model.n_kv_head, model.head_dim
    groups = fused.view(G, -1, D).split([model.n_head // G, 1, 1], dim=1)
    return [part.flatten() for part in groups]


def _reordered(
    parts: list[Tensor],
    model: LlamaConfig,
    dialect: Dialect,
    rows: Callable[[Tensor, int], Tensor],
) -> list[Tensor]:
    """Return query, key and value rows, the first two reordered where the dialect has Meta's order."""
    query, key, value = parts
    if not dialect.meta_rows:
        return [query, key, value]
    return [rows(query, model.n_head), rows(key, model.n_kv_head), value]


def check_writable(model: LlamaConfig, dialect: Dialect) -> None:
    """Refuse a base that the code base has no model for.

    Raises:
        UserError: it has grouped queries or biases, and lit-llama is asked for.
    """
    odd = model.n_kv_head != model.n_head or model.attention_bias or model.mlp_bias
    if odd and not dialect.grouped:
        raise UserError(
            f"{dialect.name} has no model with grouped queries or biases, and the base has them; "
            "write litgpt or peft instead"
        )


def write(adapter: PlainAdapter, model: LlamaConfig, dialect: Dialect) -> State:
    """Return the dialect's tensors of an adapter whose gates are of form ``identity``."""
    found: State = {}
    for layer in adapter.config.adapted_layers(model.n_layer):
        stem = f"transformer.h.{layer}.attn"
        found[f"{stem}.adapter_wte.weight"] = adapter.state[f"{prefix(layer)}.prompt"]
        gate = adapter.state[f"{prefix(layer)}.gate"]
        found[f"{stem}.gating_factor"] = gate.view(dialect.gate_shape(model.n_head))
    if adapter.config.version == "v2":
        found |= _write_v2(adapter, model, dialect)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _write_v2(adapter: PlainAdapter, model: LlamaConfig, dialect: Dialect) -> State:
    ours, found = adapter.state, {}
    for layer in range(model.n_layer):
        stem, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        for norm, name in dialect.norms.items():
            found[f"{theirs}.{name}"] = ours[f"{stem}.{norm}.adapter_weight"]
        for kind in KINDS:
            for linear, name in dialect.linears.items():
                found[f"{theirs}.{name}.adapter_{kind}"] = ours[f"{stem}.{linear}.adapter_{kind}"]
            parts = [ours[f"{stem}.{linear}.adapter_{kind}"] for linear in (QUERY, KEY, VALUE)]
            joint = torch.cat(_reordered(parts, model, dialect, neighbour_rows))
            found[f"{theirs}.{dialect.fused}.adapter_{kind}"] = joint
    found[dialect.final_norm] = ours["norm.adapter_weight"]
    untrained = {"bias": torch.zeros(model.vocab_size), "scale": torch.ones(model.vocab_size)}
    for kind in KINDS:
        name = f"lm_head.adapter_{kind}"
        found[name] = ours.get(name, untrained[kind])
    return found
