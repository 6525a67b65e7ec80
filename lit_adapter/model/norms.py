"""The norms of a model as values: each slot of a decode step, and each text of a row, may have its own.

Letters: B slots, N layers, C width, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.frame import framed
from lit_adapter.model.llama import Llama, RMSNorm, normalised


@dataclass(frozen=True, eq=False)
class Norms:
    """The weights of all norms of a model; or of several slots, with B as the second dimension."""

    wide: Tensor
    """The norms before attention and MLP of each layer in turn, and the final one ``[2 N + 1, C]``."""
    of_heads: Tensor | None
    """The head norms, of queries and of keys ``[N, 2, D]``; None in a model without them."""

    @classmethod
    def of(cls, model: Llama) -> Norms:
        """Return a model's norms as they are now."""
        blocks = list(model.layers)
        wide = [norm for block in blocks for norm in (block.input_layernorm, block.post_attention_layernorm)]
        heads = [norm for block in blocks for norm in (block.self_attn.q_norm, block.self_attn.k_norm)]
        of_all = torch.stack([norm.used_weight.detach() for norm in (*wide, model.norm)])
        if not model.config.head_norms:
            return cls(of_all, None)
        return cls(of_all, torch.stack([norm.used_weight.detach() for norm in heads]).unflatten(0, (-1, 2)))

    def each(self, change: Callable[[Tensor], Tensor]) -> Norms:
        """Return these norms with a change to both of their tensors."""
        return Norms(change(self.wide), None if self.of_heads is None else change(self.of_heads))

    def on_host(self) -> Norms:
        """Return them in the host's memory; a device gets them with each request."""
        return self.each(lambda x: x.cpu().pin_memory() if x.is_cuda else x)


class SlotNorms:
    """The norms of every slot, in tensors that stay where they are.

    Args:
        model: has the norms that slots have at first.
        n_slots: B.
    """

    def __init__(self, model: Llama, n_slots: int) -> None:
        self.base, self.reading = Norms.of(model), TokenSlots()
        self.rows = self.base.each(
            lambda x: x.to(torch.promote_types(x.dtype, torch.float32))[:, None].repeat_interleave(n_slots, 1)
        )
        """In fp32 at least, like trained norms."""
        self.stepper = self._framed(model, lambda weights: SlotNorm(model.config, weights))
        """The model with the norms of all slots, for steps."""
        self.reader = self._framed(model, lambda weights: TokenNorm(model.config, weights, self.reading))
        """The model with the norms of the tokens of ``reading``."""

    def _framed(self, model: Llama, norm: Callable[[Tensor], RMSNorm]) -> Llama:
        """Return the model with its norms replaced by ones made of the weights of all slots."""
        own, rows, heads = framed(model), self.rows.wide, self.rows.of_heads
        for index, block in enumerate(own.layers):
            block.input_layernorm = norm(rows[2 * index])
            block.post_attention_layernorm = norm(rows[2 * index + 1])
            if heads is not None:
                block.self_attn.q_norm = norm(heads[index, :, 0])
                block.self_attn.k_norm = norm(heads[index, :, 1])
        own.norm = norm(rows[-1])
        return own

    def put(self, where: Tensor, norms: Sequence[Norms | None]) -> None:
        """Give each of the slots ``where`` the norms of a model; None gives it the initial ones."""
        rows, given = self.rows, [each or self.base for each in norms]
        here = {
            one: one.each(lambda x: x.to(rows.wide.device, rows.wide.dtype, non_blocking=True))
            for one in set(given)
        }
        for name, own in vars(rows).items():
            if own is not None:
                own[:, where] = torch.stack([getattr(here[one], name) for one in given], 1)


class TokenSlots:
    """The slots of the tokens that are read: one of all tokens, or each token's own."""

    _all: Tensor | int
    _last: Tensor | int

    def set(self, of_all: Tensor | int, of_last: Tensor | int) -> None:
        """Set the slots of all tokens of a row ``[T]``, and those of the last tokens of its texts ``[B]``."""
        self._all, self._last = of_all, of_last

    def among(self, n: int) -> Tensor | int:
        """Return the slots of ``n`` tokens: all of the row, or the last ones of its texts."""
        return self._all if isinstance(self._all, int) or n == len(self._all) else self._last


class TokenNorm(RMSNorm):
    """A norm for texts in one row ``[1, T, C]``, each with the weight of its slot.

    Args:
        config: of its model.
        weights: of all slots ``[B, width]``; later changes count.
        slots: of the tokens.
    """

    def __init__(self, config: LlamaConfig, weights: Tensor, slots: TokenSlots) -> None:
        nn.Module.__init__(self)
        self.eps, self.weights, self.slots = config.norm_eps, weights, slots

    def weight_of(self, n: int) -> Tensor:
        """Return the weights of the slots of ``n`` tokens."""
        return self.weights[self.slots.among(n)]


class SlotNorm(RMSNorm):
    """A norm for one token of each slot.

    Args:
        config: of its model.
        weights: of all slots ``[B, width]``; later changes count.
    """

    def __init__(self, config: LlamaConfig, weights: Tensor) -> None:
        nn.Module.__init__(self)
        self.eps, self.weights = config.norm_eps, weights

    def weight_of(self, n: int) -> Tensor:
        """Return the weights of the first ``n`` slots."""
        return self.weights[:n]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x``; its first dimension is the first slots."""
        weights = self.weight_of(len(x))
        weights = weights.view(len(weights), *[1] * (x.dim() - 2), -1)
        return (normalised(x, self.eps) * weights).to(x.dtype)


@dataclass(frozen=True)
class StepNorms:
    """The norms of a step on a CPU: one model's for all of its slots, or each slot's own."""

    wide: Tensor
    """Weights as `normed` takes them, in the order of `Norms.wide`."""
    of_heads: Sequence[Tensor | None]
    """``[H + G, D]`` of each layer, or ``[B, H + G, D]``."""

    @classmethod
    def of(cls, norms: Norms, n_slots: int, config: LlamaConfig) -> StepNorms:
        """Return the norms of the first slots, given those of a model or of several slots."""
        wide, heads, H, G = norms.wide, norms.of_heads, config.n_head, config.n_kv_head
        is_each = wide.dim() == 3
        wide = wide[:, :n_slots] if is_each else torch.cat((wide, torch.zeros_like(wide)), -1)
        if heads is None:
            return cls(wide, [None] * config.n_layer)
        heads = heads[:, :n_slots] if is_each else heads
        return cls(wide, list(heads.repeat_interleave(torch.tensor([H, G]), -2)))


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
