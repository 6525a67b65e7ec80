"""Which checkpoint a run goes on from, and what it must have in common with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_adapter.config import DEFAULT_LR, Config, OptimConfig
from lit_adapter.errors import UserError, counted
from lit_adapter.training.checkpoint import check_contents, read_checkpoint
from lit_adapter.training.run_folder import AnotherRunError, RunFolder, changeable, identity, plain
from lit_adapter.weights.adapter_file import read_adapter

RATES = ("optim.lr", "optim.base_lr")
ADDED = ("base.", "data.val_records")
"""Facts that the first checkpoints do not hold."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Beginning:
    """Where a run begins: at step 0, or after a checkpoint's step."""

    path: Path | None = None
    step: int = 0
    is_validated: bool = False
    """The held-out loss of that step has been measured."""


def find_beginning(
    resume: str, folder: RunFolder, record: dict[str, Any], shapes: dict[str, tuple[int, ...]], say: Say
) -> Beginning:
    """Find the checkpoint, compare it with this run, check it, and list the settings that change.

    Args:
        resume: ``last``, or a checkpoint file.
        folder: of the run.
        record: ``identity``, ``changeable`` and ``steps`` of this run, in plain values as JSON has them.
        shapes: of every adapter tensor.
        say: gets a line for each thing worth knowing.

    Raises:
        UserError: there is none, it is not usable, or it is another run's (then both values are named).
    """
    if "://" in resume:
        raise UserError(f"--resume {resume}: a URL; give 'last' or a file of this run")

    def check(path: Path, checkpoint: dict[str, Any]) -> None:
        _compare(path, checkpoint["lit_adapter"]["identity"], record["identity"])
        check_contents(path, checkpoint, shapes)

    if resume == "last":
        path, checkpoint = folder.newest_checkpoint(check, say)
    else:
        path, checkpoint = Path(resume), read_checkpoint(Path(resume))
        check(path, checkpoint)
    for line in _changes(checkpoint["lit_adapter"], record):
        say(f"resuming with {line}")
    step = checkpoint["global_step"]
    return Beginning(path, step, checkpoint["measured"]["validated_step"] == step)


def saved_identity(resume: str, folder: RunFolder) -> dict[str, Any]:
    """Return what identifies the run that is resumed; empty where no checkpoint of it can be read."""
    paths = (
        sorted(folder.checkpoints.glob("step-*.ckpt"), reverse=True) if resume == "last" else [Path(resume)]
    )
    for path in paths:
        with suppress(UserError):  # `find_beginning` will say what is wrong with it
            return dict(read_checkpoint(path)["lit_adapter"]["identity"])
    return {}


def is_written(adapter: Path, checkpoint: Path | None) -> bool:
    """Tell whether an adapter file holds what a checkpoint holds, and not what an earlier run ended with."""
    if checkpoint is None or not adapter.is_file():
        return False
    try:
        state = read_adapter(adapter)[1]
    except UserError:
        return False  # it is written again
    saved = read_checkpoint(checkpoint)["state_dict"]
    return state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in state)


def _compare(path: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    saved = plain(identity(Config())) | saved  # what an earlier version did not know had its default
    differences = [
        f"{key} was {saved.get(key)!r}, now {value!r}"
        for key, value in own.items()
        if saved.get(key) != value and (key in saved or not key.startswith(ADDED))
    ]
    if differences:
        raise AnotherRunError(f"{path}: cannot resume another run: {'; '.join(differences)}")


def _changes(saved: dict[str, Any], own: dict[str, Any]) -> Iterator[str]:
    before, now = _peak_lr(saved), _peak_lr(own)
    if before != now:
        yield f"optim.lr changed from {before:g} to {now:g}"
    settings = plain(changeable(Config())) | saved["changeable"]  # as in `_compare`
    for key, value in own["changeable"].items():
        if key not in RATES and settings[key] != value:
            yield f"{key} changed from {_shown(settings[key])} to {_shown(value)}"
    schedule, warmup = own["identity"]["optim.schedule"], own["identity"]["optim.warmup"]
    if saved["steps"] != own["steps"] and (schedule != "constant" or 0 < warmup < 1):
        yield (
            f"the {schedule} schedule laid over {counted(own['steps'], 'step')} instead of {saved['steps']}: "
            f"not the run that {counted(own['steps'], 'step')} from the start would be"
        )


def _peak_lr(record: dict[str, Any]) -> float:
    """Return the rate that a run has, whichever of its settings says it."""
    settings, same = record["changeable"], record["identity"]
    optim = OptimConfig(
        lr=settings["optim.lr"], base_lr=settings["optim.base_lr"], batch_size=same["optim.batch_size"]
    )
    given = optim.lr is not None or optim.base_lr is not None
    return optim.peak_lr if given else DEFAULT_LR[same["adapter.version"]]


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)
