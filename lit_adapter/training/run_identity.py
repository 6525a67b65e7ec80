"""What a checkpoint says of its run: what a resumed run must share with it, and what it may change."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lit_adapter import files
from lit_adapter.config import Config


@dataclass(frozen=True)
class RunIdentity:
    """Plain values, as JSON has them; a checkpoint stores the fields under their names."""

    identity: dict[str, Any]
    """What a resumed run must share, by configuration key."""
    changeable: dict[str, Any]
    """Settings that a resumed run may change, by configuration key."""
    steps: int
    """Optimizer steps of the run."""


def run_identity(config: Config, steps: int = 0, **facts: Any) -> RunIdentity:
    """Return the identity of a run; ``facts`` are what it must share beside its configuration."""
    return RunIdentity(plain(_identity(config) | facts), plain(_changeable(config)), steps)


def plain(value: Any) -> Any:
    """Return nested values with lists for tuples, as YAML and JSON have them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _identity(config: Config) -> dict[str, Any]:
    values = asdict(config)
    data = {f"data.{key}": values["data"][key] for key in ("mask_prompt", "max_length")}
    optim = {
        f"optim.{key}": values["optim"][key] for key in ("batch_size", "schedule", "warmup", "min_lr_ratio")
    }
    adapter = {f"adapter.{key}": value for key, value in values["adapter"].items()}
    base_precision = {"base_precision": config.trainer.base_precision}
    return {"seed": config.seed, **adapter, **data, **optim, **base_precision}


def _changeable(config: Config) -> dict[str, Any]:
    values = asdict(config)
    found = {key: files.without_home(values[key]) for key in ("base", "out")}
    optim = ("epochs", "max_steps", "lr", "base_lr", "lr_scale_v2", "weight_decay", "betas", "eps", "clip")
    for section, keys in (
        ("optim", (*optim, "row_tokens")),
        ("data", ("workers",)),
        ("trainer", tuple(values["trainer"])),
    ):
        found |= {f"{section}.{key}": values[section][key] for key in keys}
    return found
