"""Every private part of Lightning that this package touches, and why no public one serves.

`tests/test_lightning_internals.py` has a test for each; it names the function when an upgrade moves a part.
"""

from __future__ import annotations

from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities import rank_zero_only

CHECKPOINT_KEYS = frozenset({"state_dict", "optimizer_states", "global_step", "loops", "callbacks"})
"""What Lightning puts into a checkpoint; its documentation lists the contents but not the keys."""


def rank() -> int:
    """Return this process's rank. Until there is a Trainer, Lightning provides it only here."""
    return int(getattr(rank_zero_only, "rank", 0))


def validate_now(trainer: Trainer) -> None:
    """Run the validation loop from inside a hook of training.

    `val_check_interval` validates neither before the first step, nor after a last step that it does not
    divide, nor at a resume whose validation was cut off; `Trainer.validate` cannot be called during `fit`.
    """
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
    first_iteration = connector._first_loop_iter  # of training; the validation loop overwrites it
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
    connector._first_loop_iter = first_iteration


def leave_validation() -> NoReturn:
    """End the validation loop from its `on_validation_batch_start`; `Trainer.should_stop` does not end it."""
    raise StopIteration


def let_go_on(checkpoint: dict[str, Any]) -> None:
    """Let a run that has ended be resumed with more steps.

    Lightning takes the last batch of the shorter run for the last of this one, and no setting changes that.
    """
    checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False


class _NoHandlers(_SignalConnector):
    def register_signal_handlers(self) -> None:
        """Leave the signals to `Signals`."""


def leave_signals_alone(trainer: Trainer) -> None:
    """Keep Lightning from handling SIGTERM, which no setting does.

    Its handler starts a broadcast wherever the process happens to be, which hangs. For the same purpose its
    training loop broadcasts a flag before every step, which makes a GPU wait for the CPU.
    """
    trainer._signal_connector = _NoHandlers(trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


class Bar(RichProgressBar):
    """Lightning's progress bar without a version, an epoch (it is the whole run) and steps per second."""

    def configure_columns(self, trainer: Any) -> list[Any]:
        """Return the columns without steps per second, which are 0.00 if a step takes minutes."""
        return [c for c in super().configure_columns(trainer) if not isinstance(c, ProcessingSpeedColumn)]

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """Return loss and tokens/s, rounded for reading."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return {name: f"{value:,.0f}" if name == "tokens/s" else value for name, value in shown.items()}

    def _get_train_description(self, current_epoch: int) -> str:
        """Return the title, which only this method sets."""
        return "training"
