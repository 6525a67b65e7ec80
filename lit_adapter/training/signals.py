"""Signals: finish the optimizer step, save, say where, leave with the right status.

Before training there is nothing to save, and a signal ends the program at once. From then on a handler only
sets a flag, which is looked at after every optimizer step, validation batch and token of a sample. The flags
of several processes are summed with the loss, so that all of them stop after the same step and none waits
in a collective operation for one that has left. No torch here: handlers are set before it is imported.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

from lit_adapter.errors import UserError

EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}
"""What the script leaves with, by signal."""


class Interrupted(KeyboardInterrupt):
    """A signal before the first step."""

    def __init__(self, number: int) -> None:
        self.exit_status = EXIT_STATUS[signal.Signals(number)]
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} before training; there was nothing to save")


class Signals:
    """The handlers of one run and what they have noted.

    Raises:
        UserError: as `check_launcher`.
    """

    def __init__(self) -> None:
        self.received = 0
        """The signal that this process has got, 0 for none."""
        self.agreed = 0
        """The signal that all processes know of."""
        check_launcher()
        # Where a launcher started this process, others wait for it: it may not leave before they know.
        self.only_notes = is_launched()
        self.earlier: dict[signal.Signals, Any] = {}

    @property
    def exit_status(self) -> int:
        """143 for SIGTERM, 130 for SIGINT, otherwise 0."""
        number = self.agreed or self.received
        return EXIT_STATUS[signal.Signals(number)] if number else 0

    def install(self) -> None:
        """Take the signals over, and let through those that were held back at this process's start."""
        self.earlier = {number: signal.signal(number, self._note) for number in EXIT_STATUS}
        # torch's loaders take this one during the run; once given back, they see a death when they look.
        self.earlier[signal.SIGCHLD] = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_STATUS)

    def restore(self) -> None:
        """Give the signals back to whoever had them before the run."""
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def only_note(self) -> None:
        """From here on let a signal wait for the end of the step.

        Raises:
            Interrupted: there has been one.
        """
        if self.received and not self.only_notes:
            raise Interrupted(self.received)
        self.only_notes = True

    def flags(self) -> list[float]:
        """Return a 1 in the place of the received signal; such lists are summed over processes."""
        return [float(self.received == number) for number in EXIT_STATUS]

    def agree(self, flags: Sequence[float]) -> None:
        """Take up what any process has received: ``flags`` summed over processes."""
        for number, count in zip(EXIT_STATUS, flags, strict=True):
            if count and not self.agreed:
                self.agreed = number

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            os._exit(EXIT_STATUS[signal.SIGINT])  # files are renamed into place whole, so none is harmed
        self.received = self.received or number
        if not self.only_notes:
            raise Interrupted(number)


NUMBERS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "JSM_NAMESPACE_RANK"),
)
"""Environment variables in which launchers say a number, and which Lightning reads when it is imported."""


def check_launcher() -> None:
    """Refuse variables of a launcher that did not start this process: it would train as another's follower.

    Raises:
        UserError: a number that is none, or a rank without what a launcher sets with it.
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


def is_launched() -> bool:
    """Tell a process of several, started by torchrun, SLURM or Lightning, from one started by hand."""
    return "LOCAL_RANK" in os.environ or _is_one_of_slurms()


def _is_one_of_slurms() -> bool:
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ
