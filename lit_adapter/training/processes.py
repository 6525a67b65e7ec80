"""Several processes: all stop after the same step, and a process that dies is named and ends the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback

from lit_adapter.config import TrainerConfig
from lit_adapter.errors import UserError
from lit_adapter.training.lightning_internals import leave_validation, rank
from lit_adapter.training.signals import EXIT_STATUS, Signals
from lit_adapter.training.strategy import launched, n_processes, processes_per_node

POLL_SECONDS = 0.5
LAST_WORDS_SECONDS = 3.0
"""How long a failing process waits for another one that knows the cause."""
FIRST_PROCESS = "LIT_ADAPTER_FIRST_PROCESS"
"""Environment variable: the id of the process that started this one."""


class StopOnSignal(Callback):
    """Ends training after the step, or validation before the batch, in which a signal came."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Agree on signals that came before the first step."""
        agree(trainer, pl_module)
        trainer.should_stop = bool(pl_module.signals.agreed)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Stop once all processes know of a signal; several processes learn of it with the step's loss."""
        if trainer.world_size == 1:
            agree(trainer, pl_module)
        trainer.should_stop = trainer.should_stop or bool(pl_module.signals.agreed)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Leave the validation, and stop training too."""
        agree(trainer, pl_module)
        if pl_module.signals.agreed:
            trainer.should_stop = True
            leave_validation()


def agree(trainer: Any, pl_module: Any) -> None:
    """Tell all processes of the signals that any of them has received; all must call this together."""
    flags = pl_module.signals.flags()
    if trainer.world_size > 1:
        summed = torch.tensor(flags, device=pl_module.device)
        flags = trainer.strategy.reduce(summed, reduce_op="sum").tolist()
    pl_module.signals.agree(flags)


def start_processes(options: TrainerConfig, device: torch.device, on_death: Callable[[str], None]) -> None:
    """Start this node's other processes and watch them, unless a launcher has started them.

    They run this command again, up to where a Trainer connects all of them. The Trainer takes the variables
    set here for those of a launcher and starts nothing. Its own launcher would kill every process five
    seconds after one has died, without saying why. ``on_death`` is called from a thread of this process with
    a sentence about the process that has died.
    """
    total, local = n_processes(options, device), processes_per_node(options, device)
    if local > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // local))  # Lightning does it for ddp alone
    if total == 1 or launched() is not None:
        return
    network = LightningEnvironment()
    os.environ |= {
        "MASTER_ADDR": network.main_address,
        "MASTER_PORT": str(network.main_port),
        "NODE_RANK": str(network.node_rank()),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(total),
    }
    command = [sys.executable, *sys.orig_argv[1:]]
    # The processes inherit the mask: a signal waits until their own handlers are set instead of killing them.
    signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_STATUS)
    try:
        own = {**os.environ, FIRST_PROCESS: str(os.getpid())}
        children = [
            subprocess.Popen(command, env=own | {"LOCAL_RANK": str(number)}) for number in range(1, local)
        ]
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_STATUS)
    _in_background(_wait_for_death, children, network.node_rank() * local + 1, on_death)


def is_first_of_node() -> bool:
    """Tell whether this is the first process of its node, or the only one."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def follow(train: Callable[[], int], signals: Signals) -> int:
    """Run ``train`` as one of the other processes, which end with the first and leave printing to it.

    Returns:
        The exit status; 0 also after a signal, because a launcher would take any other for a failure.

    Raises:
        UserError: as ``train``, with this process's rank; not after a signal.
    """
    _leave_with_parent()
    try:
        with last_words(several=True):
            train()
    except UserError as error:
        if signals.received:
            return signals.exit_status
        raise UserError(f"process {rank()}: {error}") from error
    return 0


@contextmanager
def last_words(*, several: bool) -> Iterator[None]:
    """Delay an error, so that a process that knows its cause can report it and end this one first.

    The first process reports errors that concern all of them. A broken connection means that one of them has
    died; the watch in `start_processes`, or a launcher, reports it.
    """
    try:
        yield
    except (UserError, RuntimeError) as error:
        if several and (rank() > 0 or isinstance(error, RuntimeError)):
            time.sleep(LAST_WORDS_SECONDS)
        raise


def _leave_with_parent() -> None:
    """End this process when the one that started it is gone, instead of waiting for it for half an hour."""
    parent = int(os.environ.get(FIRST_PROCESS, os.getppid()))
    if FIRST_PROCESS not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return  # started by hand or by a queue, which may leave its processes alone

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os._exit(1)

    _in_background(wait)


def _wait_for_death(children: list[subprocess.Popen], first: int, on_death: Callable[[str], None]) -> None:
    """Report the first of ``children`` that fails; they are the processes from rank ``first`` on."""
    while True:
        for number, child in enumerate(children, start=first):
            status = child.poll()
            if status:
                how = f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"
                on_death(f"process {number} (pid {child.pid}) {how}")
                return
        time.sleep(POLL_SECONDS)


def _in_background(function: Callable, *args: Any) -> None:
    threading.Thread(target=function, args=args, daemon=True).start()
