"""A fine-tuning run, from its configuration to its adapter file."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_adapter.config import Config, with_learning_rate
from lit_adapter.data.module import AlpacaDataModule
from lit_adapter.data.summary import describe
from lit_adapter.device import choose_device, choose_dtype, own_device
from lit_adapter.errors import UserError, counted
from lit_adapter.files.write import write_text
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.model.adapter import adapter_shapes, adapter_state, attach, load_adapter_state
from lit_adapter.model.llama import Llama
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template
from lit_adapter.text.tokenizer import check_vocabulary
from lit_adapter.training.adapter_writer import AdapterWriter
from lit_adapter.training.callbacks import BestAdapter, Checkpoints, Validation
from lit_adapter.training.curves import Curves
from lit_adapter.training.dry_run import N_TRIED, Stopwatch, foretell
from lit_adapter.training.lightning_internals import Bar, rank
from lit_adapter.training.memory import unfused_because
from lit_adapter.training.module import LitAdapter
from lit_adapter.training.plan import announce
from lit_adapter.training.preflight import FirstRecords, Sizes, check_records, check_space, enough_memory
from lit_adapter.training.processes import StopOnSignal, end_run, follow, last_words, start_processes
from lit_adapter.training.report import Report, shows_bar
from lit_adapter.training.resume import Beginning, find_beginning, is_written, saved_identity
from lit_adapter.training.run_folder import RunFolder, changeable, identity, plain, saved_config
from lit_adapter.training.samples import Samples
from lit_adapter.training.schedule import total_steps, warmup_steps
from lit_adapter.training.sharding import ShardedLitAdapter, check_heads
from lit_adapter.training.signals import Signals
from lit_adapter.training.start import Start, read_start
from lit_adapter.training.strategy import check_layout, is_sharded
from lit_adapter.training.trainer import make_trainer, quiet_lightning
from lit_adapter.weights.adapter_file import base_identity
from lit_adapter.weights.base_folder import read_config
from lit_adapter.weights.load import empty_base, load_base

Say = Callable[[str], None]


def finetune(
    config: Config,
    resume: str | None = None,
    say: Say = print,
    signals: Signals | None = None,
    *,
    dry_run: bool = False,
) -> int:
    """Train an adapter.

    Args:
        config: the run.
        resume: ``last``, or a checkpoint file of the run.
        say: gets each line worth printing; the first process alone speaks.
        signals: handlers that are set already; by default they are set here.
        dry_run: say what the run would do, try three steps, and leave nothing in the run folder.

    Returns:
        The exit status: 0, or 143 / 130 / 0 after SIGTERM / SIGINT / SIGUSR1.

    Raises:
        UserError: anything the user can put right.
        Interrupted: a signal before training, where there is nothing to save.
    """
    folder = RunFolder(Path(config.out))
    if signals is None:
        signals = Signals()
        signals.install()
    try:
        with quiet_lightning():
            if rank() > 0:
                other = partial(_run, config, folder, signals, _say_nothing, resume, dry_run)
                return follow(other, signals)
            if dry_run:
                folder.check(resume=resume is not None)
                return _run(config, folder, signals, say, resume, dry_run)
            folder.open(resume=resume is not None)
            try:
                return _run(config, folder, signals, say, resume, dry_run)
            finally:
                folder.close()
    finally:
        signals.restore()


def _run(
    config: Config, folder: RunFolder, signals: Signals, say: Say, resume: str | None, dry_run: bool
) -> int:
    return _Run(config, folder, signals, say, resume).train(resume, dry_run=dry_run)


class _Run:
    """The parts of a run, put together once."""

    def __init__(
        self, config: Config, folder: RunFolder, signals: Signals, say: Say, resume: str | None
    ) -> None:
        self.config = config = with_learning_rate(config)
        self.folder, self.signals, self.say = folder, signals, say
        self.base = Path(config.base)
        self.base_config = read_config(self.base)
        config.adapter.adapted_layers(self.base_config.n_layer)
        if config.data.max_length > self.base_config.context_length:
            raise UserError(
                f"data.max_length is {config.data.max_length}, but the base's context is "
                f"{self.base_config.context_length}; lower it"
            )
        self.device = choose_device(config.trainer.accelerator)
        check_layout(config.trainer, self.device)
        if self.device.type == "cuda":  # kernels go to the current device, also before Lightning sets it
            torch.cuda.set_device(own_device(self.device))
        check_heads(config.trainer, self.base_config)
        self.saved = saved_identity(resume, folder) if resume is not None else {}
        self.precision = self._precision()
        self.unfused = self._why_unfused()
        self.tokenizer = load_tokenizer(self.base)
        check_vocabulary(self.tokenizer, self.base_config.vocab_size)
        self.template = resolve_template(config.data.template, self.tokenizer)
        self.identity = base_identity(self.base)
        self.start = self._start()
        self._writer = AdapterWriter(config, self.identity, self.base_config, self.template)

    def _start(self) -> Start:
        """Return the adapter that `init_from` names, having seen that it fits this run."""
        if self.config.init_from is None:
            return Start()
        path, saved = Path(self.config.init_from), self.saved.get("init_from")
        form, model = self.config.adapter, self.base_config
        return read_start(path, self.base, form, model, self.template, saved, self.say)

    def _precision(self) -> str:
        """Resolve auto: as the resumed run did, else by measuring."""
        wanted = self.config.trainer.precision
        if wanted != "auto":
            return wanted
        if "precision" in self.saved:
            self.say(f"precision: {self.saved['precision']}, as the run that is resumed has it")
            return str(self.saved["precision"])
        found = "bf16-true" if choose_dtype(None, self.device) == torch.bfloat16 else "32-true"
        self.say(
            f"precision: {found}, the faster one on this {self.device.type}; adapter and optimizer in fp32"
        )
        return found

    def _why_unfused(self) -> str | None:
        """Return why a GPU will not compute the layers with the kernels made for it, if so."""
        if self.device.type != "cuda":
            return None
        options = self.config.trainer
        why = unfused_because(self.base_config, self.config.adapter, self.precision, options.tensor_parallel)
        if why is not None and options.base_precision == "fp8":
            raise UserError(f"trainer.base_precision is fp8, but {why}; use base_precision full")
        return why

    def train(self, resume: str | None, *, dry_run: bool = False) -> int:
        """Train from the start or from a checkpoint."""
        config, start = self.config, time.perf_counter()
        data = self._data()
        steps = total_steps(config.optim, data.training_steps().steps_per_epoch)
        warmup_steps(config.optim, steps)
        data.total_steps = steps
        for line in describe(data, color=sys.stdout.isatty()):
            self.say(line)
        record = self._record(data, steps)
        begin = Beginning()
        if resume is not None:
            shapes = adapter_shapes(config.adapter, self.base_config)
            begin = find_beginning(resume, self.folder, record, shapes, self.say)
        if begin.step >= steps and is_written(self.folder.adapter, begin.path):
            self.say(f"{self.folder.path}: already complete, {counted(begin.step, 'step')}; nothing to do")
            return 0
        needed = check_space(config, self.base_config, data, steps, self.precision, self.device, self.say)
        model = self._model(self.start.tensors(begin.path))
        first: list[pl.Callback] = []
        if is_sharded(config.trainer):
            first.append(FirstRecords(data, needed))
        else:
            check_records(model, data, needed)
        module = self._module(model, steps)
        validation = Validation(config.trainer.val_every or max(1, steps // 10))
        # A validation that a kill cut off is repeated: what was drawn at its step goes, and is drawn again.
        repeats = validation.due(begin.step, steps) and not begin.is_validated
        announce(config, self.base_config, self.identity.name, model, steps, self.unfused, self.say)
        if dry_run:
            left = range(begin.step + (not repeats), steps + 1)
            validations = sum(validation.due(step, steps) for step in left)
            to_do = (steps - begin.step, validations if data.val_encoded is not None else 0)
            return self._try_steps(module, data, first, needed, to_do)
        begin_writing = partial(self._begin_writing, begin.step)
        callbacks = first + self._callbacks(data, model, record, validation, repeats, begin_writing)
        trainer = self._trainer(data, callbacks, begin.step + (not repeats) if resume else None)
        # At step 0 there is nothing to restore: the start follows from the seed.
        path = str(begin.path) if begin.step else None
        with last_words(several=trainer.world_size > 1), enough_memory(needed):
            trainer.fit(module, data, ckpt_path=path, weights_only=True)
        return self._finish(trainer, module, data, start)

    def _try_steps(
        self,
        module: LitAdapter,
        data: AlpacaDataModule,
        first: list[pl.Callback],
        needed: Sizes,
        to_do: tuple[int, int],
    ) -> int:
        """Take a few steps and say how long the run's steps and validations ``to_do`` would take."""
        callbacks: list[pl.Callback] = [*first, Stopwatch(), StopOnSignal(self.signals)]
        trainer = self._trainer(data, callbacks, None, n_steps=min(N_TRIED, data.total_steps))
        with last_words(several=trainer.world_size > 1), enough_memory(needed):
            trainer.fit(module, data)
        if self.signals.agreed:
            self.say("dry run: stopped by a signal; no run was begun")
            return self.signals.exit_status
        return foretell(trainer, module, data, to_do, self.say)

    def _begin_writing(self, step: int) -> None:
        """Make the folder that of a run which goes on from ``step``."""
        self.folder.set_aside(step, self.say)
        write_text(self.folder.config, saved_config(self.config))

    def _finish(self, trainer: pl.Trainer, module: LitAdapter, data: AlpacaDataModule, start: float) -> int:
        step = trainer.global_step
        if self.signals.agreed:
            where, name = self.folder.checkpoint_path(step), signal.Signals(self.signals.agreed).name
            self.say(f"stopped by {name} after step {step}: {where}; --resume last goes on")
            return self.signals.exit_status
        summary: dict[str, Any] = {"steps": step, "train_loss": module.last["loss"]}
        if data.val_packer is not None:
            summary["val_loss"] = module.val_loss
        if trainer.is_global_zero:
            self._writer.write(self.folder.adapter, adapter_state(module.model), summary)
            size = self.folder.adapter.stat().st_size
            took = time.perf_counter() - start
            done = f"after {counted(step, 'step')}, {took:.0f} s in all"
            self.say(f"wrote {self.folder.adapter} ({size:,} bytes) {done}")
        return self.signals.exit_status

    def _on_death(self, sentence: str) -> None:
        """Another process has died: name it, and end this one, which may be waiting for it."""
        newest = max(self.folder.checkpoints.glob("step-*.ckpt"), default=None)
        rest = f"{newest} is complete, --resume last goes on" if newest else "nothing is saved yet"
        self.folder.close()
        end_run(f"{sentence}; the run ends; {rest}", self.signals.exit_status or 1)

    def _data(self) -> AlpacaDataModule:
        config = self.config
        return AlpacaDataModule(
            config.data,
            tokenizer=self.tokenizer,
            template=self.template,
            tokenizer_key=self.identity.tokenizer,
            batch_size=config.optim.batch_size,
            row_tokens=self._row_tokens(),
            seed=config.seed,
            say=self.say,
        )

    def _row_tokens(self) -> int:
        """Choose rows long enough to keep the device busy, short enough for its memory."""
        if self.config.optim.row_tokens is not None:
            return self.config.optim.row_tokens
        return max(self.config.data.max_length, 8192 if self.device.type == "cuda" else 2048)

    def _model(self, start: dict[str, Tensor] | None) -> Llama:
        """Load the base in its storage precision; the adapter is fp32 whatever that is.

        A base that is cut over the processes is read later, when they are connected.
        """
        sharded = is_sharded(self.config.trainer)
        if sharded:
            model = empty_base(self.base, dtype=self._dtype())
        else:
            model = load_base(self.base, device=own_device(self.device), dtype=self._dtype())
        attach(model, self.config.adapter, self.config.seed)
        if start is not None:
            load_adapter_state(model, start, source=str(self.config.init_from))
        if self.device.type == "cuda" and not sharded:
            from lit_adapter.model import fused  # needs Triton, which comes with CUDA builds of torch

            fused.prepare(model, float8=self.config.trainer.base_precision == "fp8")
        return model

    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32

    def _module(self, model: Llama, steps: int) -> LitAdapter:
        arguments = (model, self.config.optim, steps, self.config.seed, self.signals)
        recompute = self.config.trainer.recompute
        if is_sharded(self.config.trainer):
            return ShardedLitAdapter(*arguments, base=self.base, dtype=self._dtype(), recompute=recompute)
        return LitAdapter(*arguments, recompute=recompute)

    def _record(self, data: AlpacaDataModule, steps: int) -> dict[str, Any]:
        """Return what identifies this run, the settings that a resume may change, and the run's length."""
        facts = {
            "base": self.identity.weights[:16],
            "tokenizer": self.identity.tokenizer[:16],
            "template": self.template.to_dict(),
            "precision": self.precision,
            "init_from": self.start.sha256,
            **{f"base.{key}": value for key, value in self.base_config.computed().items()},
            **{f"data.{key}": value for key, value in data.identity().items()},
        }
        own = identity(self.config, **facts)
        return plain({"identity": own, "changeable": changeable(self.config), "steps": steps})

    def _trainer(
        self,
        data: AlpacaDataModule,
        callbacks: list[pl.Callback],
        purge_step: int | None,
        n_steps: int | None = None,
    ) -> pl.Trainer:
        """Return a trainer; with ``n_steps`` it stops after so many and draws nothing."""
        self.signals.only_note()
        start_processes(self.config.trainer, self.device, self._on_death)
        curves = Curves(self.folder.path, purge_step, self.say) if n_steps is None else None
        validates = data.val_packer is not None
        return make_trainer(
            self.config.trainer, self.device, self.precision, callbacks, curves, validates, n_steps
        )

    def _callbacks(
        self,
        data: AlpacaDataModule,
        model: Llama,
        record: dict[str, Any],
        validation: Validation,
        repeats: bool,
        begin_writing: Callable[[], None],
    ) -> list[pl.Callback]:
        options = self.config.trainer
        assistant = AdaptedLlama(model, self.tokenizer, self.template)
        found: list[pl.Callback] = [
            Report(options, self.say, lr=self.config.optim.peak_lr, redraw=repeats),
            BestAdapter(self.folder.best, self._writer.write),
            Samples(assistant, data.val_records, options, self.signals),
            StopOnSignal(self.signals),  # before the checkpoints: a stop is saved at once
            Checkpoints(self.folder, record, options, begin_writing),
        ]
        if data.val_packer is not None:
            found.append(validation)  # after the checkpoint of its step
        return [Bar(leave=True), *found] if shows_bar(options) else found


def _say_nothing(line: str) -> None:
    """The other processes stay silent."""
