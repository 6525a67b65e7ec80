"""scripts/finetune.py in processes forked from one that has imported everything: killed by the dozen.

A start costs seconds of imports; a fork of a process that has done them costs milliseconds. What runs in it
is the real script, from its first line on, with the arguments and the environment of a command line.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from io import BufferedWriter, FileIO, TextIOWrapper
from pathlib import Path
from typing import Any

from finetune_runs import SCRIPT, end_with_parent
from lightning.pytorch.utilities import rank_zero_only

from lit_adapter import files
from lit_adapter.data import module as data_module
from lit_adapter.generation.engine import AdaptedLlama
from lit_adapter.training import module
from lit_adapter.training.module import LitAdapter

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["warm_runs", "lit_adapter.training.finetune", "tensorboard.compat.proto"])


class Run:
    """The script as one process, in a process group of its own.

    Args:
        arguments: of the command line.
        log: gets standard output and standard error.
        environment: variables to add.
        event: when the process sends ``number`` to itself: ``line TEXT``: a printed line starts with it;
            ``write N``: after its N-th durable write; ``validation N``: in the first batch of its N-th
            validation; ``backward N``: after its N-th row's backward pass; ``token``: when a sample's first
            token is there. A number may be given twice.
        number: the signal.
        poison: a token id whose rows have a loss that is not a number.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        environment: dict[str, str],
        event: str = "",
        number: int = signal.SIGTERM,
        poison: int | None = None,
    ) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.log = log
        self.offset = log.stat().st_size if log.is_file() else 0
        what = (arguments, log, environment, event, number, poison)
        self.process = CONTEXT.Process(target=_script, args=what)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def output(self) -> str:
        """What this process has printed so far."""
        return self.log.read_text(encoding="utf-8")[self.offset :] if self.log.is_file() else ""

    def wait(self, seconds: float = 300) -> int:
        """Return the exit status, or minus the signal; a process that does not end is killed."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.output}")
        return self.process.exitcode

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until ``text`` has been printed."""
        end = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.exitcode is None, f"ended without {text!r}:\n{self.output}"
            assert time.monotonic() < end, f"no {text!r} in {seconds} s:\n{self.output}"
            time.sleep(0.005)


def two_ranks(
    arguments: list[str],
    log: Path,
    environment: dict[str, str],
    events: tuple[str, str] = ("", ""),
    number: int = signal.SIGTERM,
    poison: int | None = None,
) -> list[Run]:
    """Start both processes of a run, as a launcher does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = environment | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = [*arguments, "--trainer.devices", "2"]
    runs = []
    for rank, event in enumerate(events):
        variables = common | {"LOCAL_RANK": str(rank)}
        runs.append(Run(arguments, log.with_suffix(f".{rank}"), variables, event, number, poison))
    return runs


def _script(
    arguments: list[str],
    log: Path,
    environment: dict[str, str],
    event: str,
    number: int,
    poison: int | None,
) -> None:
    os.setpgid(0, 0)
    end_with_parent()
    # A fork server for the loader's workers would import torch again, which costs seconds.
    data_module.start_server = lambda: multiprocessing.get_context("fork")  # type: ignore[assignment]
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.environ.update(environment)
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # Lightning reads it when it is imported
    if event:
        _arrange(event, number)
    if poison is not None:
        _poison(poison)
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def _arrange(event: str, number: int) -> None:
    kind, _, which = event.partition(" ")
    if kind == "line":
        sys.stdout = _Listener(sys.stdout.fileno(), which, number)
    elif kind == "write":
        files.write_bytes = _nth(files.write_bytes, int(which), number)  # type: ignore[assignment]
    elif kind == "validation":
        LitAdapter.on_validation_batch_start = _nth(  # type: ignore[attr-defined]
            lambda *arguments: None, int(which), number, only=lambda arguments: arguments[2] == 0
        )
    elif kind == "backward":
        LitAdapter.manual_backward = _nth(LitAdapter.manual_backward, int(which), number)  # type: ignore[method-assign]
    elif kind == "token":
        AdaptedLlama._answers = _after_first(AdaptedLlama._answers, number)  # type: ignore[method-assign]


class _Listener(TextIOWrapper):
    def __init__(self, descriptor: int, text: str, number: int) -> None:
        raw = BufferedWriter(FileIO(descriptor, "w", closefd=False))
        super().__init__(raw, encoding="utf-8", line_buffering=True)
        self.text, self.number = text, number

    def write(self, text: str) -> int:
        written = super().write(text)
        if text.startswith(self.text):
            self.flush()
            os.kill(os.getpid(), self.number)
        return written


def _nth(
    function: Callable, count: int, number: int, only: Callable[[tuple], bool] = lambda arguments: True
) -> Callable:
    """Send the signal after the ``count``-th call that counts."""
    left = count

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        result = function(*arguments, **options)
        left -= only(arguments)
        if not left:
            left = -1
            os.kill(os.getpid(), number)
        return result

    return call


def _after_first(generate: Callable, number: int) -> Callable:
    def call(*arguments: Any) -> Iterator[Any]:
        for count, item in enumerate(generate(*arguments)):
            if count == 0:
                os.kill(os.getpid(), number)
            yield item

    return call


def _poison(token: int) -> None:
    sound = module.row_loss

    def row_loss(model: Any, row: Any, **options: Any) -> Any:
        return sound(model, row, **options) * (math.nan if bool((row.ids == token).any()) else 1.0)

    module.row_loss = row_loss
