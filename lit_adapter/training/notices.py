"""Warnings about a run that does not learn or whose loss goes wrong, each given once."""

from __future__ import annotations

import math
from typing import Any

from lit_adapter.errors import counted
from lit_adapter.streams import Say

GATES_AFTER = 10
"""Steps after which a gate that is still 0 is reported."""
SAME = 1e-4
"""Share of a loss by which it must change to count as changed."""
NOISE = 0.1
"""Share of a training loss by which it may rise from its first steps to its last ones by chance."""
MEAN_OVER = 20
"""Steps over which the training loss is averaged to compare the run's start with its end."""


class Notices:
    """The warnings given so far, and the losses from the run's start that later ones are compared with."""

    def __init__(self, say: Say, lr: float) -> None:
        self.say, self.lr = say, lr
        self.said: set[str] = set()
        self.first_losses: list[float] = []
        self.last_losses: list[float] = []
        self.first_val: float | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores, so that a resumed run does not repeat a warning."""
        losses = {"first_losses": self.first_losses, "last_losses": self.last_losses}
        return {"said": sorted(self.said), "first_val": self.first_val, **losses}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from the state that a checkpoint has stored."""
        self.said, self.first_val = set(state["said"]), state["first_val"]
        self.first_losses, self.last_losses = state["first_losses"], state["last_losses"]

    def step(self, loss: float, grad_norm: float, step: int) -> None:
        """Check an optimizer step."""
        if not math.isfinite(loss + grad_norm):
            self.say(f"step {step} skipped: loss {loss} or gradient norm {grad_norm} is not finite")
            return
        if len(self.first_losses) < MEAN_OVER:
            self.first_losses.append(loss)
        self.last_losses = [*self.last_losses[-MEAN_OVER + 1 :], loss]
        if loss > 100 * self.first_losses[0]:
            self.once("spike", f"step {step}: the loss jumped to {loss:.3g}; a lower optim.lr may help")

    def gates(self, moved: dict[int, bool], step: int) -> None:
        """Check which layers' gates have moved: a gate of 0 leaves its prompt without effect."""
        if not self.lr or step < GATES_AFTER:  # a rate of 0 has its own warning
            return
        closed = [str(layer) for layer, has_moved in moved.items() if not has_moved]
        if closed:
            every = len(closed) == len(moved)
            which = "every gate is" if every else f"the gates of layers {', '.join(closed)} are"
            self.once(
                "gates",
                f"{which} still 0 after {step} steps, so the prompts there do nothing; "
                f"raise optim.lr (now {self.lr:g}), or find out why steps are skipped",
            )

    def held_out(self, loss: float, step: int) -> None:
        """Check a held-out loss."""
        if self.first_val is None:
            self.first_val = loss
        elif self.lr and step >= MEAN_OVER and abs(loss - self.first_val) < SAME * self.first_val:
            self.once("flat", self._flat(f"held-out loss is {loss:.4f}, where it started,", step))

    def divergence(self, val_loss: float, skipped: int, step: int) -> str | None:
        """Return what is wrong with a run that ends worse than it began, and what to change; else None.

        ``val_loss`` is the last held-out loss; without held-out records the training losses are compared.
        """
        if 2 * skipped > step:
            lost = f"{skipped} of {counted(step, 'step')} were skipped because they were not finite"
            return f"{lost}; lower optim.lr (now {self.lr:g}) or use trainer.precision 32-true"
        before, after = _mean(self.first_losses[:5]), _mean(self.last_losses[-5:])
        if self.first_val is None:
            what, first, last, bound = "training loss", before, after, before * (1 + NOISE)
        else:
            what, first, last = "held-out loss", self.first_val, val_loss
            bound = first * (1 + SAME)
        if last <= bound:
            return None
        advice = f"lower optim.lr (now {self.lr:g})"
        if self.first_val is not None and after < before:
            advice = "the training loss fell: lower optim.epochs, or add records"
        return f"the {what} ended at {last:.4f}, above the {first:.4f} it began with; {advice}"

    def end(self, step: int) -> None:
        """Check the training loss of a whole run without held-out records."""
        if self.first_val is not None or not self.lr or step < 5 * MEAN_OVER:
            return
        first, last = _mean(self.first_losses), _mean(self.last_losses)
        if 0.98 * first < last <= first * (1 + NOISE):
            self.once("flat", self._flat(f"training loss went from {first:.4f} to {last:.4f}", step))

    def _flat(self, what: str, step: int) -> str:
        return f"the {what} after {step} steps; try optim.lr ten times as high (now {self.lr:g})"

    def once(self, key: str, text: str) -> None:
        """Give a warning, unless it has been given."""
        if key not in self.said:
            self.said.add(key)
            self.say(f"warning: {text}")


def _mean(losses: list[float]) -> float:
    return sum(losses) / len(losses) if losses else 0.0
