"""What worker processes share: a signal to the group is their parent's to answer, and they end with it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_sharer
from types import TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def holding_signals() -> Iterator[None]:
    """Hold signals back: processes started meanwhile do so for good, also before `follow_parent` runs."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def follow_parent(worker: int = 0) -> None:
    """Let this worker live until its parent ends, and no longer.

    A signal to the process group would kill it before the parent has saved. Where the parent is killed, a
    worker with half a result in its pipe would wait for ever for somebody to read the rest, and one whose
    tensors the parent was fetching would print that its connection is gone.

    Args:
        worker: its number, which loaders tell.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    shown = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # The parent was killed while this worker's thread gave it a tensor, which the run reports.
        giving = trace is not None and trace.tb_frame.f_code.co_filename == resource_sharer.__file__
        if not (giving and issubclass(kind, (ConnectionError, EOFError))):
            shown(kind, error, trace)

    sys.excepthook = show
