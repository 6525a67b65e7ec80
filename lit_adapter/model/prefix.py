"""LLaMA-Adapter's gated prefix attention (arXiv 2303.16199, section 3).

An adapted layer owns a prompt ``P [K, C]`` and a gate ``g``. With the layer's own frozen projections,

    pk = P Wk, pv = P Wv                               no norm, no rotation, no mask
    y  = softmax(q k^T / sqrt(D) + causal) v  +  softmax(q pk^T / sqrt(D)) (c(g) * pv)

and ``y`` goes through the layer's output projection. q is rotated; with ``prefix_query: unrotated``, that of
the second term is not. The two softmaxes are separate. With g = 0 the adapted model is the base model; the
prompt's gradient is then exactly zero, so gates open first.

If a base has head norms (Qwen3), pk passes the norm of keys, as every key of the base does: the held-out
loss is lower with it than without, or the same (docs/log.md). The window of a layer does not hide the prefix,
which has no position. The adapter file says both (`treatment`).

Letters: B batch, T positions, C width, H query heads, G key/value heads, D head size, K prompt length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.gates import GATE_FORMS
from lit_adapter.model.layout import Shape
from lit_adapter.model.parts import TrainedModule, TrainedPart, share
from lit_adapter.model.precision import widen

if TYPE_CHECKING:
    from lit_adapter.model.llama import Llama


@dataclass(frozen=True, eq=False)
class PrefixState:
    """One layer's prefix as queries meet it. It depends on weights alone, so decoding computes it once."""

    k: Tensor
    """The prompt's keys ``[G, K, D]``."""
    v: Tensor
    """The prompt's values ``[G, K, D]``."""
    strength: Tensor
    """c(g), fp32 ``[H or 1, K or 1, D or 1]``."""
    unrotated: Tensor | bool = False
    """Whether queries attend to it as they are before rotation; with a prefix for each row, some of which
    differ, a bool for each ``[B, 1, 1, 1]``."""
    by_token: Tensor | None = None
    """With a prefix for each row, some of whose strengths differ by prompt token: another factor of c(g),
    ``[B, H, K, 1]``; ``strength`` is then ``[B, H, 1, D]``."""
    hidden: Tensor | None = None
    """With a prefix for each row, all tensors ``[B, ...]``: minus infinity beyond a row's prompt, else 0
    ``[B, 1, K, 1]``."""

    @property
    def whole_strength(self) -> Tensor:
        """c(g), the product of its factors."""
        return self.strength if self.by_token is None else self.strength * self.by_token


def queries_of(state: PrefixState, rotated: Tensor, unrotated: Tensor) -> Tensor:
    """Return the queries that attend to a prefix; all are ``[B, H, T, D]``."""
    if isinstance(state.unrotated, bool):
        return unrotated if state.unrotated else rotated
    return torch.where(state.unrotated, unrotated, rotated)


def attend_prefix(q: Tensor, state: PrefixState, dropout: float = 0.0) -> Tensor:
    """Attend to a prompt.

    Args:
        q: queries ``[B, H, T, D]``, as `queries_of` returns them.
        state: the layer's prefix.
        dropout: share of the attention weights that is dropped.

    Returns:
        ``softmax(q pk^T / sqrt(D)) (c(g) * pv)``, ``[B, H, T, D]`` in q's dtype.
    """
    n_group = q.shape[1] // state.k.shape[-3]
    pk = (state.k * q.shape[-1] ** -0.5).repeat_interleave(n_group, dim=-3)
    pv = state.v.repeat_interleave(n_group, dim=-3)
    # [B, H, K, T]: a CPU takes the softmax over so few numbers for many positions at once.
    score = widen(pk @ q.mT)
    score = score if state.hidden is None else score + state.hidden
    weight = F.dropout(score.softmax(dim=-2), dropout, dropout > 0).to(q.dtype).mT
    strength = state.whole_strength
    if q.dtype == torch.float16 and strength.shape[-2] == 1:  # c(g) * pv may underflow in fp16
        return ((weight @ pv) * strength).to(q.dtype)
    # The few values are multiplied by c(g), not the many results.
    return weight @ (widen(pv) * strength).to(q.dtype)


