"""When a run validates, and what it saves: checkpoints and the best adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback
from torch import Tensor

from lit_adapter.config import TrainerConfig
from lit_adapter.errors import UserError
from lit_adapter.model.adapter import adapter_state
from lit_adapter.training.lightning_internals import let_go_on, validate_now
from lit_adapter.training.loggers import flush
from lit_adapter.training.run_folder import RunFolder


class Validation(Callback):
    """Computes the held-out loss before the first step, every ``every`` steps and after the last one.

    A validation that a kill has interrupted is repeated: the checkpoint of its step was saved before it, and
    a run that resumes from there begins with the validation.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def due(self, step: int, total_steps: int) -> bool:
        """Return whether the held-out loss is computed after ``step`` steps."""
        return step % self.every == 0 or step == total_steps

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Validate before the first step, unless the resume point already has its held-out loss."""
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Validate after the step's checkpoint."""
        step = trainer.global_step
        done = pl_module.validated_step == step
        if not done and not trainer.should_stop and self.due(step, trainer.datamodule.total_steps):
            validate_now(trainer)


class Checkpoints(Callback):
    """Saves before the first step, every ``save_every`` steps, after the last one and at a stop.

    If the run folder is gone, it saves beside the old place and ends the run. ``record`` is stored with each
    checkpoint: the run identity and the settings that a resume may change. ``begin`` is called on the first
    process before anything else is written.
    """

    def __init__(
        self, folder: RunFolder, record: dict[str, Any], options: TrainerConfig, begin: Callable[[], None]
    ) -> None:
        self.folder, self.record, self.begin = folder, record, begin
        self.every, self.keep = options.save_every, options.keep_checkpoints
        self.saved_step = -1

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict) -> None:
        """Add the run identity and the settings."""
        checkpoint["lit_adapter"] = self.record

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict) -> None:
        """Note the resume point's step; the run may have more steps now than when it was saved."""
        let_go_on(checkpoint)
        self.saved_step = checkpoint["global_step"]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Prepare the run folder.

        Raises:
            UserError: it is gone.
        """
        if trainer.is_global_zero:
            if not self.folder.is_there():
                raise UserError(f"{self.folder.leave()}; no step was taken")
            self.begin()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Save step 0, so that a run can be resumed however early it is stopped."""
        if trainer.global_step == 0:
            self.save(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Save at the end of an optimizer step, never inside one."""
        last = trainer.global_step >= trainer.datamodule.total_steps
        if trainer.global_step % self.every == 0 or last or trainer.should_stop:
            self.save(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Save if a signal has cut the validation short."""
        if trainer.should_stop:
            self.save(trainer)

    def save(self, trainer: Any) -> None:
        """Save the step, unless it is saved already, and delete the oldest checkpoints.

        Raises:
            UserError: the run folder is gone, or the checkpoint cannot be written.
        """
        step = trainer.global_step
        if step == self.saved_step:
            return
        if self._is_gone(trainer):
            self._rescue(trainer)
        if trainer.is_global_zero and trainer.logger is not None:
            flush(trainer.logger)  # a resumed run draws only the points after this step
        trainer.save_checkpoint(self.folder.checkpoint_path(step))
        self.saved_step = step
        if trainer.is_global_zero:
            for old in self.folder.saved()[: -self.keep]:
                old.unlink(missing_ok=True)

    def _is_gone(self, trainer: Any) -> bool:
        """Tell all processes whether the first one still finds the run folder."""
        gone = torch.tensor(float(not self.folder.is_there()), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(gone, reduce_op="sum"))

    def _rescue(self, trainer: Any) -> NoReturn:
        """Save to a new run folder, from which the run can continue."""
        reason = self.folder.leave()
        if trainer.is_global_zero:
            self.begin()
            self.folder.take_best()
        trainer.save_checkpoint(self.folder.checkpoint_path(trainer.global_step))
        raise UserError(
            f"{reason}; step {trainer.global_step} is saved in {self.folder.path}: "
            f"go on with --out {self.folder.path} --resume last"
        )


class BestAdapter(Callback):
    """Writes the adapter whenever the held-out loss is the lowest so far; the lowest loss survives a resume.

    ``write`` is called with its path, the adapter's tensors, and the step and loss reached.
    """

    def __init__(
        self, folder: RunFolder, write: Callable[[Path, dict[str, Tensor], dict[str, Any]], None]
    ) -> None:
        self.folder, self.write = folder, write
        self.loss = math.inf

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the lowest loss if its adapter is gone."""
        if not self.folder.best.is_file():
            self.loss = math.inf

    def state_dict(self) -> dict[str, Any]:
        """Return the lowest loss so far, as text because JSON has no infinity."""
        return {"loss": repr(self.loss)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the lowest loss from a checkpoint."""
        self.loss = float(state_dict["loss"])

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Compare the loss on every process, and write on the first."""
        loss = pl_module.val_loss
        if trainer.should_stop or trainer.global_step == 0 or not loss < self.loss:
            return
        self.loss = loss
        if trainer.is_global_zero and self.folder.is_there():  # if it is gone, the next save ends the run
            reached = {"steps": trainer.global_step, "val_loss": loss}
            try:
                self.write(self.folder.best, adapter_state(pl_module.model), reached)
            except UserError:
                if self.folder.is_there():
                    raise
