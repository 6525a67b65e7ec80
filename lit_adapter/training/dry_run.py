"""``--dry-run``: a few real optimizer steps and the sample answers, timed, and the time of the whole run."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback

from lit_adapter.data.module import AlpacaDataModule
from lit_adapter.errors import counted
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.streams import Say
from lit_adapter.training.fit import fit, validation_of
from lit_adapter.training.module import LitAdapter
from lit_adapter.training.plan import Plan
from lit_adapter.training.processes import StopOnSignal
from lit_adapter.training.resume import ResumePoint
from lit_adapter.training.run_folder import RunFolder
from lit_adapter.training.samples import Samples

N_TRIED = 3


def try_steps(
    plan: Plan, point: ResumePoint, module: LitAdapter, data: AlpacaDataModule, folder: RunFolder, say: Say
) -> int:
    """Take `N_TRIED` steps, say how long the rest of the run would take, and return the exit status."""
    assistant = AdaptedLlama(module.model, plan.base.tokenizer, plan.template)
    watch = Stopwatch(Samples(assistant, data.val_records, plan.config.trainer))
    fit(plan, module, data, [watch, StopOnSignal()], folder, n_steps=min(N_TRIED, plan.steps))
    if module.signals.agreed:
        say("dry run: stopped by a signal; no run was started")
        return module.signals.exit_status
    validation, repeats = validation_of(plan, point)
    left = range(point.step + (not repeats), plan.steps + 1) if data.val_encoded is not None else ()
    validations = sum(validation.due(step, plan.steps) for step in left)
    # A forward pass as a share of forward and backward, which has no gradients of weights.
    layers = plan.base.config.n_layer
    share = layers / (layers + len(plan.config.adapter.learning_layers(layers)))
    say(forecast(watch, data, max(0, plan.steps - point.step), validations, share))
    if module.skipped_steps:
        say(f"warning: the loss or gradient of {module.skipped_steps} of them was not finite; lower optim.lr")
    say("dry run: no run was started; leave out --dry-run to start it")
    return 0


class Stopwatch(Callback):
    """Records the seconds and tokens of each optimizer step, and the seconds of the sample answers."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.steps: list[tuple[float, int]] = []
        self.sample_seconds = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Note what the step took."""
        self.steps.append((pl_module.step_seconds, int(pl_module.last["tokens"])))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Time the sample answers of one validation."""
        if self.samples.samples and not trainer.should_stop:
            pl_module.eval()
            start = time.perf_counter()
            self.samples.answers(trainer, pl_module)
            self.sample_seconds = time.perf_counter() - start

    @property
    def seconds_per_token(self) -> float:
        """Mean over the steps after the first, which includes the warm-up of the device."""
        timed = self.steps[1:] or self.steps
        return sum(seconds for seconds, _ in timed) / sum(tokens for _, tokens in timed)


def forecast(
    watch: Stopwatch, data: AlpacaDataModule, steps: int, validations: int, forward_share: float
) -> str:
    """Return a line about the time that ``steps`` and ``validations``, with their samples, would take."""
    held_out = int(data.val_encoded.length.sum()) if data.val_encoded is not None else 0
    tokens = steps * data.step_tokens + validations * held_out * forward_share
    total = tokens * watch.seconds_per_token + validations * watch.sample_seconds
    shown = ", ".join(f"{seconds:.2g}" for seconds, _ in watch.steps)
    answers = f"; the sample answers of one took {watch.sample_seconds:.2g} s" if watch.sample_seconds else ""
    return (
        f"time: about {duration(total)} for {counted(steps, 'step')} and "
        f"{counted(validations, 'validation')} ({counted(len(watch.steps), 'step')} took {shown} s: "
        f"{1 / watch.seconds_per_token:,.0f} tokens/s{answers})"
    )


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
