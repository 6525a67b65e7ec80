"""``--dry-run``: a few real optimizer steps, timed, and what the whole run would take by them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer

from lit_adapter.data.module import AlpacaDataModule
from lit_adapter.errors import counted
from lit_adapter.training.module import LitAdapter

N_TRIED = 3


class Stopwatch(Callback):
    """Notes seconds and tokens of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, int]] = []
        self.since = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self.since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it; the step has read its loss, so the device is done."""
        self.steps.append((time.perf_counter() - self.since, int(pl_module.last["tokens"])))

    @property
    def seconds_per_token(self) -> float:
        """Of the steps after the first, which also warms up."""
        timed = self.steps[1:] or self.steps
        return sum(seconds for seconds, _ in timed) / sum(tokens for _, tokens in timed)


def foretell(
    trainer: Trainer,
    module: LitAdapter,
    data: AlpacaDataModule,
    to_do: tuple[int, int],
    say: Callable[[str], None],
) -> int:
    """Say what a run would take, from the first steps that were tried, and return the exit status.

    Args:
        trainer: one that has taken `N_TRIED` steps beside a `Stopwatch`.
        module: of the run.
        data: of the run.
        to_do: optimizer steps and validations that the run has still before it.
        say: gets the lines.
    """
    watch = next(callback for callback in trainer.callbacks if isinstance(callback, Stopwatch))  # type: ignore[attr-defined]
    say(forecast(watch, data, *to_do, _forward_share(module)))
    if module.skipped_steps:
        say(f"warning: the loss or gradient of {module.skipped_steps} of them was not finite; lower optim.lr")
    say("dry run: no run was begun; start without --dry-run")
    return 0


def _forward_share(module: LitAdapter) -> float:
    """Return the cost of a forward pass as a share of forward and backward (no weight gradients)."""
    layers = module.model.layers
    adapted = sum(layer.self_attn.prefix is not None for layer in layers)
    return len(layers) / (len(layers) + adapted)


def forecast(
    watch: Stopwatch, data: AlpacaDataModule, steps: int, validations: int, forward_share: float
) -> str:
    """Return a line about the time that ``steps`` and ``validations`` take."""
    step_tokens = data.batch_size * float(data.train_encoded.length.mean())
    held_out = int(data.val_encoded.length.sum()) if data.val_encoded is not None else 0
    tokens = steps * step_tokens + validations * held_out * forward_share
    shown = ", ".join(f"{seconds:.2g}" for seconds, _ in watch.steps)
    return (
        f"time: about {duration(tokens * watch.seconds_per_token)} for {counted(steps, 'step')} and "
        f"{counted(validations, 'validation')} ({counted(len(watch.steps), 'step')} took {shown} s: "
        f"{1 / watch.seconds_per_token:,.0f} tokens/s; "
        "sample answers are not counted)"
    )


def duration(seconds: float) -> str:
    """Return a time as people read it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
