"""Worker processes end with their parent, and say nothing of its death: the run has named what was killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_sharer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from lit_adapter.data.worker import SIGNALS, follow_parent, start_server

SPAWN = multiprocessing.get_context("spawn")
Start = Callable[..., tuple[Any, Connection]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process, and gives the other end of its first argument, a pipe."""
    processes = []

    def starting(target: Callable, *arguments: Any, context: Any = SPAWN) -> tuple[Any, Connection]:
        here, there = context.Pipe()
        process = context.Process(target=target, args=(there, *arguments))
        process.start()
        there.close()
        processes.append(process)
        return process, here

    yield starting
    for process in processes:
        process.kill()
        process.join()


def worker(pipe: Connection, log: Path, error: type[Exception] | None = None) -> None:
    """A worker that shares a descriptor, as a loader does with its tensors; it may fail when told to end."""
    sys.stderr = log.open("w")
    sys.__stderr__ = sys.stderr
    follow_parent()
    pipe.send(resource_sharer.DupFd(1)._id[0])  # type: ignore[attr-defined]
    pipe.recv()
    if error:
        try:
            raise error("seen")
        except error:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    sys.stderr.flush()


def test_a_parent_that_dies_while_it_takes_a_tensor_causes_no_traceback(start: Start, tmp_path: Path) -> None:
    """A loader's tensor is a file descriptor, which its parent fetches over a socket."""
    process, pipe = start(worker, tmp_path / "log")
    address = pipe.recv()
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as parent:
            parent.connect(address)
            parent.recv(1)  # and the rest stays unread: the connection is reset
    pipe.send("end")
    process.join(250)
    assert (process.exitcode, (tmp_path / "log").read_text()) == (0, "")


@pytest.mark.parametrize("error", [ValueError, ConnectionError])
def test_any_other_error_of_a_worker_is_shown(start: Start, tmp_path: Path, error: type[Exception]) -> None:
    process, pipe = start(worker, tmp_path / "log", error)
    pipe.recv()
    pipe.send("end")
    process.join(250)
    assert f"{error.__name__}: seen" in (tmp_path / "log").read_text()


def loader_worker(pipe: Connection) -> None:
    """Sends what a worker from the server is: ids, the server's threads, blocked signals, open files."""
    follow_parent()
    server = os.getppid()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    open_files = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if entry.is_symlink()]
    n_threads = len(os.listdir(f"/proc/{server}/task"))
    pipe.send((os.getpid(), server, n_threads, set(SIGNALS) <= blocked, open_files, "torch" in sys.modules))
    time.sleep(300)


def trainer(pipe: Connection, lock: Path) -> None:
    with lock.open("w"):
        context = start_server()
        here, there = context.Pipe()
        context.Process(target=loader_worker, args=(there,)).start()
        pipe.send(here.recv())
        time.sleep(300)


@pytest.mark.slow
def test_a_loader_worker_comes_from_a_server_without_threads_and_ends_with_the_trainer(
    start: Start, tmp_path: Path
) -> None:
    """It has inherited the imports, and neither the lock nor a signal's death."""
    lock = tmp_path / "lock"
    process, pipe = start(trainer, lock)
    worker_id, server, n_threads, blocks_signals, open_files, has_torch = pipe.recv()
    assert has_torch
    assert n_threads == 1
    assert blocks_signals
    assert str(lock) not in open_files
    process.kill()
    end = time.monotonic() + 250
    while any(is_alive(number) for number in (worker_id, server)):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "zombie" not in status.read_text()
