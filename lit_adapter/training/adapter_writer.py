"""The adapter files of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lit_adapter.data.hub import is_hub_name
from lit_adapter.training.plan import Plan
from lit_adapter.weights.adapter_file import AdapterInfo, save_adapter


def write_adapter(plan: Plan, path: Path, state: dict[str, Tensor], summary: dict[str, Any]) -> None:
    """Write an adapter of a run, whole or not at all.

    Args:
        plan: the run.
        path: the file.
        state: the adapter's tensors by name.
        summary: how far the run has come: steps and losses.

    Raises:
        UserError: the file cannot be written.
    """
    config, base, source = plan.config, plan.base, plan.config.data.train
    training = {
        "data": source if is_hub_name(source) else Path(source).name,
        "epochs": config.optim.epochs,
        "batch_size": config.optim.batch_size,
        "lr": config.optim.peak_lr,
    }
    info = AdapterInfo(
        adapter=config.adapter,
        base=base.identity,
        base_config=base.config.to_hf(),
        template=plan.template,
        mask_prompt=config.data.mask_prompt,
        training=training | summary,
    )
    save_adapter(path, state, info)
