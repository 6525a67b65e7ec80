"""The learning rate as a function of the step; it has no state to save."""

from __future__ import annotations

import math

from lit_adapter.config import OptimConfig
from lit_adapter.errors import UserError, counted

MOST_STEPS = 9_999_999
"""Names of checkpoints have seven digits, so that the newest is the last by name."""


def total_steps(config: OptimConfig, steps_per_epoch: int) -> int:
    """Return the number of optimizer steps of a run.

    Raises:
        UserError: the epochs make less than one step, or more steps than checkpoint names can number.
    """
    epochs = config.epochs or 0.0
    steps = epochs * steps_per_epoch if config.max_steps is None else config.max_steps
    if steps >= MOST_STEPS + 1:
        key = "epochs" if config.max_steps is None else "max_steps"
        raise UserError(f"optim.{key} makes {steps:,.12g} steps, more than {MOST_STEPS:,}; lower it")
    if steps < 1:
        epoch = counted(steps_per_epoch, "step")
        raise UserError(
            f"optim.epochs is {config.epochs}: less than one step (an epoch has {epoch}); raise it"
        )
    return int(steps)


def warmup_steps(config: OptimConfig, total: int) -> int:
    """Return the warm-up in optimizer steps.

    Raises:
        UserError: the warm-up is longer than the run.
    """
    steps = round(config.warmup * total) if config.warmup < 1 else int(config.warmup)
    if steps > total:
        raise UserError(
            f"optim.warmup is {counted(steps, 'step')}, longer than the run of {total}; "
            "lower it or train longer"
        )
    return steps


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """Return the learning rate of optimizer step ``step`` (counted from 0) of ``total``."""
    warmup = warmup_steps(config, total)
    if step < warmup:
        return config.peak_lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.peak_lr
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    fall = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.peak_lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fall)
