"""A run's folder: its files, its lock, and what identifies it.

RUN/config.yaml              the resolved configuration
RUN/checkpoints/step-*.ckpt  the newest checkpoints, for --resume
RUN/best.safetensors         the adapter with the lowest held-out loss
RUN/adapter.safetensors      the adapter at the end: the deliverable
RUN/tensorboard/             curves, gates and sample texts
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.files.locks import LockFile
from lit_adapter.files.paths import free_path, without_home
from lit_adapter.files.read import reading
from lit_adapter.files.write import check_writable, is_temporary, sweep
from lit_adapter.training.checkpoint import read_checkpoint
from lit_adapter.weights.adapter_file import read_adapter

LOCK = ".lock"


class RunFolder:
    """The files of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter.safetensors"
        self.best = path / "best.safetensors"
        self.tensorboard = path / "tensorboard"
        self._lock = LockFile(path / LOCK, path, "--out")

    def open(self, *, resume: bool) -> None:
        """Take the folder for this process, and see that it can be written.

        Raises:
            UserError: as `check`, or it is in use.
        """
        self.check(resume=resume)
        self._lock.acquire()
        try:
            self.check(resume=resume)  # a run may have begun and ended since the first look
        except UserError:
            self.close()
            raise
        sweep(self.path)

    def check(self, *, resume: bool) -> None:
        """See whether a run could be written there; nothing is left behind.

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
            raise UserError(f"{self.path}: no such run folder, nothing to resume; start without --resume")
        check_writable(self.path)

    def _holds_files(self) -> bool:
        """Whether there is more than a lock and what another run is writing, or was when it was killed."""
        with reading(self.path), suppress(FileNotFoundError):
            return any(p.name != LOCK and not self._begins_with(p) for p in self.path.iterdir())
        return False

    def _begins_with(self, path: Path) -> bool:
        """Whether it is what a run writes first, not yet at its place."""
        return is_temporary(path, self.config.name) or is_temporary(path, "probe")

    def close(self) -> None:
        """Release the folder, and remove it if it is empty."""
        self._lock.release()
        with suppress(OSError):
            self.path.rmdir()

    def checkpoint_path(self, step: int) -> Path:
        """Return the name of the checkpoint after ``step`` optimizer steps."""
        return self.checkpoints / f"step-{step:07d}.ckpt"

    def newest_checkpoint(
        self, check: Callable[[Path, dict[str, Any]], None], say: Callable[[str], None]
    ) -> tuple[Path, dict[str, Any]]:
        """Return the newest usable checkpoint and what it holds; name those that are not usable.

        Args:
            check: raises UserError for one that is not usable, AnotherRunError for one of another run.
            say: gets a line for each that is not usable, and one for the choice.

        Raises:
            UserError: there is none.
        """
        found = sorted(self.checkpoints.glob("step-*.ckpt"), reverse=True)
        for path in found:
            try:
                checkpoint = read_checkpoint(path)
                check(path, checkpoint)
            except AnotherRunError:
                raise
            except UserError as error:
                say(f"{error}; trying the one before")
                continue
            say(f"resuming from {path}: step {checkpoint['global_step']}, the newest complete checkpoint")
            return path, checkpoint
        reason = f"none of its {len(found)} checkpoints is usable" if found else "it holds no checkpoint"
        raise UserError(f"{self.path}: cannot resume: {reason}; start again with another --out")

    def set_aside(self, step: int, say: Callable[[str], None]) -> None:
        """Rename what comes after ``step``: a run that goes on from there is not mixed with it."""
        later = [path for path in self.checkpoints.glob("step-*.ckpt") if path > self.checkpoint_path(step)]
        if later and self._best_step() > step:
            later.append(self.best)
        for path in sorted(later):
            aside = free_path(path.with_suffix(".aside"))
            path.rename(aside)
            say(f"{path}: not part of the run that goes on from step {step}; kept as {aside.name}")

    def _best_step(self) -> int:
        """Return the step of the best adapter; -1 if there is none that can be read."""
        if not self.best.is_file():
            return -1
        try:
            return int(read_adapter(self.best)[0].training.get("steps", -1))
        except UserError:
            return -1


class AnotherRunError(UserError):
    """A checkpoint that is sound, but of a run with another identity."""


def plain(value: Any) -> Any:
    """Return nested values with lists for tuples, as YAML and JSON have them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def identity(config: Config, **facts: Any) -> dict[str, Any]:
    """Return what a resumed run must share with the run it continues, by configuration key.

    Learning rate, weight decay, epochs, devices, logging and the like may change; they are in `changeable`.
    """
    values = asdict(config)
    data = {f"data.{key}": values["data"][key] for key in ("mask_prompt", "max_length")}
    optim = {
        f"optim.{key}": values["optim"][key] for key in ("batch_size", "schedule", "warmup", "min_lr_ratio")
    }
    adapter = {f"adapter.{key}": value for key, value in values["adapter"].items()}
    base_precision = {"base_precision": config.trainer.base_precision}
    return {"seed": config.seed, **adapter, **data, **optim, **base_precision, **facts}


def changeable(config: Config) -> dict[str, Any]:
    """Return the settings that a resumed run may change; changes are listed."""
    values = asdict(config)
    found = {key: without_home(values[key]) for key in ("base", "out")}
    for section, keys in (
        (
            "optim",
            (
                *("epochs", "max_steps", "lr", "base_lr", "lr_scale_v2"),
                *("weight_decay", "betas", "eps", "clip", "row_tokens"),
            ),
        ),
        ("data", ("workers",)),
        ("trainer", tuple(values["trainer"])),
    ):
        found |= {f"{section}.{key}": values[section][key] for key in keys}
    return found


def saved_config(config: Config) -> str:
    """Return a configuration as YAML that `parse_finetune` reads again, without the name of a home folder."""
    values = plain(asdict(config))
    places = [(values, key) for key in ("base", "out", "init_from")]
    places += [(values["data"], key) for key in ("train", "val", "template")]
    for section, key in places:
        section[key] = section[key] and without_home(section[key])
    return yaml.safe_dump(values, sort_keys=False)
