"""Lightning's Trainer, set up for runs that are one pass and do their own validation, saving and sampling."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch

from lit_adapter.config import TrainerConfig
from lit_adapter.training.checkpoint import DurableCheckpointIO
from lit_adapter.training.curves import Curves
from lit_adapter.training.lightning_internals import leave_signals_alone
from lit_adapter.training.report import shows_bar
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
        options: devices, strategy, progress.
        device: of the run.
        precision: resolved, not ``auto``.
        callbacks: of the run.
        curves: the logger, or None for a dry run.
        validates: whether there are held-out records.
        n_steps: number of steps to stop after, or None for the whole run.
    """
    trainer = pl.Trainer(
        accelerator=device.type,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=choose_strategy(options, device),
        precision=precision if "mixed" in precision else "32-true",  # type: ignore[arg-type]
        max_epochs=1,  # the sampler's one pass is the whole run, with all its epochs
        check_val_every_n_epoch=2,  # never: `Validation` does it
        limit_val_batches=None if validates else 0,
        limit_train_batches=n_steps,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=curves if curves is not None else False,
        callbacks=callbacks,
        plugins=[DurableCheckpointIO(), *launcher_plugins()],
        inference_mode=not is_sharded(options),  # weights gathered in it could not be trained with later
        enable_checkpointing=False,
        enable_progress_bar=shows_bar(options) and n_steps is None,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    leave_signals_alone(trainer)
    return trainer


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's hints out of the output; a run prints what a user can act on."""
    names = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*mid-epoch.*")
        # Lightning wraps a model for DDP on another stream than it trains on; torch waits where it must.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
