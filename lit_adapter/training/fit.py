"""Lightning's part of a run: the trainer, its callbacks, and the training itself."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import Logger

from lit_adapter import streams
from lit_adapter.data.module import AlpacaDataModule
from lit_adapter.files.write import write_text
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.model.llama import Llama
from lit_adapter.streams import Say, only_errors_of
from lit_adapter.training.callbacks import BestAdapter, Checkpoints, Validation
from lit_adapter.training.checkpoint import DurableCheckpointIO
from lit_adapter.training.lightning_internals import Bar, leave_signals_alone
from lit_adapter.training.loggers import log_settings, make_logger
from lit_adapter.training.module import LitAdapter
from lit_adapter.training.plan import Plan, write_adapter
from lit_adapter.training.preflight import check_kernels, check_records, enough_memory
from lit_adapter.training.processes import StopOnSignal, last_words, start_processes
from lit_adapter.training.report import Report, shows_bar
from lit_adapter.training.resume import ResumePoint
from lit_adapter.training.run_folder import RunFolder, saved_values
from lit_adapter.training.run_record import RunRecord
from lit_adapter.training.samples import Samples
from lit_adapter.training.sharding import ShardedLitAdapter
from lit_adapter.training.signals import Signals
from lit_adapter.training.strategy import choose_strategy, is_sharded, launcher_plugins


def make_module(plan: Plan, model: Llama, signals: Signals) -> LitAdapter:
    """Return what Lightning trains."""
    config, dtype = plan.config, plan.placement.dtype
    arguments = (model, config.optim, plan.steps, config.seed, signals)
    recompute = config.trainer.recompute
    if is_sharded(config.trainer):
        return ShardedLitAdapter(
            *arguments,
            base=plan.base.folder,
            dtype=dtype,
            whole_layers=plan.needed.whole_layers,
            recompute=recompute,
        )
    return LitAdapter(*arguments, recompute=recompute)


def train(point: ResumePoint, module: LitAdapter, record: RunRecord, say: Say) -> pl.Trainer:
    """Train from the resume point to the last step, or until a signal; return the trainer."""
    plan, data, folder = record.plan, record.data, record.folder
    options = plan.config.trainer
    validation, repeats = validation_of(plan, point)
    assistant = AdaptedLlama(module.model, plan.base.tokenizer, plan.template)

    def begin_writing() -> None:
        folder.set_aside(point.step, say)
        write_text(folder.config, yaml.safe_dump(saved_values(plan.config), sort_keys=False))

    callbacks: list[pl.Callback] = [
        record,
        Report(options, say, record.notices, redraw=repeats),
        BestAdapter(folder, partial(write_adapter, plan, make_folder=False)),
        Samples(assistant, data.val_records, options),
        StopOnSignal(),  # before the checkpoints: a stop is saved at once
        Checkpoints(folder, asdict(plan.identity), options, begin_writing),
    ]
    if data.val_packer is not None:
        callbacks.append(validation)  # after the checkpoint of its step
    if shows_bar(options):
        callbacks.insert(0, Bar(leave=True))
    drawn_from = point.step + (not repeats) if point.path else None
    logger = make_logger(options.logger, folder.path, drawn_from, say)
    settings = saved_values(plan.config)
    callbacks.append(LambdaCallback(on_train_start=lambda trainer, _: log_settings(trainer.logger, settings)))
    return fit(plan, module, data, callbacks, folder, logger=logger, point=point)


def validation_of(plan: Plan, point: ResumePoint) -> tuple[Validation, bool]:
    """Return when a run validates, and whether a kill cut off the validation of the resume point's step.

    That step is then validated again, and its curves are drawn again.
    """
    validation = Validation(plan.config.trainer.val_every or plan.steps)
    return validation, validation.due(point.step, plan.steps) and not point.is_validated


def fit(
    plan: Plan,
    module: LitAdapter,
    data: AlpacaDataModule,
    callbacks: list[pl.Callback],
    folder: RunFolder,
    *,
    logger: Logger | None = None,
    point: ResumePoint | None = None,
    n_steps: int | None = None,
) -> pl.Trainer:
    """Check the first records, then train with Lightning, and return the trainer.

    Training starts at ``point``, by default at step 0, and stops after ``n_steps``, by default at the run's
    end. Once it has started, a signal waits for the end of the step.

    Raises:
        UserError: a loss that is not finite, too little memory, or a file that cannot be written.
        Interrupted: a signal before training.
    """
    options, placement = plan.config.trainer, plan.placement
    if is_sharded(options):
        # The base is loaded once the processes are connected.
        first = LambdaCallback(on_fit_start=lambda *_: check_records(module.model, data, plan.needed))
        callbacks = [first, *callbacks]
    else:
        if placement.executor.name == "fused":
            check_kernels(module.model, data, plan.needed)
        check_records(module.model, data, plan.needed)
    module.signals.only_note()
    start_processes(options, placement.device, partial(_end_with_dead_process, folder, module.signals))
    trainer = _trainer(
        plan,
        callbacks,
        logger=logger or False,
        limit_train_batches=n_steps,
        limit_val_batches=None if data.val_packer is not None else 0,
        enable_progress_bar=shows_bar(options) and n_steps is None,
    )
    # At step 0 there is nothing to restore: it follows from seed and initial adapter.
    checkpoint = str(point.path) if point is not None and point.step else None
    with last_words(several=trainer.world_size > 1), enough_memory(plan.needed):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return trainer


def _trainer(plan: Plan, callbacks: list[pl.Callback], **more: Any) -> pl.Trainer:
    """Return Lightning's trainer; what it would do about validation, saving and signals, the callbacks do."""
    options, placement = plan.config.trainer, plan.placement
    trainer = pl.Trainer(
        accelerator=placement.device.type,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=choose_strategy(options, placement.device),
        precision=placement.precision if "mixed" in placement.precision else "32-true",  # type: ignore[arg-type]
        max_epochs=1,  # the sampler's one pass is the whole run, with all its epochs
        check_val_every_n_epoch=2,  # never: `Validation` does it
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=callbacks,
        plugins=[DurableCheckpointIO(), *launcher_plugins()],
        inference_mode=not is_sharded(options),  # weights gathered in it could not be trained with later
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **more,
    )
    leave_signals_alone(trainer)
    return trainer


def _end_with_dead_process(folder: RunFolder, signals: Signals, sentence: str) -> None:
    """Name the process that has died, and end this one at once, even inside a collective; others follow."""
    saved = folder.saved()
    rest = f"{saved[-1]} is complete, --resume last continues" if saved else "nothing is saved yet"
    folder.close()
    streams.say(f"error: {sentence}; the run ends; {rest}", sys.stderr)
    os._exit(signals.exit_status or 1)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's hints out of the output; a run prints what a user can act on."""
    loggers = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")
    with only_errors_of(*loggers), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*mid-epoch.*")
        # Lightning wraps a model for DDP on a different stream than it trains on; torch waits where it must.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match.*")
        yield
