"""lit-llama's and litgpt's adapters, V1 and V2: one layout in two spellings.

Both compute a layer's queries, keys and values by one linear layer, whose rows are all queries, then keys,
then values. lit-llama rotates neighbours as Meta does, so the query and key rows of V2's biases and scales
are reordered; prompts and gates are not. Before 0.5.5, litgpt arranged the rows by group: the queries of a
group, its key, its value. In V2 both always train the output layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.model.adapter import expected_shapes
from lit_adapter.model.config import AdapterConfig, GateForm, LlamaConfig
from lit_adapter.weights.adapter_file import AdapterInfo
from lit_adapter.weights.foreign.format import (
    LAYER,
    Format,
    Opened,
    count_top_layers,
    prefix_name,
    refuse_rest,
    take,
)
from lit_adapter.weights.foreign.gates import take_gates
from lit_adapter.weights.plain import PlainAdapter, State
from lit_adapter.weights.source import half_split, neighbours

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
KINDS = ("bias", "scale")
_PROMPT = re.compile(rf"transformer\.h\.{LAYER}\.attn\.adapter_wte\.weight")


class Lit(Format):
    """What lit-llama and litgpt share."""

    gate: GateForm | None = "identity"
    gate_shape: tuple[int, ...]
    """One size is -1, the number of heads."""
    wraps: bool
    """Whether the tensors are under the key ``model``."""
    linears: ClassVar[Mapping[str, tuple[str, ...]]]
    """The linear layers of ours that each of a layer's linear layers joins, in the order they are written."""
    norms: ClassVar[Mapping[str, str]]
    """Our names of a layer's norms."""
    final_norm: str

    def recognise(self, opened: Opened) -> str | None:
        """By the names of V2's linear layers; V1 by the shape of its gates and the key ``model``."""
        names = opened.tensors
        joint = next(name for name, ours in self.linears.items() if ours == QKV)
        if any(name.endswith(".adapter_scale") for name in names):
            marks = any(f".{joint}.adapter_" in name for name in names)
            return f"{joint}.adapter_bias" if marks else None
        gate = next((names[name] for name in names if name.endswith(".attn.gating_factor")), None)
        if gate is None:
            return None
        has_late_shape = gate.ndim == 4 and gate.shape[2] > 1  # [1, 1, H, 1]
        if self.wraps != (opened.wrapped or has_late_shape):
            return None
        return f"gating_factor {list(gate.shape)}, {'under' if opened.wrapped else 'not under'} 'model'"

    def read(self, opened: Opened, model: LlamaConfig, gate: GateForm | None = None) -> PlainAdapter:
        """Return the adapter."""
        source, left = opened.path, dict(opened.tensors)
        layers = sorted(int(m[1]) for m in map(_PROMPT.fullmatch, left) if m)
        n_layers = count_top_layers(layers, model.n_layer, source)
        names = [f"transformer.h.{layer}.attn.gating_factor" for layer in layers]
        gates, form, single = take_gates(left, names, "identity", model, source)
        length = 0
        state: State = {}
        for layer, own in zip(layers, gates, strict=True):
            name = f"transformer.h.{layer}.attn.adapter_wte.weight"
            if left[name].ndim != 2:
                raise UserError(
                    f"{source}: {name} has shape {list(left[name].shape)}; expected K x {model.n_embd}"
                )
            length = length or len(left[name])
            state[f"{prefix_name(layer)}.prompt"] = take(left, name, (length, model.n_embd), source)
            state[f"{prefix_name(layer)}.gate"] = own
        notes = ["gates: one per layer, as lit-llama had them at first"] if single else []
        is_v2, head = any(name.endswith(".adapter_scale") for name in left), False
        if is_v2:
            state |= self._read_v2(left, model, source)
            bias, scale = (state[f"lm_head.adapter_{kind}"] for kind in KINDS)
            head = bool(bias.any() or (scale != 1).any())
            if not head:
                del state["lm_head.adapter_bias"], state["lm_head.adapter_scale"]
                notes.append("output layer: bias 0 and scale 1 throughout, so left out")
        refuse_rest(left, source, self.name)
        config = AdapterConfig(
            version="v2" if is_v2 else "v1",
            prompt_length=length,
            layers=n_layers or None,
            gate=form,
            head=head,
        )
        return PlainAdapter(config, state, notes)

    def _read_v2(self, left: State, model: LlamaConfig, source: Path) -> State:
        shapes = expected_shapes(AdapterConfig(version="v2", prompt_length=0, head=True), model)
        state: State = {}
        for theirs, ours in self._v2_names(model.n_layer).items():
            widths = [shapes[name][0] for name in ours]
            joined = take(left, theirs, (sum(widths),), source)
            for name, rows in zip(ours, self._split(joined, widths, model), strict=True):
                state[name] = self._from_theirs(name, rows, model).clone()
        return state

    def _v2_names(self, n_layer: int) -> dict[str, list[str]]:
        """Return our names of the tensors that each of the file's V2 tensors joins, in the file's order."""
        names: dict[str, list[str]] = {}
        for layer in range(n_layer):
            ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
            names |= {
                f"{theirs}.{name}": [f"{ours}.{own}.adapter_weight"] for name, own in self.norms.items()
            }
            names |= {
                f"{theirs}.{name}.adapter_{kind}": [f"{ours}.{linear}.adapter_{kind}" for linear in own]
                for kind in KINDS
                for name, own in self.linears.items()
            }
        names[self.final_norm] = ["norm.adapter_weight"]
        return names | {f"lm_head.adapter_{kind}": [f"lm_head.adapter_{kind}"] for kind in KINDS}

    def _split(self, joined: Tensor, widths: Sequence[int], model: LlamaConfig) -> Sequence[Tensor]:
        """Return the rows of each linear layer that a tensor joins."""
        return joined.split(list(widths))

    def _from_theirs(self, name: str, rows: Tensor, model: LlamaConfig) -> Tensor:
        """Return the rows of our tensor ``name`` in our order."""
        return rows

    def _to_theirs(self, name: str, rows: Tensor, model: LlamaConfig) -> Tensor:
        """Undo `_from_theirs`."""
        return rows

    def write(self, adapter: PlainAdapter, model: LlamaConfig) -> State:
        """Return prompts ``[K, C]``, gates of shape `gate_shape`, and V2's norms, biases and scales."""
        found: State = {}
        for layer in adapter.config.adapted_layers(model.n_layer):
            stem, ours = f"transformer.h.{layer}.attn", prefix_name(layer)
            found[f"{stem}.adapter_wte.weight"] = adapter.state[f"{ours}.prompt"]
            found[f"{stem}.gating_factor"] = adapter.state[f"{ours}.gate"].view(self.gate_shape)
        if adapter.config.version == "v2":
            untrained = {
                "lm_head.adapter_bias": torch.zeros(model.vocab_size),
                "lm_head.adapter_scale": torch.ones(model.vocab_size),
            }
            state = untrained | adapter.state
            for theirs, names in self._v2_names(model.n_layer).items():
                found[theirs] = torch.cat([self._to_theirs(name, state[name], model) for name in names])
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def save(self, out: Path, tensors: dict[str, Any], info: AdapterInfo) -> None:
        """Write the file."""
        super().save(out, {"model": tensors} if self.wraps else tensors, info)


