"""Signals: finish the optimizer step, save, say where, leave with the right status.

The handlers only set a flag. All processes agree on it at the end of a step, so that none of them waits
in a collective operation for one that has already left.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback

EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}


class StopOnSignal(Callback):
    """Ends training after the current step on SIGTERM, SIGINT or SIGUSR1; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.received = 0
        self.earlier = {number: signal.getsignal(number) for number in EXIT_STATUS}

    @property
    def exit_status(self) -> int:
        """The status the script leaves with: 143 for SIGTERM, 130 for SIGINT, otherwise 0."""
        return EXIT_STATUS.get(signal.Signals(self.received), 0) if self.received else 0

    def install(self) -> None:
        """Take the signals over; called again when training starts, after Lightning has set its own."""
        for number in EXIT_STATUS:
            signal.signal(number, self._note)

    def restore(self) -> None:
        """Give the signals back to whoever had them before the run."""
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            os._exit(EXIT_STATUS[signal.SIGINT])  # files are renamed into place whole, so none is harmed
        self.received = self.received or number

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the handlers again: Lightning has replaced them."""
        self.install()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Likewise where only validation runs."""
        self.install()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree on stopping, once an optimizer step."""
        flag = torch.tensor(float(self.received), device=pl_module.device)
        received = trainer.strategy.reduce(flag, reduce_op="max")
        if int(received):
            self.received = int(received)
            trainer.should_stop = True
