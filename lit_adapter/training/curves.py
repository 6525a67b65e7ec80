"""TensorBoard's event files. They are appended to, not renamed into place, and a run does not need them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment


class Curves(TensorBoardLogger):
    """Writes RUN/tensorboard; a disk that is full ends the curves, with one line, and not the run.

    Args:
        folder: the run folder.
        purge_step: the first step of a resumed run: points from it on are drawn anew.
        say: gets the line.
    """

    def __init__(self, folder: Path, purge_step: int | None, say: Callable[[str], None]) -> None:
        super().__init__(
            str(folder), name="", version="tensorboard", default_hp_metric=False, purge_step=purge_step
        )
        self.say = say
        self._guarded: _Guarded | None = None
        if getattr(threading.excepthook, "func", None) is not _quiet:
            threading.excepthook = partial(_quiet, threading.excepthook)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, made when it is first needed."""
        if self._guarded is None:
            self._guarded = _Guarded(self._open, self.log_dir, self.say)
        return self._guarded

    def _open(self) -> Any:
        _wait_for_a_later_name(Path(self.log_dir))
        return super().experiment


def _wait_for_a_later_name(folder: Path) -> None:
    """Event files are read in the order of their names, which begin with the second they were opened in."""
    names = (re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in folder.glob("events.*"))
    newest = max((int(name[1]) for name in names if name), default=0)
    time.sleep(min(1.0, max(0.0, newest + 1 - time.time())))


def _quiet(hook: Callable[[Any], Any], failure: Any) -> None:
    """TensorBoard's thread reports what it could not write to its next caller too; once is enough."""
    if not (
        isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard")
    ):
        hook(failure)


class _Guarded:
    """A `SummaryWriter` whose methods do nothing once one of them could not write."""

    def __init__(self, make: Callable[[], Any], folder: str, say: Callable[[str], None]) -> None:
        self._make, self._folder, self._say = make, folder, say
        self._writer: Any = None
        self._failed = False

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            if self._failed:
                return
            try:
                self._writer = self._writer or self._make()
                getattr(self._writer, name)(*args, **kwargs)
            except OSError as error:
                self._failed = True
                self._say(f"warning: {self._folder}: {error.strerror}; no more curves, but training goes on")

        return call
