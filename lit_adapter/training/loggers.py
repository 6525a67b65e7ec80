"""Where curves go: TensorBoard, CSV, Weights & Biases or MLflow, through Lightning's loggers.

Scalars go through `Logger.log_metrics`. Pictures, texts and settings have no common interface; the functions
here give each logger what it can show.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger
from torch import Tensor

from lit_adapter.config import dotted
from lit_adapter.errors import UserError
from lit_adapter.streams import Say
from lit_adapter.training.curves import Curves

PROJECT = "lit_adapter"
"""Project, or experiment, of the runs at Weights & Biases and MLflow."""
PIXELS = 12
"""Width of an attention head, and height of a layer, in the picture of the gates."""


def check_logger(name: str) -> None:
    """Refuse, by a UserError, a logger whose package is not installed."""
    if name in ("wandb", "mlflow") and find_spec(name) is None:
        raise UserError(f"trainer.logger is {name}, which is not installed; pip install -e '.[{name}]'")


def make_logger(name: str, folder: Path, drawn_from: int | None, say: Say) -> Logger:
    """Return the logger of a run in ``folder``.

    ``drawn_from`` is the first step that a resumed run draws, for TensorBoard. With the others, each start is
    another version, or another run of the same name.
    """
    name_of_run = folder.resolve().name
    if name == "csv":
        return CSVLogger(str(folder), name="csv", flush_logs_every_n_steps=1)
    if name == "wandb":
        return WandbLogger(project=PROJECT, name=name_of_run, save_dir=str(folder))
    if name == "mlflow":
        # Without MLFLOW_TRACKING_URI it writes files, which need neither a server nor a database.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        return MLFlowLogger(PROJECT, run_name=name_of_run, save_dir=str(folder.resolve() / "mlruns"))
    return Curves(folder, drawn_from, say)


def log_settings(logger: Logger | None, settings: dict[str, Any]) -> None:
    """Give the logger a run's configuration, by dotted names."""
    known = {name: value for name, value in dotted(settings).items() if name != "out"}
    if isinstance(logger, Curves):
        logger.log_settings(known)
    elif logger is not None:
        logger.log_hyperparams(known)


def draw_layers(logger: Logger, heat: Tensor, by_head: Tensor, step: int) -> None:
    """Draw the strengths of the gates as a picture.

    Args:
        logger: any of these here; a CSV file takes no pictures.
        heat: mean strength of the heads of each adapted layer, ``[L, H or 1]``, finite and not negative.
        by_head: the same for every layer, unmodified, ``[N, H or 1]``; NaN for those without a prefix.
        step: of the run.
    """
    shades = heat / heat.max().clamp(min=1e-8)
    picture = shades.repeat_interleave(PIXELS, 0).repeat_interleave(PIXELS, 1)
    if isinstance(logger, Curves):
        logger.experiment.add_image("prefix/layers_by_heads", picture[None], step)
        logger.experiment.add_histogram("prefix/strengths", heat, step)
        logger.experiment.add_tensor("prefix/strength_by_head", by_head, step)
    elif isinstance(logger, WandbLogger):
        logger.log_image("prefix/layers_by_heads", [picture.numpy()])
    elif isinstance(logger, MLFlowLogger):
        array = (picture * 255).byte().numpy()
        logger.experiment.log_image(logger.run_id, array, key="prefix--layers_by_heads", step=step)


def write_text(logger: Logger, name: str, text: str, step: int) -> None:
    """Write a text in Markdown beside the curves; a CSV file takes none."""
    if isinstance(logger, Curves):
        logger.experiment.add_text(name, text, step)
    elif isinstance(logger, WandbLogger):
        logger.log_text(name, columns=["step", "text"], data=[[str(step), text]])
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(logger.run_id, text, f"{name}/step-{step}.md")


def flush(logger: Logger) -> None:
    """Write what a logger still holds back."""
    if isinstance(logger, Curves):
        logger.experiment.flush()
    else:
        logger.save()
