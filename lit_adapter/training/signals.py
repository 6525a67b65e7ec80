"""Signals: finish the optimizer step, save, print the path, exit with the right status.

Before training there is nothing to save, and a signal ends the program at once. During training a handler
only sets a flag, which is checked after every optimizer step, validation batch and sampled token. The flags
of several processes are summed with the loss, so that all of them stop after the same step and none waits in
a collective operation for one that has left. Nothing here imports torch: handlers are set before that.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

from lit_adapter.errors import UserError

EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}
"""The script's exit status, by signal."""


class Interrupted(KeyboardInterrupt):
    """A signal came before the first step."""

    def __init__(self, number: int) -> None:
        self.exit_status = EXIT_STATUS[signal.Signals(number)]
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} before training; there was nothing to save")


class Signals:
    """The signal handlers of one run, and the signals they have received.

    Raises:
        UserError: as `check_launcher`.
    """

    def __init__(self) -> None:
        self.received = 0
        """The first signal that this process has received; 0 if none."""
        self.agreed = 0
        """The signal that all processes know of; 0 if none."""
        check_launcher()
        # The other processes of a launcher wait for this one, which therefore may not leave before they know.
        self.only_notes = "LOCAL_RANK" in os.environ or _is_one_of_slurms()
        self.earlier: dict[signal.Signals, Any] = {}

    @property
    def exit_status(self) -> int:
        """143 for SIGTERM, 130 for SIGINT, otherwise 0."""
        number = self.agreed or self.received
        return EXIT_STATUS[signal.Signals(number)] if number else 0

    def install(self) -> None:
        """Set the handlers, and unblock the signals that were blocked when this process started."""
        self.earlier = {number: signal.signal(number, self._note) for number in EXIT_STATUS}
        # torch's loaders set a handler for this signal during the run, and notice dead workers without it
        # too.
        self.earlier[signal.SIGCHLD] = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_STATUS)

    def restore(self) -> None:
        """Set the handlers that were there before the run."""
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def only_note(self) -> None:
        """From now on, only note a signal, to be acted on at the end of the step.

        Raises:
            Interrupted: a signal has been received already.
        """
        if self.received and not self.only_notes:
            raise Interrupted(self.received)
        self.only_notes = True

    def flags(self) -> list[float]:
        """Return a number per signal, 1.0 for the received one, else 0.0, to be summed over processes."""
        return [float(self.received == number) for number in EXIT_STATUS]

    def agree(self, flags: Sequence[float]) -> None:
        """Note a signal that any process has received, from the `flags` summed over processes."""
        for number, count in zip(EXIT_STATUS, flags, strict=True):
            if count and not self.agreed:
                self.agreed = number

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            os._exit(EXIT_STATUS[signal.SIGINT])  # safe: files are renamed into place whole
        self.received = self.received or number
        if not self.only_notes:
            raise Interrupted(number)


NUMBERS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "JSM_NAMESPACE_RANK"),
)
"""Environment variables with which launchers pass numbers, and which Lightning reads when it is imported."""


def check_launcher() -> None:
    """Refuse a launcher's variables without a launcher: this process would wait for others that do not exist.

    Raises:
        UserError: a variable is not a number, or a rank comes without the variables that belong to it.
    """
    for name in NUMBERS:
        value = os.environ.get(name)
        if value is not None and not value.isdecimal():
            raise UserError(f"{name} is {value!r} in the environment; expected a whole number, or unset it")
    name = "LOCAL_RANK" if "LOCAL_RANK" in os.environ else "RANK"
    is_rank = name == "LOCAL_RANK" or int(os.environ.get(name, 0)) > 0
    by_hand = {"LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    if is_rank and not (by_hand or "TORCHELASTIC_RUN_ID" in os.environ or _is_one_of_slurms()):
        raise UserError(
            f"{name} is {os.environ[name]} in the environment, but no launcher started this process "
            "(LOCAL_RANK, WORLD_SIZE and MASTER_ADDR belong together); unset it"
        )


def _is_one_of_slurms() -> bool:
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ
