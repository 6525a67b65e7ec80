"""A fine-tuning run, from its configuration to its adapter file."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

from lit_adapter import streams
from lit_adapter.config import Config, with_learning_rate
from lit_adapter.data.module import AlpacaDataModule
from lit_adapter.data.sources import check_sources, has_conversations
from lit_adapter.data.stream_module import StreamDataModule
from lit_adapter.data.summary import describe
from lit_adapter.errors import counted
from lit_adapter.spinning import yield_shared_cores
from lit_adapter.streams import Say
from lit_adapter.text.template import Template
from lit_adapter.training.base import Base, load_model, read_base, read_initial_adapter
from lit_adapter.training.dry_run import try_steps
from lit_adapter.training.ending import conclude
from lit_adapter.training.fit import make_module, quiet_lightning, train
from lit_adapter.training.lightning_internals import rank
from lit_adapter.training.loggers import check_logger
from lit_adapter.training.notices import Notices
from lit_adapter.training.placement import Placement, choose_placement
from lit_adapter.training.plan import make_plan, plan_lines
from lit_adapter.training.processes import follow, is_first_of_node
from lit_adapter.training.resume import find_resume_point, is_written, saved_run, template_of_run
from lit_adapter.training.run_folder import RunFolder
from lit_adapter.training.run_record import RunRecord
from lit_adapter.training.signals import Signals
from lit_adapter.training.strategy import n_shares


def finetune(
    config: Config,
    resume: str | None = None,
    say: Say = streams.say,
    signals: Signals | None = None,
    *,
    dry_run: bool = False,
    verify: bool = False,
    how_to_continue: str = "--resume last continues",
) -> int:
    """Train an adapter.

    Args:
        config: the run.
        resume: ``last``, or a checkpoint file of the run.
        say: gets each line for the user; only the first process calls it.
        signals: signal handlers that are installed already; by default they are installed here.
        dry_run: print the plan, try three steps, and leave nothing in the run folder.
        verify: compare every byte of the base with its checksums, even if its files look unchanged.
        how_to_continue: ends the line about a run that was stopped.

    Returns:
        The exit status: 0, or 143 / 130 / 0 after SIGTERM / SIGINT / SIGUSR1.

    Raises:
        UserError: anything that the user can fix.
        Interrupted: a signal before training, where there is nothing to save.
    """
    folder = RunFolder(Path(config.out))
    if signals is None:
        signals = Signals()
        signals.install()
    verify = verify and is_first_of_node()
    run = partial(_run, config, resume, folder, signals, dry_run=dry_run, verify=verify, how=how_to_continue)
    try:
        with quiet_lightning():
            if rank() > 0:
                return follow(partial(run, lambda line: None), signals)
            if dry_run:
                folder.check(resume=resume is not None)
                return run(say)
            folder.open(resume=resume is not None)
            with closing(folder):
                return run(say)
    finally:
        signals.restore()


def _run(
    config: Config,
    resume: str | None,
    folder: RunFolder,
    signals: Signals,
    say: Say,
    *,
    dry_run: bool,
    verify: bool,
    how: str,
) -> int:
    """Read the configuration and what it names, plan, load, train, and write the adapter."""
    started = time.perf_counter()
    config = with_learning_rate(config)
    check_sources(config.data)  # before anything that takes seconds
    check_logger(config.trainer.logger)
    base = read_base(config, say, verify=verify)
    saved = saved_run(resume, folder)
    placement = choose_placement(config, base.config, saved.identity.get("precision"), say)
    if placement.device.type == "cpu":
        yield_shared_cores()
    chats = config.data.template == "auto" and has_conversations(config.data, say)
    template = template_of_run(config.data.template, base, saved, conversations=chats)
    initial = read_initial_adapter(config, base, template, saved.identity.get("init_from"), say)

    data = _read_data(config, base, template, placement, say)
    plan = make_plan(config, base, placement, initial, data, saved)
    data.total_steps = plan.steps
    shares = n_shares(config.trainer, placement.device)
    for line in describe(data, color=sys.stdout.isatty(), n_shares=shares):
        say(line)
    point = find_resume_point(resume, folder, plan, say)
    if point.step >= plan.steps and is_written(folder.adapter, point.path):
        say(f"{folder.path}: already complete, {counted(point.step, 'step')}; nothing to do")
        return 0
    for line in plan_lines(plan):
        say(line)

    model = load_model(config, base, placement, initial.tensors(point.path))
    module = make_module(plan, model, signals)
    if dry_run:
        return try_steps(plan, point, module, data, folder, say)
    record = RunRecord(folder, plan, data, Notices(say, plan.config.optim.peak_lr), started)
    trainer = train(point, module, record, say)
    if signals.agreed:
        name, checkpoint = signal.Signals(signals.agreed).name, folder.checkpoint_path(trainer.global_step)
        say(f"stopped by {name} after step {trainer.global_step}: {checkpoint}; {how}")
    elif trainer.is_global_zero:
        conclude(module, record, say)
    return signals.exit_status


def _read_data(
    config: Config, base: Base, template: Template, placement: Placement, say: Say
) -> AlpacaDataModule:
    """Read and encode the records."""
    busy = 8192 if placement.device.type == "cuda" else 2048  # tokens of a row that occupy the device
    kind = StreamDataModule if config.data.stream else AlpacaDataModule
    return kind(
        config.data,
        tokenizer=base.tokenizer,
        template=template,
        tokenizer_key=f"{base.identity.tokenizer} {base.tokenizer.bos_id} {base.tokenizer.eos_id}",
        batch_size=config.optim.batch_size or 0,
        row_tokens=config.optim.row_tokens or max(config.data.max_length, busy),
        seed=config.seed,
        say=say,
    ).read()
