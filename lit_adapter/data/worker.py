"""Worker processes: they are forked from a server, leave signals to their parent, and end with it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, parent_process, resource_sharer
from multiprocessing.context import BaseContext
from types import TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def start_server() -> BaseContext:
    """Start a process that imports what loader workers need and forks them; return its context.

    A fork of the trainer itself can hang: CPython 3.11 waits forever if another thread, such as the
    communication library's, is entering or leaving Python at that moment. This process has one thread.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["lit_adapter.data.packing"])
    with holding_signals():
        forkserver.ensure_running()
    return context


@contextmanager
def holding_signals() -> Iterator[None]:
    """Block signals; processes started meanwhile keep them blocked, even before `follow_parent` runs."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def follow_parent(worker: int = 0) -> None:
    """Keep this worker process alive until its parent ends, and no longer.

    A signal to the process group would kill it before the parent has saved. If the parent is killed, a worker
    would wait forever for a reader of its pipe, or print that a connection is gone.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None, "not a worker process"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    shown = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # The parent was killed while a thread of this worker gave it a tensor; the run reports the death.
        giving = trace is not None and trace.tb_frame.f_code.co_filename == resource_sharer.__file__
        if not (giving and issubclass(kind, (ConnectionError, EOFError))):
            shown(kind, error, trace)

    sys.excepthook = show
