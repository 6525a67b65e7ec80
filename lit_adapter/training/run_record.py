"""``run.json`` in a run's folder: configuration, cost and results, for programs to read."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
from lightning.pytorch import Callback

import lit_adapter
from lit_adapter.data.module import AlpacaDataModule
from lit_adapter.device import device_name, own_device, peak_bytes
from lit_adapter.errors import UserError
from lit_adapter.files.write import write_json
from lit_adapter.training.module import LitAdapter
from lit_adapter.training.notices import Notices
from lit_adapter.training.plan import Plan
from lit_adapter.training.run_folder import RunFolder, saved_values
from lit_adapter.training.strategy import n_processes

FORMAT = 1
"""Version of the file's keys; docs/run_record.md describes them."""


class RunRecord(Callback):
    """Counts tokens and time, keeps the held-out losses, and writes the file; a resumed run counts on.

    ``started`` is when this start of the run began, by `time.perf_counter`.
    """

    def __init__(
        self, folder: RunFolder, plan: Plan, data: AlpacaDataModule, notices: Notices, started: float
    ) -> None:
        self.folder, self.plan, self.data, self.notices = folder, plan, data, notices
        self.held_out: list[list[float]] = []
        """Step and held-out loss of each validation."""
        self.tokens, self.step_seconds, self.starts = 0, 0.0, 1
        self._before_start, self._started = 0.0, started
        self._has_begun = False

    @property
    def seconds(self) -> float:
        """The time of the run so far, over all its starts."""
        return self._before_start + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        """Return the counts from which a resumed run continues."""
        names = ("held_out", "tokens", "step_seconds", "starts", "seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the counts of a checkpoint."""
        self.held_out, self.tokens = state_dict["held_out"], state_dict["tokens"]
        self.step_seconds, self.starts = state_dict["step_seconds"], state_dict["starts"] + 1
        self._before_start = state_dict["seconds"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say that the run is running; the file of a killed run says so forever."""
        self._has_begun = True
        self._write(trainer, pl_module, "running")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Count the step's time and tokens."""
        self.step_seconds += pl_module.step_seconds
        self.tokens += int(pl_module.last["tokens"])

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the held-out loss, in place of an earlier one of the same step."""
        if not trainer.should_stop:
            earlier = [point for point in self.held_out if point[0] < trainer.global_step]
            self.held_out = [*earlier, [trainer.global_step, pl_module.val_loss]]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say how the run has ended."""
        reached = "finished" if self.divergence(pl_module) is None else "diverged"
        self._write(trainer, pl_module, "stopped" if pl_module.signals.agreed else reached)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Say that the run has failed, if it had begun and that can still be written."""
        if self._has_begun:
            with suppress(UserError):
                self._write(trainer, pl_module, "failed")

    def divergence(self, module: LitAdapter) -> str | None:
        """Return what is wrong with a run that ends worse than it began; None if nothing is."""
        return self.notices.divergence(module.val_loss, module.skipped_steps, self.data.finished_steps)

    def is_lowest(self, loss: float) -> bool:
        """Tell whether no held-out loss of the run, that of its start included, is lower."""
        return all(loss <= other for _, other in self.held_out if math.isfinite(other))

    def worst_after_start(self) -> list[float] | None:
        """Return step and value of the highest held-out loss, if it is above that of the start."""
        if len(self.held_out) < 2:
            return None
        worst = max(self.held_out[1:], key=lambda point: point[1])
        return worst if worst[1] > self.held_out[0][1] else None

    def _write(self, trainer: Any, module: LitAdapter, status: str) -> None:
        if trainer.is_global_zero and self.folder.is_there():
            write_json(self.folder.record, {"format": FORMAT, "status": status} | self.contents(module))

    def contents(self, module: LitAdapter) -> dict[str, Any]:
        """Return what the file says besides its format and status; NaN and infinity are null."""
        plan, placement, step = self.plan, self.plan.placement, self.data.finished_steps
        best_step, best_loss = self.folder.lowest()
        packages = ("torch", "lightning", "safetensors")
        return {
            "steps": {"planned": plan.steps, "done": step, "skipped": module.skipped_steps},
            "epochs": step / self.data.steps_per_epoch if self.data.steps_per_epoch else None,
            "loss": {
                "train": _finite(module.last.get("loss", math.nan)),
                "held_out": [_point(at, loss) for at, loss in self.held_out],
                "lowest": _point(best_step, best_loss) if best_step > 0 else None,
            },
            "time": {
                "seconds": round(self.seconds, 3),
                "starts": self.starts,
                "step_seconds": round(self.step_seconds, 3),
                "tokens": self.tokens,
                "tokens_per_s": self.tokens / self.step_seconds if self.step_seconds else None,
            },
            "memory": {"peak_bytes": peak_bytes(own_device(placement.device))},
            "data": _about(self.data),
            "base": asdict(plan.base.identity),
            "adapter": {"parameters": plan.n_trained},
            "device": {
                "type": placement.device.type,
                "name": device_name(own_device(placement.device)),
                "processes": n_processes(plan.config.trainer, placement.device),
                "precision": placement.precision,
                "executor": placement.executor.name,
            },
            "versions": {
                "lit_adapter": lit_adapter.__version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in packages},
            },
            "config": saved_values(plan.config),
        }


def _about(data: AlpacaDataModule) -> dict[str, int | str | None]:
    """Return the numbers of records, tokens and targets, and the records' SHA-256.

    None for those of a stream.
    """
    found: dict[str, int | str | None] = {
        "train_sha256": data.train_records.sha256,
        "held_out_sha256": data.val_records.sha256 if data.val_records else None,
    }
    for side, packer in (("train", data.train_packer), ("held_out", data.val_packer)):
        length = packer.encoded.length if packer is not None else np.empty(0, np.int64)
        found[f"{side}_records"], found[f"{side}_tokens"] = len(length), int(length.sum())
        found[f"{side}_targets"] = packer.n_targets(np.arange(len(length))) if packer is not None else 0
    if data.n_records is None:
        found |= dict.fromkeys(key for key in found if key.startswith("train"))
    return found


def _point(step: float, loss: float) -> dict[str, float | None]:
    return {"step": int(step), "loss": _finite(loss)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
