"""LLaMA-Adapter's gated prefix attention (arXiv 2303.16199, section 3), attached by composition.

An adapted layer owns a prompt ``P [K, C]`` and a gate ``g``. With the layer's own frozen projections,

    pk = P Wk, pv = P Wv                               no norm, no rotation, no mask
    y  = softmax(q k^T / sqrt(D) + causal) v  +  c(g) * softmax(q pk^T / sqrt(D)) pv

and ``y`` goes through the layer's output projection. The two softmaxes are separate. With g = 0 the
adapted model is the base model; the prompts' gradient is then exactly zero, so gates open first.

Version 2 of the adapter trains every norm and linear layer too (see `affine`).

Letters: B batch, T positions, C width, H query heads, G key/value heads, D head size, K prompt length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapter.errors import UserError
from lit_adapter.model.affine import (
    AdaptedLinear,
    AdaptedNorm,
    adapt_everywhere,
    adapted_modules,
    expected_widths,
)
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.llama import Llama
from lit_adapter.model.precision import widen


class GatedPrefix(nn.Module):
    """The trained part of one attention layer: a prompt and its gate, fp32 under every precision.

    In bf16 a gate of 0.5 does not move by 0.001; the base's precision therefore never reaches them.
    """

    heads = slice(None)
    """The query heads that this process computes, all of them unless they are cut over several."""

    def __init__(self, config: AdapterConfig, model: LlamaConfig) -> None:
        super().__init__()
        self.form = config.gate
        self.dropout = config.dropout
        self.n_head, self.n_group = model.n_head, model.n_head // model.n_kv_head
        self.scale = model.head_dim**-0.5
        gate_shape = config.gate_shape(model.n_head, model.head_dim)
        self.prompt = nn.Parameter(torch.empty(config.prompt_length, model.n_embd, dtype=torch.float32))
        self.gate = nn.Parameter(torch.zeros(gate_shape, dtype=torch.float32))

    def strength(self, gates: Tensor | None = None) -> Tensor:
        """Return c(g), broadcastable to the branch's output: ``[H or 1, 1, D or 1]``, fp32.

        Args:
            gates: of many such layers ``[L, n]``, to return theirs ``[L, H or 1, 1, D or 1]``.
        """
        gates = self.gate if gates is None else gates
        shape = (self.n_head, 1, -1) if self.form == "channel" else (-1, 1, 1)
        return (gates.tanh() if self.form == "tanh" else gates).view(*gates.shape[:-1], *shape)

    def gate_gradient(self, strength: Tensor, dstrength: Tensor) -> Tensor:
        """Return the gate's gradient from that of c(g) for every channel, both ``[H, D]``."""
        if self.form == "channel":
            return dstrength.flatten()
        if self.form == "layer":
            return dstrength.sum().view(1)
        dgate = dstrength.sum(1)
        return torch.ops.aten.tanh_backward(dgate, strength[:, 0]) if self.form == "tanh" else dgate

    def own_strength(self) -> Tensor:
        """Return c(g) of the heads that this process computes."""
        return self.strength() if self.form == "layer" else self.strength()[self.heads]

    def forward(self, q: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
        """Attend to the prompt.

        Args:
            q: rotated queries ``[B, H, T, D]``.
            pk: the prompt's keys ``[G, K, D]``.
            pv: the prompt's values ``[G, K, D]``.

        Returns:
            ``c(g) * softmax(q pk^T / sqrt(D)) pv``, ``[B, H, T, D]`` in q's dtype.
        """
        pk = (pk * self.scale).repeat_interleave(self.n_group, dim=0)
        pv = pv.repeat_interleave(self.n_group, dim=0)
        # [B, H, K, T]: across so few numbers a CPU takes the softmax of many positions at once.
        weight = F.dropout(widen(pk @ q.mT).softmax(dim=-2), self.dropout, self.training).to(q.dtype).mT
        if q.dtype == torch.float16:  # c(g) pv can be less than any of its numbers
            return ((weight @ pv) * self.own_strength()).to(q.dtype)
        # The few values are multiplied by c(g), not the many results.
        return weight @ (widen(pv) * self.own_strength()).to(q.dtype)


def attach(model: Llama, config: AdapterConfig, seed: int = 0) -> None:
    """Give a frozen model what ``config`` trains; prompts are drawn with ``seed``.

    Raises:
        UserError: more adapted layers than layers.
    """
    generator = torch.Generator().manual_seed(seed)
    for index in config.adapted_layers(model.config.n_layer):
        attention = model.layers[index].self_attn
        device = attention.o_proj.weight.device
        with torch.device("cpu"):
            prefix = GatedPrefix(config, model.config)
        with torch.no_grad():
            prefix.prompt.normal_(0.0, config.prompt_init_std, generator=generator)
        attention.prefix = prefix if device.type == "meta" else prefix.to(device)  # the base is yet to come
    if config.version == "v2":
        adapt_everywhere(model, head=config.head)


_TRAINED: dict[type[nn.Module], tuple[str, ...]] = {
    GatedPrefix: ("prompt", "gate"),
    AdaptedLinear: ("adapter_bias", "adapter_scale"),
    AdaptedNorm: ("adapter_weight",),
}


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the adapter's parameters under the names they have in the module, checkpoint and file."""
    for module_name, module in model.named_modules():
        for name in _TRAINED.get(type(module), ()):
            yield f"{module_name}.{name}", getattr(module, name)


def is_of_prefix(name: str) -> bool:
    """Tell a prompt or gate by its name from what V2 adds."""
    return ".prefix." in name


def parameter_counts(config: AdapterConfig, model: LlamaConfig) -> str:
    """Say what is trained, in numbers: prompts, gates, and V2's norms, biases and scales."""
    count = dict.fromkeys(("prompt", "gate", "adapter_weight", "adapter_bias", "adapter_scale"), 0)
    for name, shape in expected_shapes(config, model).items():
        count[name.rpartition(".")[2]] += math.prod(shape)
    parts = []
    if config.prompt_length:
        n_adapted = len(config.adapted_layers(model.n_layer))
        sizes = f"K {config.prompt_length}, L {n_adapted} of {model.n_layer}"
        parts.append(f"prompts {count['prompt']:,} and gates {count['gate']:,}, {sizes}")
    if count["adapter_scale"]:
        per_linear = f"biases {count['adapter_bias']:,}, scales {count['adapter_scale']:,}"
        parts.append(
            f"norms {count['adapter_weight']:,}, {per_linear}, {'with' if config.head else 'without'} head"
        )
    return "; ".join(parts)


def check_same_form(given: AdapterConfig, wanted: AdapterConfig, n_layer: int, source: Path) -> None:
    """Refuse to start a run from an adapter of another form.

    Raises:
        UserError: names every setting that differs, with both values.
    """
    theirs, ours = (
        {
            "version": config.version,
            "prompt_length": config.prompt_length,
            "layers": len(config.adapted_layers(n_layer)),
            "gate": config.gate,
            "head": config.head,
        }
        for config in (given, wanted)
    )
    wrong = [
        f"adapter.{key} {value} (here {ours[key]})" for key, value in theirs.items() if value != ours[key]
    ]
    if wrong:
        raise UserError(f"{source}: cannot start from it: it has {', '.join(wrong)}; set them as it has them")


@contextmanager
def plain_base(model: Llama) -> Iterator[None]:
    """Be the model without its adapter inside the block."""
    attentions = [block.self_attn for block in model.layers]
    prefixes = [attention.prefix for attention in attentions]
    adapted = list(adapted_modules(model))
    for attention in attentions:
        attention.prefix = None
    for module in adapted:
        module.active = False
    try:
        yield
    finally:
        for attention, prefix in zip(attentions, prefixes, strict=True):
            attention.prefix = prefix
        for module in adapted:
            module.active = True


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the adapter's tensors on the CPU, by name."""
    return {name: parameter.detach().cpu().clone() for name, parameter in adapter_parameters(model)}


def load_adapter_state(model: nn.Module, state: dict[str, Tensor], source: str = "adapter") -> None:
    """Copy ``state`` into the model's adapter.

    Args:
        model: a model with prefixes attached.
        state: tensors by name.
        source: the file's name, for messages.

    Raises:
        UserError: missing or unexpected tensors, a wrong shape, or a value that is not finite.
    """
    own = dict(adapter_parameters(model))
    check_adapter_state({name: tuple(p.shape) for name, p in own.items()}, state, source)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def expected_shapes(config: AdapterConfig, model: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every adapter tensor."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index in config.adapted_layers(model.n_layer):
        stem = f"layers.{index}.self_attn.prefix"
        shapes[f"{stem}.prompt"] = (config.prompt_length, model.n_embd)
        shapes[f"{stem}.gate"] = config.gate_shape(model.n_head, model.head_dim)
    if config.version == "v2":
        shapes |= {name: (width,) for name, width in expected_widths(model, head=config.head).items()}
    return shapes


def check_adapter_state(shapes: dict[str, tuple[int, ...]], state: dict[str, Tensor], source: str) -> None:
    """Compare ``state`` with the wanted names and shapes, and see that every number is finite.

    Raises:
        UserError: names the first tensors that are missing, unexpected, misshapen or not finite.
    """
    missing = sorted(shapes.keys() - state.keys())
    unexpected = sorted(state.keys() - shapes.keys())
    if missing or unexpected:
        found = [
            f"{len(names)} {kind} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise UserError(f"{source}: the adapter's tensors do not fit this model: {'; '.join(found)}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise UserError(f"{source}: {name} has shape {list(state[name].shape)}; expected {list(shape)}")
        if not state[name].is_floating_point() or not bool(torch.isfinite(state[name]).all()):
            raise UserError(f"{source}: {name} holds values that are not finite numbers")
