"""Several processes: all stop after the same step, and one that dies ends the run and is named.

Two habits of Lightning 2.6 are replaced. Its SIGTERM handler starts a broadcast from inside the handler, and
its training loop broadcasts a flag before every step: the first hangs, the second makes a GPU wait for the
CPU. Its observer of child processes kills everything five seconds later without a word.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from subprocess import Popen
from typing import Any

import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities import rank_zero_only

from lit_adapter.errors import UserError
from lit_adapter.training.signals import EXIT_STATUS, Signals

POLL_SECONDS = 0.5
LAST_WORDS_SECONDS = 3.0
"""How long a failing process waits for the one that knows the cause."""
FIRST_PROCESS = "LIT_ADAPTER_FIRST_PROCESS"
"""Environment variable: the process that started this one."""


class StopOnSignal(Callback):
    """Ends training after the step, or within the validation batch, in which a signal came."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Agree once more: until here a signal was only noted."""
        agree(trainer, pl_module.device, self.signals)
        trainer.should_stop = bool(self.signals.agreed)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop where all processes know of a signal; several have agreed with the step's loss."""
        if trainer.world_size == 1:
            agree(trainer, pl_module.device, self.signals)
        trainer.should_stop = trainer.should_stop or bool(self.signals.agreed)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Leave the validation.

        Raises:
            StopIteration: ends Lightning's evaluation loop.
        """
        agree(trainer, pl_module.device, self.signals)
        if self.signals.agreed:
            trainer.should_stop = True
            raise StopIteration


def agree(trainer: Any, device: torch.device, signals: Signals) -> None:
    """Tell all processes of the signals that any of them has received; all must ask together."""
    flags = signals.flags()
    if trainer.world_size > 1:
        summed = torch.tensor(flags, device=device)
        flags = trainer.strategy.reduce(summed, reduce_op="sum").tolist()
    signals.agree(flags)


class _NoHandlers(_SignalConnector):
    def register_signal_handlers(self) -> None:
        """Leave the signals to `Signals`."""


class _WatchingLauncher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine and watches them."""

    def __init__(self, launcher: _SubprocessScriptLauncher, on_death: Callable[[str], None]) -> None:
        super().__init__(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        self.on_death = on_death

    def launch(self, function: Callable, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the processes, then call ``function`` in this one."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[FIRST_PROCESS] = str(os.getpid())
            # They inherit the mask: a signal waits until their own handlers are set, and kills none of them.
            signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_STATUS)
            try:
                self._call_children_scripts()
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_STATUS)
            first = self.cluster_environment.node_rank() * self.num_processes
            _in_background(_wait_for_death, self.procs, first, self.on_death)
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


def rank() -> int:
    """Return this process's number; launchers announce it before Lightning starts."""
    return int(getattr(rank_zero_only, "rank", 0))


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's hints out of the output; our own lines say what a user can act on."""
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


def take_over(trainer: Trainer, on_death: Callable[[str], None]) -> None:
    """Put our signal handling and our watch over processes in the place of Lightning's.

    Args:
        trainer: a new trainer.
        on_death: called from a thread of the first process with a sentence about the process that died.
    """
    trainer._signal_connector = _NoHandlers(trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        trainer.strategy._launcher = _WatchingLauncher(launcher, on_death)


def follow(train: Callable[[], int], signals: Signals) -> int:
    """Be one of the other processes: gone when the first one is, and silent about what that one says."""
    _leave_with_parent()
    try:
        with last_words(several=True):
            train()
    except UserError as error:
        if signals.received:
            return signals.exit_status
        raise UserError(f"process {rank()}: {error}") from error
    return 0  # the status of a stop is the first process's; any other than 0 would count as a failure here


@contextmanager
def last_words(*, several: bool) -> Iterator[None]:
    """Let an error in one of several processes wait for one that knows the cause, says it and ends this one.

    What concerns all processes is said by the first; a connection that breaks, by the watch over them.
    """
    try:
        yield
    except (UserError, RuntimeError) as error:
        if several and (rank() > 0 or isinstance(error, RuntimeError)):
            time.sleep(LAST_WORDS_SECONDS)
        raise


def _leave_with_parent() -> None:
    """End this process when the one that started it is gone: it would wait for it for half an hour."""
    parent = int(os.environ.get(FIRST_PROCESS, os.getppid()))
    if FIRST_PROCESS not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return  # started by hand or by a queue, which may leave its processes alone

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os._exit(1)

    _in_background(wait)


def end_run(sentence: str, status: int) -> None:
    """Say why and end this process at once, also out of a collective operation; the others follow."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(status)


def _wait_for_death(children: Sequence[Popen], first: int, on_death: Callable[[str], None]) -> None:
    while True:
        for number, child in enumerate(children, start=first + 1):
            status = child.poll()
            if status:
                how = f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"
                on_death(f"process {number} (pid {child.pid}) {how}")
                return
        time.sleep(POLL_SECONDS)


def _in_background(function: Callable, *args: Any) -> None:
    threading.Thread(target=function, args=args, daemon=True).start()
