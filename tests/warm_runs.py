"""Scripts in processes forked from one that has imported everything.

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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from io import BufferedWriter, FileIO, TextIOWrapper
from multiprocessing import forkserver
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from finetune_runs import SCRIPT, end_with_parent
from lightning.pytorch.utilities import rank_zero_only

from lit_adapter.data import module as data_module
from lit_adapter.files import write
from lit_adapter.generation import prompt_file
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.training import module
from lit_adapter.training.module import LitAdapter

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = ["warm_runs", "lit_adapter.training.finetune", "tensorboard.compat.proto", "frozen_imports"]


class Run:
    """A script as one process, in a process group of its own.

    Args:
        arguments: of the command line.
        log: gets standard output and standard error.
        environment: variables to add to those of this process.
        prepare: is called in the process before the script: one of the functions below, as a `partial`.
        script: its name in scripts/, or any file of Python.
        folder: the working directory.
        errors: gets standard error instead of ``log``.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        environment: dict[str, str],
        prepare: Callable[[], None] | None = None,
        *,
        script: str | Path = "finetune.py",
        folder: Path | None = None,
        errors: Path | None = None,
    ) -> None:
        self.log, self.errors = log, errors or log
        self.offset = log.stat().st_size if log.is_file() else 0
        environment = os.environ | environment
        what = (SCRIPT.parent / script, arguments, self.log, self.errors, environment, folder, prepare)
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

    def wait_for(self, text: str, seconds: float = 300) -> None:
        """Wait until ``text`` has been printed."""
        end = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.exitcode is None, f"ended without {text!r}:\n{self.output}"
            assert time.monotonic() < end, f"no {text!r} in {seconds} s:\n{self.output}"
            time.sleep(0.005)


def start_server() -> None:
    """Start the process that runs are forked from. A Python process has one such server: the first."""
    CONTEXT.set_forkserver_preload(IMPORTED)
    # The server passes over what it cannot import, and before Python 3.13 it does not take over `sys.path`.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


def run_script(
    script: str | Path, *arguments: object, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, as `subprocess.run` does."""
    given = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as logs:
        out, err = Path(logs) / "out", Path(logs) / "err"
        status = Run(given, out, environment, script=script, folder=folder, errors=err).wait()
        return subprocess.CompletedProcess(given, status, out.read_text("utf-8"), err.read_text("utf-8"))


def run_code(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a text of Python to its end."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "code.py"
        script.write_text(code, encoding="utf-8")
        return run_script(script, *arguments)


def several_ranks(
    n: int,
    arguments: list[str],
    log: Path,
    environment: dict[str, str],
    prepare: Mapping[int, Callable[[], None] | None] = MappingProxyType({}),
) -> list[Run]:
    """Start the ``n`` processes of a run, as a launcher does; ``prepare`` has that of some ranks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = environment | {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = [*arguments, "--trainer.devices", str(n)]
    return [
        Run(arguments, log.with_suffix(f".{rank}"), common | {"LOCAL_RANK": str(rank)}, prepare.get(rank))
        for rank in range(n)
    ]


def two_ranks(
    arguments: list[str],
    log: Path,
    environment: dict[str, str],
    prepare: tuple[Callable[[], None] | None, Callable[[], None] | None] = (None, None),
) -> list[Run]:
    """Start both processes of a run, each with its own ``prepare``."""
    return several_ranks(2, arguments, log, environment, dict(enumerate(prepare)))


def _script(
    script: Path,
    arguments: list[str],
    log: Path,
    errors: Path,
    environment: dict[str, str],
    folder: Path | None,
    prepare: Callable[[], None] | None,
) -> None:
    os.setpgid(0, 0)
    end_with_parent()
    # A fork server for the loader's workers would import torch again, which costs seconds.
    data_module.start_server = lambda: multiprocessing.get_context("fork")  # type: ignore[assignment]
    for descriptor, path in ((1, log), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if folder:
        os.chdir(folder)
    for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
        del sys.modules[name]  # it reads the environment when it is imported
    n_processes, n_cores = int(environment.get("WORLD_SIZE", 1)), os.cpu_count() or 1
    os.cpu_count = lambda: max(n_processes, n_cores)  # a test may have more processes than there are cores
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # Lightning reads it when it is imported
    if prepare:
        prepare()
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def signal_at_line(text: str, number: int = signal.SIGTERM) -> None:
    """Send this process a signal when it prints a line that starts with ``text``."""
    sys.stdout = _Listener(sys.stdout.fileno(), text, number)


def signal_after_write(count: int, number: int = signal.SIGTERM) -> None:
    """Send the signal after the ``count``-th durable write."""
    write.sync_folder = _nth(write.sync_folder, count, number)  # type: ignore[assignment]


def signal_after_answers(count: int, number: int = signal.SIGTERM) -> None:
    """Send the signal after the ``count``-th group of answers has been appended to a file of them."""
    prompt_file.append_bytes = _nth(prompt_file.append_bytes, count, number)  # type: ignore[assignment]


def signal_in_validation(count: int, number: int = signal.SIGTERM) -> None:
    """Send the signal in the first batch of the ``count``-th validation."""
    LitAdapter.on_validation_batch_start = _nth(  # type: ignore[attr-defined]
        lambda *arguments: None, count, number, only=lambda arguments: arguments[2] == 0
    )


def signal_after_backward(count: int, number: int = signal.SIGTERM) -> None:
    """Send the signal after the backward pass of the ``count``-th row."""
    LitAdapter.manual_backward = _nth(LitAdapter.manual_backward, count, number)  # type: ignore[method-assign]


def signal_after_token(number: int = signal.SIGTERM, most: int = 10_000) -> None:
    """Send the signal after the first token of a sample answer, which may have ``most`` pieces of text."""
    AdaptedLlama._answers = _after_first(AdaptedLlama._answers, number, most)  # type: ignore[method-assign]


def spoil_loss(token: int) -> None:
    """Give rows that hold ``token`` a loss of NaN."""
    sound = module.row_loss

    def row_loss(model: Any, row: Any, **options: Any) -> Any:
        return sound(model, row, **options) * (math.nan if bool((row.ids == token).any()) else 1.0)

    module.row_loss = row_loss


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
    """Send the signal after the ``count``-th call whose arguments satisfy ``only``."""
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


def _after_first(generate: Callable, number: int, most: int) -> Callable:
    def call(*arguments: Any, **options: Any) -> Iterator[Any]:
        for count, item in enumerate(generate(*arguments, **options)):
            if count == 0:
                os.kill(os.getpid(), number)
            assert count < most, "the answer goes on"
            yield item

    return call
