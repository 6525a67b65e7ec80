"""How long a run is, and how often it validates, where the user has not said."""

from __future__ import annotations

import math
from dataclasses import replace

from lit_adapter.config import Config
from lit_adapter.errors import counted
from lit_adapter.training.run_identity import RunIdentity

ENOUGH_STEPS = 100
"""Optimizer steps that the chosen epochs aim at."""
LEAST_EPOCHS, MOST_EPOCHS = 3, 15
"""Bounds of the chosen epochs."""
FEW_STEPS = 50
"""A run with fewer steps gets a warning."""
LEAST_VAL_EVERY = 10
"""Fewest steps between validations: each of them also answers the samples."""


def chosen_epochs(n_records: int, batch_size: int) -> float:
    """Return the passes over ``n_records`` that make enough steps of ``batch_size`` records."""
    steps_per_epoch = max(1, n_records // batch_size)
    return float(min(MOST_EPOCHS, max(LEAST_EPOCHS, math.ceil(ENOUGH_STEPS / steps_per_epoch))))


def with_epochs(config: Config, n_records: int, saved: RunIdentity) -> tuple[Config, str]:
    """Return the configuration with its epochs, and why they were chosen; "" if the user has set the length.

    A resumed run keeps the epochs that its checkpoint has, ``saved``. ``optim.max_steps`` needs none.
    """
    optim = config.optim
    if optim.epochs is not None:
        return config, ""
    epochs, why = saved.changeable.get("optim.epochs"), "as the resumed run"
    if epochs is None and optim.max_steps is None:
        epochs, why = chosen_epochs(n_records, optim.batch_size), f"chosen for {counted(n_records, 'record')}"
    config = replace(config, optim=replace(optim, epochs=epochs))
    return config, why if optim.max_steps is None else ""


def with_val_every(config: Config, steps: int, saved: RunIdentity) -> Config:
    """Return the configuration with its ``trainer.val_every``, by default a tenth of the ``steps``.

    A resumed run of the same length validates after the same steps as before.
    """
    if config.trainer.val_every is not None:
        return config
    every = saved.changeable.get("trainer.val_every") if saved.steps == steps else None
    every = every or max(LEAST_VAL_EVERY, steps // 10)
    return replace(config, trainer=replace(config.trainer, val_every=every))


def few_steps(config: Config, steps: int, n_records: int) -> str | None:
    """Return a warning about a run of so few steps that it can hardly learn, with what to change."""
    if steps >= FEW_STEPS:
        return None
    optim = config.optim
    longer = chosen_epochs(n_records, optim.batch_size)
    steps_then = int(longer * (n_records // optim.batch_size))
    if optim.max_steps is not None:
        advice = "raise optim.max_steps"
    elif steps_then >= FEW_STEPS:
        advice = f"optim.epochs {longer:g} makes them {steps_then}"
    else:
        smaller = max(1, n_records // math.ceil(ENOUGH_STEPS / MOST_EPOCHS))
        advice = f"try optim.batch_size {smaller} with optim.epochs {MOST_EPOCHS}, or add records"
    few = f"{counted(steps, 'step')} may be too few to learn from, {ENOUGH_STEPS} are usually enough"
    return f"{few}; {advice}"
