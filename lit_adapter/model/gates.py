"""The gate forms: how a raw gate g becomes c(g), the strength that scales the prefix branch.

A form says along which of attention head, prompt token and channel its gates differ, and whether tanh bounds
them. Modules, kernels, the adapter file and the formats of other code bases all read this table; it needs
no torch to import, because command lines list its names.

Letters: H query heads, K prompt length, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

GateName = Literal["tanh", "identity", "layer", "channel", "token"]


@dataclass(frozen=True)
class GateForm:
    """One gate form; ``description`` is for people."""

    description: str
    per_head: bool = False
    per_token: bool = False
    per_channel: bool = False
    bounded: bool = False
    """Whether c is tanh; otherwise c(g) = g."""

    def axes(self, n_head: int, prompt_length: int, head_dim: int) -> tuple[int, int, int]:
        """Return the shape of c(g): ``(H or 1, K or 1, D or 1)``."""
        return (
            n_head if self.per_head else 1,
            prompt_length if self.per_token else 1,
            head_dim if self.per_channel else 1,
        )

    def shape(self, n_head: int, prompt_length: int, head_dim: int) -> tuple[int]:
        """Return the shape of one layer's raw gate, a vector."""
        return (math.prod(self.axes(n_head, prompt_length, head_dim)),)

    def strength(self, gate: Tensor, axes: tuple[int, int, int]) -> Tensor:
        """Return c(g) as ``[..., *axes]`` of raw gates ``[..., n]``."""
        return (gate.tanh() if self.bounded else gate).view(*gate.shape[:-1], *axes)

    def gradient(self, strength: Tensor, dstrength: Tensor) -> Tensor:
        """Return the gradient of the raw gate ``[n]``.

        Args:
            strength: c(g), ``[H or 1, K or 1, D or 1]``.
            dstrength: the gradient of c(g) for every entry of a shape that ``strength`` broadcasts to.
        """
        shared = [axis for axis, size in enumerate(strength.shape) if size < dstrength.shape[axis]]
        dgate = dstrength.sum(shared, keepdim=True) if shared else dstrength
        if not self.bounded:
            return dgate.flatten()
        import torch

        return torch.ops.aten.tanh_backward(dgate, strength).flatten()

    def raw(self, strength: Tensor) -> Tensor:
        """Return the raw gate ``[n]`` whose c(g) is ``strength``; not finite where no gate reaches it."""
        return (strength.atanh() if self.bounded else strength).flatten()


GATE_FORMS: dict[GateName, GateForm] = {
    "tanh": GateForm("tanh per head", per_head=True, bounded=True),
    "identity": GateForm("identity per head", per_head=True),
    "layer": GateForm("identity per layer"),
    "channel": GateForm("identity per channel", per_head=True, per_channel=True),
    "token": GateForm("identity per head and prompt token", per_head=True, per_token=True),
}
