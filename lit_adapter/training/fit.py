"""Lightning's part of a run: the trainer, what happens around its steps, and the steps themselves."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import lightning.pytorch as pl

from lit_adapter.data.module import AlpacaDataModule
from lit_adapter.files.write import write_text
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.model.llama import Llama
from lit_adapter.training.adapter_writer import write_adapter
from lit_adapter.training.callbacks import BestAdapter, Checkpoints, Validation
from lit_adapter.training.curves import Curves
from lit_adapter.training.lightning_internals import Bar
from lit_adapter.training.module import LitAdapter
from lit_adapter.training.plan import Plan
from lit_adapter.training.preflight import FirstRecords, check_records, enough_memory
from lit_adapter.training.processes import StopOnSignal, end_run, last_words, start_processes
from lit_adapter.training.report import Report, shows_bar
from lit_adapter.training.resume import ResumePoint, Say
from lit_adapter.training.run_folder import RunFolder, saved_config
from lit_adapter.training.samples import Samples
from lit_adapter.training.sharding import ShardedLitAdapter
from lit_adapter.training.signals import Signals
from lit_adapter.training.strategy import is_sharded
from lit_adapter.training.trainer import make_trainer


def make_module(plan: Plan, model: Llama, signals: Signals) -> LitAdapter:
    """Return what Lightning trains."""
    config, dtype = plan.config, plan.placement.dtype
    arguments = (model, config.optim, plan.steps, config.seed, signals)
    recompute = config.trainer.recompute
    if is_sharded(config.trainer):
        return ShardedLitAdapter(*arguments, base=plan.base.folder, dtype=dtype, recompute=recompute)
    return LitAdapter(*arguments, recompute=recompute)


def train(
    plan: Plan,
    point: ResumePoint,
    module: LitAdapter,
    data: AlpacaDataModule,
    folder: RunFolder,
    signals: Signals,
    say: Say,
) -> pl.Trainer:
    """Train from the resume point to the last step, or until a signal; return the trainer."""
    options = plan.config.trainer
    validation, repeats = validation_of(plan, point)
    assistant = AdaptedLlama(module.model, plan.base.tokenizer, plan.template)

    def begin_writing() -> None:
        folder.set_aside(point.step, say)
        write_text(folder.config, saved_config(plan.config))

    callbacks: list[pl.Callback] = [
        Report(options, say, lr=plan.config.optim.peak_lr, redraw=repeats),
        BestAdapter(folder.best, partial(write_adapter, plan)),
        Samples(assistant, data.val_records, options, signals),
        StopOnSignal(signals),  # before the checkpoints: a stop is saved at once
        Checkpoints(folder, asdict(plan.identity), options, begin_writing),
    ]
    if data.val_packer is not None:
        callbacks.append(validation)  # after the checkpoint of its step
    if shows_bar(options):
        callbacks.insert(0, Bar(leave=True))
    curves = Curves(folder.path, point.step + (not repeats) if point.path else None, say)
    return fit(plan, module, data, callbacks, folder, signals, curves=curves, point=point)


def validation_of(plan: Plan, point: ResumePoint) -> tuple[Validation, bool]:
    """Return when a run validates, and whether a kill cut off the validation of the resume point's step.

    That step is then validated again, and what was drawn at it is drawn again.
    """
    validation = Validation(plan.config.trainer.val_every or max(1, plan.steps // 10))
    return validation, validation.due(point.step, plan.steps) and not point.is_validated


def fit(
    plan: Plan,
    module: LitAdapter,
    data: AlpacaDataModule,
    callbacks: list[pl.Callback],
    folder: RunFolder,
    signals: Signals,
    *,
    curves: Curves | None = None,
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
        callbacks = [FirstRecords(data, plan.needed), *callbacks]
    else:
        check_records(module.model, data, plan.needed)
    signals.only_note()
    start_processes(options, placement.device, partial(_end_with_dead_process, folder, signals))
    validates = data.val_packer is not None
    trainer = make_trainer(
        options, placement.device, placement.precision, callbacks, curves, validates, n_steps
    )
    # At step 0 there is nothing to restore: it follows from seed and initial adapter.
    checkpoint = str(point.path) if point is not None and point.step else None
    with last_words(several=trainer.world_size > 1), enough_memory(plan.needed):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return trainer


def _end_with_dead_process(folder: RunFolder, signals: Signals, sentence: str) -> None:
    """Name the process that has died, and end this one, which may be waiting for it."""
    newest = max(folder.checkpoints.glob("step-*.ckpt"), default=None)
    rest = f"{newest} is complete, --resume last continues" if newest else "nothing is saved yet"
    folder.close()
    end_run(f"{sentence}; the run ends; {rest}", signals.exit_status or 1)