class LitLlama(Lit):
    """lit-llama's spelling: Meta's order of rows, models without grouped queries or biases."""

    name = "lit-llama"
    template = "alpaca"
    gate_shape = (1, -1, 1, 1)
    wraps = False
    linears: ClassVar = {
        "attn.c_proj": ("self_attn.o_proj",),
        "mlp.c_fc1": ("mlp.gate_proj",),
        "mlp.c_fc2": ("mlp.up_proj",),
        "mlp.c_proj": ("mlp.down_proj",),
        "attn.c_attn": QKV,
    }
    norms: ClassVar = {"rms_1.scale": "input_layernorm", "rms_2.scale": "post_attention_layernorm"}
    final_norm = "transformer.ln_f.scale"

    def check_writable(self, config: AdapterConfig, model: LlamaConfig) -> None:
        """Refuse a base with grouped queries or biases."""
        if model.n_kv_head != model.n_head or model.attention_bias or model.mlp_bias:
            raise UserError(
                "lit-llama has no model with grouped queries or biases, and the base has them; "
                "use --to litgpt or peft"
            )

    def _from_theirs(self, name: str, rows: Tensor, model: LlamaConfig) -> Tensor:
        return half_split(name, rows, model)

    def _to_theirs(self, name: str, rows: Tensor, model: LlamaConfig) -> Tensor:
        return neighbours(name, rows, model)

    def remarks(self, config: AdapterConfig) -> list[str]:
        """Say what was reordered."""
        if config.version == "v1":
            return []
        return ["reordered query and key rows of biases and scales, between Meta's and Hugging Face's order"]


class LitGPT(Lit):
    """litgpt's spelling."""

    name = "litgpt"
    template = "alpaca-newline"
    gate_shape = (1, 1, -1, 1)
    wraps = True
    linears: ClassVar = {
        "attn.proj": ("self_attn.o_proj",),
        "mlp.fc_1": ("mlp.gate_proj",),
        "mlp.fc_2": ("mlp.up_proj",),
        "mlp.proj": ("mlp.down_proj",),
        "attn.qkv": QKV,
    }
    norms: ClassVar = {"norm_1.weight": "input_layernorm", "norm_2.weight": "post_attention_layernorm"}
    final_norm = "transformer.ln_f.weight"

    def recognise(self, opened: Opened) -> str | None:
        """As `Lit.recognise`, in the spelling of any version."""
        return super().recognise(opened) or _BEFORE_055.recognise(opened)

    def read(self, opened: Opened, model: LlamaConfig, gate: GateForm | None = None) -> PlainAdapter:
        """Return the adapter."""
        is_old = any(".attn.attn.adapter_" in name for name in opened.tensors)
        return _BEFORE_055.read(opened, model) if is_old else super().read(opened, model)

    def remarks(self, config: AdapterConfig) -> list[str]:
        """Say where recent versions compute something else."""
        if not config.prompt_length:
            return []
        return [
            "note      litgpt 0.5.5 and later project the prefix through wrong rows of the joint query, key "
            "and value layer: where gates are open, its logits differ from this formula, lit-llama's"
        ]


class _LitGPTBefore055(Lit):
    """The older spelling; later versions of litgpt cannot read such a V2 file either."""

    name, wraps, norms, final_norm = LitGPT.name, LitGPT.wraps, LitGPT.norms, LitGPT.final_norm
    linears: ClassVar = {"attn.attn" if ours == QKV else name: ours for name, ours in LitGPT.linears.items()}

    def _split(self, joined: Tensor, widths: Sequence[int], model: LlamaConfig) -> Sequence[Tensor]:
        if len(widths) == 1:
            return [joined]
        groups = joined.view(model.n_kv_head, -1, model.head_dim)  # [G, queries of a group + 2, D]
        return [rows.flatten() for rows in groups.split([model.n_head // model.n_kv_head, 1, 1], dim=1)]


_BEFORE_055 = _LitGPTBefore055()
