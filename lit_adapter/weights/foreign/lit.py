"""lit-llama's and litgpt's adapters, V1 and V2: one layout in two spellings.

Both compute a layer's queries, keys and values by one linear layer, whose rows are all queries, then keys,
then values. lit-llama rotates neighbours as Meta does, so the query and key rows of V2's biases and scales
are reordered; prompts and gates are not. Before 0.5.5, litgpt arranged the rows by group: the queries of a
group, its key, its value. In V2 both always train the output layer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.model.adapter import adapter_shapes
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.gates import GateName
from lit_adapter.model.layout import block_layout
from lit_adapter.model.prefix import prefix_name
from lit_adapter.weights.adapter_file import AdapterInfo
from lit_adapter.weights.foreign.format import Format, Opened, refuse_rest, take, take_prefixes
from lit_adapter.weights.plain import PlainAdapter, State
from lit_adapter.weights.source import half_split

NORMS = ("input_layernorm", "post_attention_layernorm")
LINEARS = (
    ("self_attn.o_proj",),
    ("mlp.gate_proj",),
    ("mlp.up_proj",),
    ("mlp.down_proj",),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)
"""Which linear layers each of a layer's linear layers in the file joins, in the order of the file."""
KINDS = ("bias", "scale")
PROMPT, GATE = "transformer.h.{}.attn.adapter_wte.weight", "transformer.h.{}.attn.gating_factor"


class _Lit(Format):
    """What lit-llama and litgpt share."""

    gate: GateName | None = "identity"
    gate_shape: tuple[int, ...]
    """One size is -1, the number of heads."""
    wraps: bool
    """Whether the tensors are under the key ``model``."""
    joint: tuple[str, ...]
    """Names of the joint linear layer of queries, keys and values in V2, in this and older versions."""
    linears: tuple[str, ...]
    """Names of `LINEARS`."""
    norms: tuple[str, ...]
    """Names of `NORMS`."""
    final_norm: str
    has_meta_rows = False
    """Whether query and key rows are in Meta's rotary order."""

    def recognise(self, opened: Opened) -> str | None:
        """Recognise V2 by its linear layers, V1 by the shape of its gates and the key ``model``."""
        names = opened.tensors
        if any(name.endswith(".adapter_scale") for name in names):
            marks = [mark for mark in self.joint if any(f".{mark}.adapter_" in name for name in names)]
            return f"{marks[0]}.adapter_bias" if marks else None
        gate = next((names[name] for name in names if name.endswith(".attn.gating_factor")), None)
        if gate is None:
            return None
        has_late_shape = gate.ndim == 4 and gate.shape[2] > 1  # [1, 1, H, 1]
        if self.wraps != (opened.wrapped or has_late_shape):
            return None
        return f"gating_factor {list(gate.shape)}, {'under' if opened.wrapped else 'not under'} 'model'"

    def read(self, opened: Opened, model: LlamaConfig, gate: GateName | None = None) -> PlainAdapter:
        source, left = opened.path, dict(opened.tensors)
        state, sizes, single = take_prefixes(left, PROMPT, GATE, "identity", model, source)
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
        config = AdapterConfig(version="v2" if is_v2 else "v1", norms=False, head=head, **sizes)
        return PlainAdapter(config, state, notes)

    def _read_v2(self, left: State, model: LlamaConfig, source: Path) -> State:
        shapes = adapter_shapes(AdapterConfig(version="v2", prompt_length=0, head=True), model)
        state: State = {}
        for theirs, ours in self._v2_names(model.n_layer).items():
            widths = [shapes[name][0] for name in ours]
            joined = take(left, theirs, (sum(widths),), source)
            for name, rows in zip(ours, joined.split(widths), strict=True):
                state[name] = self._reordered(name, rows, model).clone()
        return state

    def _v2_names(self, n_layer: int) -> dict[str, list[str]]:
        """Return our names of the tensors that each of the file's V2 tensors joins, in the file's order."""
        names: dict[str, list[str]] = {}
        for layer in range(n_layer):
            ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
            for name, norm in zip(self.norms, NORMS, strict=True):
                names[f"{theirs}.{name}"] = [f"{ours}.{norm}.adapter_weight"]
            names |= {
                f"{theirs}.{name}.adapter_{kind}": [f"{ours}.{linear}.adapter_{kind}" for linear in own]
                for kind in KINDS
                for name, own in zip(self.linears, LINEARS, strict=True)
            }
        names[self.final_norm] = ["norm.adapter_weight"]
        return names | {f"lm_head.adapter_{kind}": [f"lm_head.adapter_{kind}"] for kind in KINDS}

    def check_writable(self, config: AdapterConfig, model: LlamaConfig) -> None:
        """Refuse LoRA, queries before rotation, and norms of the upper layers alone."""
        super().check_writable(config, model)
        lowest = config.learning_layers(model.n_layer).start
        if "norms" in config.parts and lowest:
            raise UserError(
                f"{self.name}'s V2 has norms of all layers, this adapter trains none below layer {lowest}; "
                "train one with adapter.layers null, or with adapter.norms false"
            )
        if "lora" in config.parts:
            raise UserError(
                f"{self.name}'s adapters have no LoRA, so they cannot hold this one; "
                "one without prompts can be written with --to peft-lora"
            )

    def _reordered(self, name: str, rows: Tensor, model: LlamaConfig, *, undo: bool = False) -> Tensor:
        return half_split(name, rows, model, undo=undo) if self.has_meta_rows else rows

    def write(self, adapter: PlainAdapter, model: LlamaConfig) -> State:
        """Return prompts ``[K, C]``, gates of shape `gate_shape`, and V2's norms, biases and scales."""
        found: State = {}
        for layer in adapter.config.adapted_layers(model.n_layer):
            found[PROMPT.format(layer)] = adapter.state[f"{prefix_name(layer)}.prompt"]
            found[GATE.format(layer)] = adapter.state[f"{prefix_name(layer)}.gate"].view(self.gate_shape)
        if "norms" in adapter.config.parts:
            shapes = adapter_shapes(AdapterConfig(version="v2", prompt_length=0, head=True), model)
            untrained = {
                name: torch.full(shape, float(not name.endswith("bias"))) for name, shape in shapes.items()
            }
            state = untrained | adapter.state
            for theirs, names in self._v2_names(model.n_layer).items():
                rows = [self._reordered(name, state[name], model, undo=True) for name in names]
                found[theirs] = torch.cat(rows)
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def remarks(self, config: AdapterConfig) -> list[str]:
        """Say what is added to norms."""
        if "norms" not in config.parts or "linears" in config.parts:
            return []
        return ["added     biases of 0 and scales of 1: the format has norms in V2 alone"]

    def save(self, out: Path, tensors: dict[str, Any], info: AdapterInfo) -> None:
        super().save(out, {"model": tensors} if self.wraps else tensors, info)


