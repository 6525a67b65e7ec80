"""Words of warning: a run that does not learn, or whose numbers go wrong, is told so once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

GATES_AFTER = 10
"""Steps after which a gate that is still 0 is worth a word."""
MEAN_OVER = 20
"""Steps whose mean training loss is compared, where no records are held out."""


class Notices:
    """What has been said, and the numbers from the run's start that later ones are compared with."""

    def __init__(self, say: Callable[[str], None], lr: float) -> None:
        self.say, self.lr = say, lr
        self.said: set[str] = set()
        self.first_losses: list[float] = []
        self.last_losses: list[float] = []
        self.first_val: float | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: a resumed run does not say it again."""
        losses = {"first_losses": self.first_losses, "last_losses": self.last_losses}
        return {"said": sorted(self.said), "first_val": self.first_val, **losses}

    def load(self, state: dict[str, Any]) -> None:
        """Take up what an earlier part of the run has said and seen."""
        self.said, self.first_val = set(state["said"]), state["first_val"]
        self.first_losses, self.last_losses = state["first_losses"], state["last_losses"]

    def step(self, loss: float, grad_norm: float, step: int) -> None:
        """Look at an optimizer step."""
        if not math.isfinite(loss + grad_norm):
            self.say(f"step {step} skipped: loss {loss} or gradient norm {grad_norm} is not finite")
            return
        if len(self.first_losses) < MEAN_OVER:
            self.first_losses.append(loss)
        self.last_losses = [*self.last_losses[-MEAN_OVER + 1 :], loss]
        if loss > 100 * self.first_losses[0]:
            self.once("spike", f"step {step}: the loss jumped to {loss:.3g}; a lower optim.lr may help")

    def gates(self, moved: dict[int, bool], step: int) -> None:
        """Look at which layers' gates have moved: one that stays 0 leaves its prompt without effect."""
        if not self.lr or step < GATES_AFTER:  # a rate of 0 has been named as the cause
            return
        shut = [str(layer) for layer, has_moved in moved.items() if not has_moved]
        if shut:
            which = (
                "every gate is" if len(shut) == len(moved) else f"the gates of layers {', '.join(shut)} are"
            )
            self.once(
                "gates",
                f"{which} still 0 after {step} steps, so the prompts there do nothing; "
                f"raise optim.lr (now {self.lr:g}), or see why steps are skipped",
            )

    def held_out(self, loss: float, step: int) -> None:
        """Look at a held-out loss."""
        if self.first_val is None:
            self.first_val = loss
        elif self.lr and step >= MEAN_OVER and abs(loss - self.first_val) < 1e-4 * self.first_val:
            self.once("flat", self._flat(f"held-out loss is {loss:.4f}, where it started,", step))

    def end(self, step: int) -> None:
        """Look at the training loss, where no records are held out."""
        if self.first_val is not None or not self.lr or step < 5 * MEAN_OVER:
            return
        first, last = (sum(losses) / len(losses) for losses in (self.first_losses, self.last_losses))
        if last > 0.98 * first:
            self.once("flat", self._flat(f"training loss went from {first:.4f} to {last:.4f}", step))

    def _flat(self, what: str, step: int) -> str:
        return f"the {what} after {step} steps; try optim.lr ten times as high (now {self.lr:g})"

    def once(self, key: str, text: str) -> None:
        """Say it, unless it has been said."""
        if key not in self.said:
            self.said.add(key)
            self.say(f"warning: {text}")
