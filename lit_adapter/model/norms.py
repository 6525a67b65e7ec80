"""The norms of a model as values, so that the slots of one decode step may each have their own.

Letters: B slots, N layers, C width, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapter.model.frame import framed
from lit_adapter.model.layout import block_layout
from lit_adapter.model.llama import Llama, RMSNorm, normalised


@dataclass(frozen=True, eq=False)
class Norms:
    """The weights of all norms of a model, or of several slots, as `of_slots` returns them."""

    model: Llama
    """Whose norms they are."""
    before: Tensor
    """Of the norms before attention ``[N, C]``."""
    between: Tensor
    """Of those before the MLP ``[N, C]``."""
    last: Tensor
    """Of the final norm ``[C]``."""
    of_heads: Tensor | None
    """Of queries and of keys ``[N, 2, D]``; None in a model without them."""

    @classmethod
    def of(cls, model: Llama) -> Norms:
        """Return a model's norms as they are now."""
        blocks = list(model.layers)
        heads = [
            torch.stack([block.self_attn.q_norm.used_weight, block.self_attn.k_norm.used_weight]).detach()
            for block in blocks
            if model.config.head_norms
        ]
        return cls(
            model,
            torch.stack([block.input_layernorm.used_weight.detach() for block in blocks]),
            torch.stack([block.post_attention_layernorm.used_weight.detach() for block in blocks]),
            model.norm.used_weight.detach().clone(),
            torch.stack(heads) if heads else None,
        )

    def of_slots(self, n_slots: int) -> Norms:
        """Return these norms for each of some slots, for `put` to change.

        Its tensors have a slot before the last dimension, or the last two of those of heads: ``[N, B, C]``,
        ``[B, C]``, ``[N, B, 2, D]``. Its ``model`` shares all else with this one's, and computes with them.
        """
        before, between, last = (_each(x, n_slots, -2) for x in (self.before, self.between, self.last))
        heads = None if self.of_heads is None else _each(self.of_heads, n_slots, -3)
        model = framed(self.model)
        for index, block in enumerate(model.layers):
            block.input_layernorm = SlotNorm(block.input_layernorm.eps, before[index])
            block.post_attention_layernorm = SlotNorm(block.post_attention_layernorm.eps, between[index])
            if heads is not None:
                attention = block.self_attn
                attention.q_norm = SlotNorm(attention.q_norm.eps, heads[index, :, 0])
                attention.k_norm = SlotNorm(attention.k_norm.eps, heads[index, :, 1])
        model.norm = SlotNorm(model.norm.eps, last)
        return Norms(model, before, between, last, heads)

    def put(self, slots: Tensor, norms: Norms) -> None:
        """Give slots ``[b]`` of these the norms of one model."""
        self.before[:, slots] = norms.before[:, None].to(self.before.dtype)
        self.between[:, slots] = norms.between[:, None].to(self.before.dtype)
        self.last[slots] = norms.last.to(self.last.dtype)
        if self.of_heads is not None and norms.of_heads is not None:
            self.of_heads[:, slots] = norms.of_heads[:, None].to(self.of_heads.dtype)


def _each(x: Tensor, n_slots: int, dim: int) -> Tensor:
    """Return ``x`` once for each slot, in a new dimension; in fp32 at least, as trained norms are."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.unsqueeze(dim).repeat_interleave(n_slots, dim)


class SlotNorm(RMSNorm):
    """A norm with a weight for each slot.

    Args:
        eps: of the norm.
        weights: ``[B, width]``; later changes count.
    """

    def __init__(self, eps: float, weights: Tensor) -> None:
        nn.Module.__init__(self)
        self.eps, self.weights = eps, weights

    @property
    def used_weight(self) -> Tensor:
        """The weights of all slots."""
        return self.weights

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x``, whose first dimension has the first slots."""
        weight = self.weights[: len(x)].view(len(x), *[1] * (x.dim() - 2), -1)
        return (normalised(x, self.eps) * weight).to(x.dtype)


@dataclass(frozen=True)
class StepNorms:
    """The norms of a step on a CPU: one model's for all of its slots, or each slot's own."""

    before: Tensor
    """Weights as `normed` takes them, of each layer."""
    between: Tensor
    last: Tensor
    of_heads: Sequence[Tensor | None]
    """``[H + G, D]`` of each layer, or ``[B, H + G, D]``."""

    @classmethod
    def of(cls, norms: Norms, n_slots: int) -> StepNorms:
        """Return the norms of the first slots, given those of a model or of several slots."""
        each, heads = norms.before.dim() == 3, norms.of_heads
        before, between, last = (
            x[..., :n_slots, :] if each else torch.cat((x, torch.zeros_like(x)), -1)
            for x in (norms.before, norms.between, norms.last)
        )
        if heads is None:
            return cls(before, between, last, [None] * len(before))
        layout = block_layout(norms.model.config)
        counts = torch.tensor([layout[f"self_attn.{name}_proj"].rotated_heads for name in "qk"])
        of_heads = (heads[:, :n_slots] if each else heads).repeat_interleave(counts, -2)
        return cls(before, between, last, list(of_heads))


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the root mean square norm of ``x [B, C]``: the layer norm of x and -x, whose mean is 0.

    Args:
        x: what is normed.
        weight: of all rows, with as many zeros after it ``[2 C]``, or of each row ``[B, C]``.
        eps: is added to the mean square.
    """
    C = x.shape[-1]
    both = torch.cat((x, -x), dim=-1)
    if weight.dim() == 1:
        return F.layer_norm(both, (2 * C,), weight, None, eps)[:, :C]
    # As precise as the layer norm is with its own weight: it rounds once.
    plain = F.layer_norm(both.to(weight.dtype), (2 * C,), None, None, eps)
    return (plain[:, :C] * weight).to(x.dtype)