class LitLlama(_Lit):
    """lit-llama's spelling: Meta's order of rows, models without grouped queries or biases."""

    name = "lit-llama"
    families = ("llama",)
    template = "alpaca"
    gate_shape = (1, -1, 1, 1)
    wraps = False
    has_meta_rows = True
    joint = ("attn.c_attn",)
    linears = ("attn.c_proj", "mlp.c_fc1", "mlp.c_fc2", "mlp.c_proj", "attn.c_attn")
    norms = ("rms_1.scale", "rms_2.scale")
    final_norm = "transformer.ln_f.scale"

    def check_writable(self, config: AdapterConfig, model: LlamaConfig) -> None:
        """Refuse LoRA, and a base with grouped queries or biases."""
        super().check_writable(config, model)
        biased = any(linear.bias for linear in block_layout(model).linears)
        if model.n_kv_head != model.n_head or biased:
            raise UserError(
                "lit-llama has no model with grouped queries or biases, and the base has them; "
                "use --to litgpt or peft"
            )

    def remarks(self, config: AdapterConfig) -> list[str]:
        """Say what was reordered."""
        if "linears" not in config.parts:
            return super().remarks(config)
        return ["reordered query and key rows of biases and scales, between Meta's and Hugging Face's order"]


class LitGPT(_Lit):
    """litgpt's spelling."""

    name = "litgpt"
    families = ("llama", "mistral", "qwen2")
    template = "alpaca-newline"
    gate_shape = (1, 1, -1, 1)
    wraps = True
    joint = ("attn.qkv", "attn.attn")
    linears = ("attn.proj", "mlp.fc_1", "mlp.fc_2", "mlp.proj", "attn.qkv")
    norms = ("norm_1.weight", "norm_2.weight")
    final_norm = "transformer.ln_f.weight"

    def read(self, opened: Opened, model: LlamaConfig, gate: GateName | None = None) -> PlainAdapter:
        """Return the adapter, also of versions before 0.5.5, whose V2 files later ones cannot read."""
        tensors: State = {}
        for name, tensor in opened.tensors.items():
            if ".attn.attn.adapter_" in name:
                name = name.replace(".attn.attn.", ".attn.qkv.")
                if not tensor.numel() % (model.n_kv_head * model.head_dim):
                    groups = tensor.view(model.n_kv_head, -1, model.head_dim)  # a group: queries, key, value
                    parts = groups[:, :-2], groups[:, -2], groups[:, -1]
                    tensor = torch.cat([rows.flatten() for rows in parts])
            tensors[name] = tensor
        return super().read(replace(opened, tensors=tensors), model)

    def remarks(self, config: AdapterConfig) -> list[str]:
        """Say where recent versions compute something else."""
        if not config.prompt_length:
            return super().remarks(config)
        return [
            *super().remarks(config),
            "note      litgpt 0.5.5 and later project the prefix through wrong rows of the joint query, key "
            "and value layer: where gates are open, its logits differ from this formula, lit-llama's",
        ]
