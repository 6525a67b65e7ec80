"""A run's folder: its files and its lock.

RUN/config.yaml              the resolved configuration
RUN/checkpoints/step-*.ckpt  the newest checkpoints, for --resume
RUN/best.safetensors         the adapter with the lowest held-out loss
RUN/adapter.safetensors      the adapter at the end
RUN/run.json                 configuration, cost and results
RUN/tensorboard/             curves, gates and sample texts
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.files.locks import LockFile, is_at
from lit_adapter.files.paths import free_path, without_home
from lit_adapter.files.read import reading
from lit_adapter.files.write import check_writable, is_temporary, sweep, write_bytes
from lit_adapter.streams import Say
from lit_adapter.training.checkpoint import read_checkpoint
from lit_adapter.training.run_identity import plain
from lit_adapter.weights.adapter_file import read_adapter

LOCK = ".lock"


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self._set_names(path)
        self._lock = LockFile(path / LOCK, path, "--out")
        self._descriptor: int | None = None

    def _set_names(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter.safetensors"
        self.best = path / "best.safetensors"
        self.record = path / "run.json"

    def open(self, *, resume: bool) -> None:
        """Lock the folder for this process, and check that it can be written.

        Raises:
            UserError: as `check`, or another process uses it.
        """
        self.check(resume=resume)
        self._lock.acquire()
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.check(resume=resume)  # a run may have started and ended since the first check
        except UserError:
            self.close()
            raise
        sweep(self.path)

    def check(self, *, resume: bool) -> None:
        """Check that a run can be written there; leave nothing behind.

        Raises:
            UserError: it holds another run, is not a folder, or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; choose another run folder with --out")
        if not resume and self._holds_files():
            if not (self.config.exists() or self.checkpoints.exists()):
                raise UserError(f"{self.path}: holds files, but no run; choose another --out")
            raise UserError(f"{self.path}: holds a run already; add --resume last, or choose another --out")
        if resume and not self.path.is_dir():
            raise UserError(
                f"{self.path}: no such run folder, nothing to resume; start without --resume, or if the "
                "folder was moved, give its place with --out"
            )
        check_writable(self.path)

    def _holds_files(self) -> bool:
        """Tell whether there are files other than the lock and temporary files of a run that is starting."""
        with reading(self.path), suppress(FileNotFoundError):
            found = [path for path in self.path.iterdir() if path.name != LOCK]
            starting = (self.config.name, "probe")
            return not all(any(is_temporary(path, name) for name in starting) for path in found)
        return False

    def close(self) -> None:
        """Release the folder, and remove it if it is empty."""
        self._lock.release()
        if self._descriptor is None:
            return
        with suppress(OSError):
            if self.is_there():
                self.path.rmdir()
        os.close(self._descriptor)
        self._descriptor = None

    def is_there(self) -> bool:
        """Tell whether the folder that this process has opened is still the one with its name."""
        return self._descriptor is None or is_at(self.path, self._descriptor)

    def leave(self) -> str:
        """Take a new folder beside the one that is gone; return what has happened, for a message."""
        gone = self.path
        self._set_names(free_path(gone.with_name(f"{gone.name}.rescued")))
        return f"{gone}: the run folder was moved or deleted while the run went on"

    def take_best(self) -> None:
        """Copy ``best.safetensors`` from the folder that was left, unless that was deleted.

        Raises:
            UserError: the copy cannot be written.
        """
        if self._descriptor is None:
            return
        try:
            descriptor = os.open(self.best.name, os.O_RDONLY, dir_fd=self._descriptor)
        except OSError:
            return  # the resumed run writes the best of its own validations
        with open(descriptor, "rb") as file:
            write_bytes(self.best, file.read())

    def checkpoint_path(self, step: int) -> Path:
        """Return the name of the checkpoint after ``step`` optimizer steps."""
        return self.checkpoints / f"step-{step:07d}.ckpt"

    def saved(self) -> list[Path]:
        """Return the checkpoints, the oldest first."""
        return sorted(self.checkpoints.glob("step-*.ckpt"))

    def newest_checkpoint(
        self, check: Callable[[Path, dict[str, Any]], None], say: Say
    ) -> tuple[Path, dict[str, Any]]:
        """Return the newest usable checkpoint and what it holds; report newer ones that are not usable.

        ``check`` raises UserError for an unusable checkpoint, AnotherRunError for another run's.

        Raises:
            UserError: no checkpoint is usable.
        """
        found = self.saved()
        for path in reversed(found):
            try:
                checkpoint = read_checkpoint(path)
                check(path, checkpoint)
            except AnotherRunError:
                raise
            except UserError as error:
                say(f"{error}; trying the one before it")
                continue
            say(f"resuming from {path}: step {checkpoint['global_step']}, the newest complete checkpoint")
            return path, checkpoint
        reason = f"none of its {len(found)} checkpoints is usable" if found else "it holds no checkpoint"
        raise UserError(f"{self.path}: cannot resume: {reason}; start again with another --out")

    def set_aside(self, step: int, say: Say) -> None:
        """Rename the files of later steps, so that a run resumed from ``step`` does not mix with them."""
        later = [path for path in self.saved() if path > self.checkpoint_path(step)]
        if later and self.lowest()[0] > step:
            later.append(self.best)
        for path in sorted(later):
            aside = free_path(path.with_suffix(".aside"))
            path.rename(aside)
            say(f"{path}: not part of the run resumed from step {step}; kept as {aside.name}")

    def lowest(self) -> tuple[int, float]:
        """Return the step and held-out loss of ``best.safetensors``; -1 and NaN if it cannot be read."""
        if not self.best.is_file():
            return -1, math.nan
        try:
            training = read_adapter(self.best)[0].training
        except UserError:
            return -1, math.nan
        return int(training.get("steps", -1)), float(training.get("val_loss", math.nan))


class AnotherRunError(UserError):
    """The checkpoint is usable, but its run has another identity."""


def saved_values(config: Config) -> dict[str, Any]:
    """Return a configuration as plain values that `parse_finetune` reads, with ``~`` for the home folder."""
    values = plain(asdict(config))
    fields = [(values, key) for key in ("base", "out", "init_from")]
    fields += [(values["data"], key) for key in ("train", "val", "template")]
    for section, key in fields:
        given = section[key]
        several = isinstance(given, list)
        section[key] = [*map(without_home, given)] if several else given and without_home(given)
    return dict(values)
