"""TensorBoard's event files, which are appended to, not renamed into place. A run can do without them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from lit_adapter.streams import Say

LOSSES = ("loss/held_out", "loss/train")
"""The curves whose newest values the HPARAMS page shows."""
LORA_ON, LORA_RANK = "adapter.lora.on", "adapter.lora.rank"
VARIED = ("adapter.gate", LORA_RANK, "adapter.prompt_length", "optim.lr", "seed")
"""Settings in which runs differ most often."""


class Curves(TensorBoardLogger):
    """Writes ``RUN/tensorboard``; if it cannot, for example on a full disk, warns once and the run goes on.

    ``purge_step`` is the first step that a resumed run draws; points of earlier starts from there on are
    hidden.
    """

    def __init__(self, folder: Path, purge_step: int | None, say: Say) -> None:
        super().__init__(
            str(folder), name="", version="tensorboard", default_hp_metric=False, purge_step=purge_step
        )
        self.say = say
        self._guarded: _Guarded | None = None
        # TensorBoard writes in a thread, whose traceback would precede the one-line warning.
        if getattr(threading.excepthook, "func", None) is not _quiet:
            threading.excepthook = partial(_quiet, threading.excepthook)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, made on first use."""
        if self._guarded is None:
            self._guarded = _Guarded(lambda: super(Curves, self).experiment, self.log_dir, self.say)
        return self._guarded

    def log_settings(self, settings: dict[str, Any]) -> None:
        """Fill the page HPARAMS: settings, beside the newest losses, which it takes from the curves.

        Settings that are off, and those of where and how the run is computed, would hide the interesting
        columns.
        """
        chosen = {name: value for name, value in settings.items() if not name.startswith("trainer.")}
        known = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in chosen.items()
            if name == "seed" or (value not in (None, False, 0) and (name != LORA_ON or settings[LORA_RANK]))
        }
        experiment, *rest = hparams(known, dict.fromkeys(LOSSES, 0.0))
        _put_first(experiment, VARIED)
        for summary in (experiment, *rest):
            self.experiment.add_summary(summary)


def _put_first(experiment: Any, names: Sequence[str]) -> None:
    """Put these settings first: the page shows five initially, beginning with those marked as differing."""
    content = experiment.value[0].metadata.plugin_data
    known = HParamsPluginData.FromString(content.content)
    for setting in known.experiment.hparam_infos:
        setting.differs = setting.name in names
    content.content = known.SerializeToString()


def _quiet(hook: Callable[[Any], Any], failure: Any) -> None:
    """Pass a thread's failure to ``hook``, unless TensorBoard's thread could not write."""
    by_tensorboard = type(failure.thread).__module__.startswith("tensorboard")
    if not (by_tensorboard and isinstance(failure.exc_value, OSError)):
        hook(failure)


class _Guarded:
    """A `SummaryWriter` whose methods do nothing after a write has failed."""

    def __init__(self, make: Callable[[], Any], folder: str, say: Say) -> None:
        self._make, self._folder, self._say = make, folder, say
        self._writer: Any = None
        self._failed = False

    def add_summary(self, summary: Any) -> None:
        """Write what `SummaryWriter` has no method for."""
        self._call(lambda writer: writer.file_writer.add_summary(summary))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self._call(lambda writer: getattr(writer, name)(*args, **kwargs))

    def _call(self, act: Callable[[Any], Any]) -> None:
        if self._failed:
            return
        try:
            self._writer = self._writer or self._make()
            act(self._writer)
        except OSError as error:
            self._failed = True
            self._say(f"warning: {self._folder}: {error.strerror}; no more curves, but training goes on")
