"""The norms of a model as values, so that the slots of one decode step may each have their own.

Letters: B slots, N layers, C width, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adapter.model.layout import BlockLayout, block_layout
from lit_adapter.model.llama import Attention, Llama


@dataclass(frozen=True, eq=False)
class Norms:
    """The weights of all norms of a model."""

    model: Llama
    """Whose norms they are."""
    before: Tensor
    """Of the norms before attention ``[N, C]``."""
    between: Tensor
    """Of those before the MLP ``[N, C]``."""
    last: Tensor
    """Of the final norm ``[C]``."""
    of_heads: Tensor | None
    """Of queries and keys ``[N, H + G, D]``; None in a model without them."""

    @classmethod
    def of(cls, model: Llama) -> Norms:
        """Return a model's norms as they are now."""
        layout, blocks = block_layout(model.config), list(model.layers)
        of_heads = [_of_heads(block.self_attn, layout) for block in blocks]
        found = [weights for weights in of_heads if weights is not None]
        return cls(
            model,
            torch.stack([block.input_layernorm.used_weight.detach() for block in blocks]),
            torch.stack([block.post_attention_layernorm.used_weight.detach() for block in blocks]),
            model.norm.used_weight.detach().clone(),
            torch.stack(found) if found else None,
        )


def _of_heads(attention: Attention, layout: BlockLayout) -> Tensor | None:
    """Return the weights of the norms of queries and keys, ``[H + G, D]``; None in a model without them."""
    norms = (attention.q_norm, attention.k_norm)
    counts = (layout[f"self_attn.{name}_proj"].rotated_heads for name in "qk")
    rows = [norm.used_weight.expand(n, -1) for norm, n in zip(norms, counts, strict=True) if norm is not None]
    return torch.cat(rows).detach() if rows else None


@dataclass(frozen=True)
class StepNorms:
    """The norms of the slots of a step: one model's for all of them, or each slot's own."""

    before: Tensor
    """Weights as `normed` takes them, of each layer."""
    between: Tensor
    last: Tensor
    of_heads: Sequence[Tensor | None]
    """``[H + G, D]`` of each layer, or ``[B, H + G, D]``."""

    @classmethod
    def of(cls, rows: Sequence[Norms]) -> StepNorms:
        """Join the norms of the slots."""
        first = rows[0]
        if all(row is first for row in rows):
            before, between, last = (
                torch.cat((x, torch.zeros_like(x)), -1) for x in (first.before, first.between, first.last)
            )
            heads = first.of_heads
        else:
            before = torch.stack([row.before for row in rows], 1)
            between = torch.stack([row.between for row in rows], 1)
            last = torch.stack([row.last for row in rows])
            own = [row.of_heads for row in rows if row.of_heads is not None]
            heads = torch.stack(own, 1) if own else None
        return cls(before, between, last, [None] * len(before) if heads is None else list(heads))


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
