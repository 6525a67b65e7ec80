"""What a checkpoint records about its run: what a resumed run must share, and what it may change."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lit_adapter.config import Config
from lit_adapter.files.paths import without_home
from lit_adapter.model.config import AdapterConfig

BEFORE = Config(adapter=AdapterConfig(prompt_length=10, gate="tanh", norms=False))
"""The settings that a checkpoint of an earlier version does not name, with the values that it had then."""


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
    """Return the identity of a run; ``facts`` are what it must share besides its configuration."""
    values = asdict(config)
    shared: dict[str, Any] = {"seed": config.seed}
    shared |= {f"adapter.{key}": value for key, value in values["adapter"].items()}
    is_v1 = config.adapter.version == "v1"  # v2 trains norms whatever the setting says
    shared["adapter.norms"] = is_v1 and "norms" in config.adapter.parts
    data = ("mask_prompt", "last_answer_only", "weights", "max_length", "drop_duplicates", "stream")
    shared |= _section(values, "data", *data)
    shared |= _section(values, "optim", "batch_size", "schedule", "warmup", "min_lr_ratio")
    shared |= {"base_precision": config.trainer.base_precision}
    changeable = {key: without_home(values[key]) for key in ("base", "out")}
    rates = ("lr", "base_lr", "lr_scale_v2", "lr_scale_norms", "lr_scale_lora")
    others = ("weight_decay", "betas", "eps", "clip", "row_tokens")
    changeable |= _section(values, "optim", "epochs", "max_steps", *rates, *others)
    changeable |= _section(values, "data", "workers")
    changeable |= _section(values, "trainer", *values["trainer"])
    return RunIdentity(plain(shared | facts), plain(changeable), steps)


def _section(values: dict[str, Any], section: str, *keys: str) -> dict[str, Any]:
    return {f"{section}.{key}": values[section][key] for key in keys}


def plain(value: Any) -> Any:
    """Return nested values with lists for tuples, as YAML and JSON have them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
