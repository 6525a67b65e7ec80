"""Settings of LoRA. No torch: command lines read them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lit_adapter.errors import UserError, nearest

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
GROUPS["all"] = GROUPS["attention"] + GROUPS["mlp"]
MOST_RANK = 1024
"""Above any rank in use; a larger one is a typing error."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates of frozen linear layers (arXiv 2106.09685).

    Raises:
        UserError: a value out of its range.
    """

    rank: int = 0
    """Rank r of the updates; 0: no LoRA."""
    alpha: float | None = None
    """The updates are multiplied by alpha / rank; null: twice the rank."""
    on: tuple[str, ...] = ("all",)
    """The linear layers of every block that have an update: any of q_proj, k_proj, v_proj, o_proj, gate_proj,
    up_proj and down_proj, or attention, mlp, all."""
    dropout: float = 0.0
    """Dropout on the input of the updates while training."""
    rank_stabilised: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "on", tuple(self.on))  # a list in files
        if not 0 <= self.rank <= MOST_RANK:
            raise UserError(f"adapter.lora.rank is {self.rank}; expected 0 to {MOST_RANK}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise UserError(f"adapter.lora.alpha is {self.alpha}; expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter.lora.dropout is {self.dropout}; expected 0 or more and below 1")
        known = [*GROUPS["all"], *GROUPS]
        for name in self.on:
            if name not in known:
                hint = nearest(name, known) or f"; expected {', '.join(known)}"
                raise UserError(f"adapter.lora.on has no layer '{name}'{hint}")
        if not self.on:
            raise UserError("adapter.lora.on is empty; name the layers, or all")
        others = (self.alpha, self.on, self.dropout, self.rank_stabilised)
        if self.rank == 0 and others != (None, ("all",), 0.0, False):
            raise UserError("adapter.lora has settings, but adapter.lora.rank is 0; set the rank")

    @property
    def scale(self) -> float:
        """The factor of the updates; 0 without LoRA."""
        if self.rank == 0:
            return 0.0
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def layers(self) -> frozenset[str]:
        """The last components of the names of the layers that have an update."""
        return frozenset(layer for name in self.on for layer in GROUPS.get(name, (name,)))
