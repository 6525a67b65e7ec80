"""How long a run is and how often it validates, if the user has not said so."""

from __future__ import annotations

import math
from dataclasses import replace

from lit_adapter.config import Config, OptimConfig
from lit_adapter.errors import counted
from lit_adapter.training.run_identity import RunIdentity

ENOUGH_STEPS = 100
"""Fewest optimizer steps of a run whose length is chosen here, if its records suffice."""
BATCH_SIZES = (64, 32, 16, 8, 4)
SMALL_STEPS = 16
"""Records of a step below which the default learning rate is halved (docs/learning.md)."""
LEAST_EPOCHS, MOST_EPOCHS = 3, 8
"""Bounds of the chosen epochs."""
FEW_STEPS = 50
"""A run with fewer steps gets a warning."""
LEAST_VAL_EVERY = 10
"""Fewest steps between validations: each of them also answers the samples."""


def chosen_batch_size(n_records: int, epochs: float | None = None, least: int = 1) -> int:
    """Return the records per step: as many as leave enough steps.

    Small steps come before more epochs: with few records, steps of 4 or 8 in three epochs gave as many right
    answers as steps of 32 in eight, and a lower held-out loss on free text (docs/learning.md).

    Args:
        n_records: of the training data.
        epochs: if the user has set them.
        least: processes, each of which needs a record.
    """
    wanted = ENOUGH_STEPS / (epochs or LEAST_EPOCHS)
    found = next((size for size in BATCH_SIZES if n_records // size >= wanted), BATCH_SIZES[-1])
    return max(1, min(n_records, max(least, found)))


def chosen_epochs(n_records: int, batch_size: int) -> float:
    """Return the passes over ``n_records`` that make enough steps of ``batch_size`` records."""
    steps_per_epoch = max(1, n_records // batch_size)
    return float(min(MOST_EPOCHS, max(LEAST_EPOCHS, math.ceil(ENOUGH_STEPS / steps_per_epoch))))


def with_length(
    config: Config, n_records: int, saved: RunIdentity, n_processes: int = 1
) -> tuple[Config, str]:
    """Return the configuration with batch size and epochs, and a phrase about what was chosen, if anything.

    A resumed run keeps what its checkpoint has, ``saved``. ``optim.max_steps`` needs no epochs.
    """
    optim = config.optim
    kept: list[str] = []
    chosen: list[str] = []
    batch_size, epochs = optim.batch_size, optim.epochs
    if batch_size is None:
        batch_size = saved.identity.get("optim.batch_size")
        (kept if batch_size else chosen).append("batch_size")
        batch_size = batch_size or chosen_batch_size(n_records, epochs, n_processes)
    if epochs is None:
        epochs = saved.changeable.get("optim.epochs")
        if optim.max_steps is None:
            (kept if epochs else chosen).append("epochs")
            epochs = epochs or chosen_epochs(n_records, batch_size)
    lr = _rate(optim, batch_size, saved)
    config = replace(config, optim=replace(optim, batch_size=batch_size, epochs=epochs, lr=lr))
    parts = ((kept, "as in the resumed run"), (chosen, f"chosen for {counted(n_records, 'record')}"))
    return config, ", ".join(f"{' and '.join(names)} {why}" for names, why in parts if names)


def _rate(optim: OptimConfig, batch_size: int, saved: RunIdentity) -> float | None:
    """Return the learning rate: half the default for small steps, unless a resumed run began without that."""
    is_given = optim.lr is not None or optim.base_lr is not None
    began_without = bool(saved.changeable) and saved.changeable.get("optim.lr") is None
    return optim.lr if is_given or batch_size >= SMALL_STEPS or began_without else optim.peak_lr / 2


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
    few = f"{counted(steps, 'step')} may be too few to learn from, {ENOUGH_STEPS} are usually enough"
    if config.optim.max_steps is not None:
        return f"{few}; raise optim.max_steps"
    batch_size = chosen_batch_size(n_records)
    epochs = chosen_epochs(n_records, batch_size)
    if epochs * (n_records // batch_size) <= steps:
        return f"{few}; add records"
    return f"{few}; try optim.batch_size {batch_size} and optim.epochs {epochs:g}"