class GatedPrefix(TrainedModule):
    """The prompt and gate of one attention layer, fp32 under every precision.

    In bf16 a gate of 0.5 does not move by 0.001; the base's precision therefore never reaches them. They may
    be in the host's memory, and are then copied to the base's device each time.
    """

    part = "prefix"
    trained = ("prompt", "gate")
    heads = slice(None)
    """The query heads that this process computes; all of them without tensor parallelism."""

    def __init__(self, config: AdapterConfig, model: LlamaConfig) -> None:
        super().__init__()
        self.form, self.dropout = GATE_FORMS[config.gate], config.dropout
        self.unrotated = config.prefix_query == "unrotated"
        sizes = (model.n_head, config.prompt_length, model.head_dim)
        self.n_head, self.axes = model.n_head, self.form.axes(*sizes)
        self.prompt = nn.Parameter(torch.empty(config.prompt_length, model.n_embd, dtype=torch.float32))
        self.gate = nn.Parameter(torch.zeros(self.form.shape(*sizes), dtype=torch.float32))

    def shard(self, rank: int, n_shards: int) -> None:
        """Compute the query heads of one shard."""
        self.heads = share(self.n_head, rank, n_shards)

    @property
    def dropout_now(self) -> float:
        """The share of the attention weights that is dropped: none outside training."""
        return self.dropout if self.training else 0.0

    def strength(self) -> Tensor:
        """Return c(g), fp32 ``[H or 1, K or 1, D or 1]``."""
        return self.form.strength(self.gate, self.axes)

    def state(self, k: Tensor, v: Tensor) -> PrefixState:
        """Return the prefix of this process's heads, given the prompt's keys and values ``[G, K, D]``."""
        strength = self.strength().to(k.device)
        return PrefixState(k, v, strength[self.heads] if self.form.per_head else strength, self.unrotated)

    def forward(self, rotated: Tensor, unrotated: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from queries ``[B, H, T, D]``, given in both forms, to keys and values ``[G, K, D]``."""
        state = self.state(k, v)
        return attend_prefix(queries_of(state, rotated, unrotated), state, self.dropout_now)


class PrefixPart(TrainedPart):
    """A gated prefix in each of the top layers; none with a prompt length of 0."""

    name = "prefix"

    def form(self, model: LlamaConfig) -> dict[str, Any]:
        """Return prompt length, adapted layers, gate form and which queries attend."""
        config = self.config
        return {
            "prompt_length": config.prompt_length,
            "layers": len(config.adapted_layers(model.n_layer)),
            "gate": config.gate,
            "prefix_query": config.prefix_query,
        }

    def shapes(self, model: LlamaConfig) -> dict[str, Shape]:
        """Return the shapes of prompts ``[K, C]`` and raw gates."""
        length = self.config.prompt_length
        gate = GATE_FORMS[self.config.gate].shape(model.n_head, length, model.head_dim)
        shapes: dict[str, Shape] = {}
        for index in self.config.adapted_layers(model.n_layer):
            shapes |= {
                f"{prefix_name(index)}.prompt": (length, model.n_embd),
                f"{prefix_name(index)}.gate": gate,
            }
        return shapes

    def attach(self, model: Llama, generator: torch.Generator | None) -> None:
        """Attach prefixes with normally distributed prompts and gates of 0."""
        for index in self.config.adapted_layers(model.config.n_layer):
            attention = model.layers[index].self_attn
            device = attention.o_proj.weight.device
            with torch.device("cpu"):
                prefix = GatedPrefix(self.config, model.config)
            if generator is not None:
                nn.init.normal_(prefix.prompt, 0.0, self.config.prompt_init_std, generator)
            # On the meta device the base is not loaded yet, but the adapter has its values.
            attention.prefix = prefix if device.type == "meta" else prefix.to(device)

    def summary(self, model: LlamaConfig, count: Mapping[str, int]) -> str:
        """Return the numbers of prompts and gates, and their sizes."""
        sizes = f"K {self.config.prompt_length}, L {self.form(model)['layers']} of {model.n_layer}"
        return f"prompts {count['prompt']:,} and gates {count['gate']:,}, {sizes}"


def treatment(model: LlamaConfig) -> dict[str, str]:
    """Return how a prefix is treated on a base with head norms or windows; nothing on other bases."""
    keys = {"keys": "pass the norm of keys"} if model.head_norms else {}
    return keys | ({"windows": "do not hide it"} if model.windowed_layers else {})


def prefix_name(layer: int) -> str:
    """Return the name of a layer's prefix in the module tree, the checkpoint and the adapter file."""
    return f"layers.{layer}.self_attn.prefix"
