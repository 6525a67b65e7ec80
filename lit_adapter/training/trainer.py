"""Lightning's Trainer as runs use it: one pass, our own validations, checkpoints and samplers."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from lit_adapter.config import TrainerConfig
from lit_adapter.training.callbacks import shows_bar
from lit_adapter.training.checkpoint import DurableCheckpointIO
from lit_adapter.training.curves import Curves
from lit_adapter.training.strategy import choose_strategy, is_sharded, launcher_plugins


def make_trainer(
    options: TrainerConfig,
    device: torch.device,
    precision: str,
    callbacks: list[pl.Callback],
    curves: Curves | None,
    validates: bool,
    n_steps: int | None = None,
) -> pl.Trainer:
    """Return a trainer for one run.

    Args:
        options: devices, strategy, how often it reports.
        device: of the run.
        precision: as it was resolved: never auto.
        callbacks: what happens around the steps.
        curves: the logger; None for a trial that draws nothing.
        validates: whether there are held-out records.
        n_steps: stop after so many; None for the whole run.
    """
    return pl.Trainer(
        accelerator=device.type,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=choose_strategy(options, device),
        precision=precision if "mixed" in precision else "32-true",  # type: ignore[arg-type]
        max_epochs=1,  # our sampler's one pass is the whole run, all epochs in it
        check_val_every_n_epoch=2,  # never: our own callback validates
        limit_val_batches=None if validates else 0,
        limit_train_batches=n_steps,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=curves if curves is not None else False,
        callbacks=callbacks,
        plugins=[DurableCheckpointIO(), *launcher_plugins()],
        inference_mode=not is_sharded(options),  # what it gathers then could not be trained with later
        enable_checkpointing=False,
        enable_progress_bar=shows_bar(options) and n_steps is None,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
