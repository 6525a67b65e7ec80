"""The plan of a run, known before its base is loaded; it also describes the run in its adapter files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_adapter.config import Config
from lit_adapter.data.hub import is_hub_name
from lit_adapter.data.module import AlpacaDataModule
from lit_adapter.data.sources import as_names, title
from lit_adapter.errors import counted
from lit_adapter.model.adapter import adapter_shapes, parameter_counts
from lit_adapter.model.layout import base_shapes, n_numbers
from lit_adapter.text.template import Template
from lit_adapter.training.base import Base, InitialAdapter
from lit_adapter.training.length import few_steps, with_length, with_val_every
from lit_adapter.training.placement import Placement
from lit_adapter.training.preflight import (
    Sizes,
    check_disk,
    check_memory,
    free_memory,
    sizes,
    with_whole_layers,
)
from lit_adapter.training.run_identity import RunIdentity, run_identity
from lit_adapter.training.schedule import total_steps, warmup_steps
from lit_adapter.training.strategy import n_processes
from lit_adapter.weights.adapter_file import AdapterInfo, save_adapter


@dataclass(frozen=True)
class Plan:
    """A run that can be loaded and started."""

    config: Config
    """With its batch size, its epochs unless ``optim.max_steps`` is given, and ``trainer.val_every``."""
    base: Base
    placement: Placement
    template: Template
    steps: int
    """Optimizer steps of the run."""
    epochs: float | None
    """Passes over the training records: those of ``optim.max_steps``, else as set; None for a stream."""
    chosen: str
    """Which of batch size and epochs were chosen, and why; empty if the user has set both."""
    has_own_epochs: bool
    """The user has set ``optim.epochs``; they do not follow from the number of records or a resumed run."""
    n_records: int | None
    """Training records; None for a stream."""
    warmup: int
    """Optimizer steps in which the learning rate rises."""
    needed: Sizes
    """What the memory of a step depends on."""
    identity: RunIdentity

    @property
    def n_trained(self) -> int:
        """The number of trained parameters."""
        return n_numbers(adapter_shapes(self.config.adapter, self.base.config))


def make_plan(
    config: Config,
    base: Base,
    placement: Placement,
    initial: InitialAdapter,
    data: AlpacaDataModule,
    saved: RunIdentity,
) -> Plan:
    """Plan a run from what has been read; ``saved`` is the identity of the run that is resumed.

    Raises:
        UserError: the epochs or the warm-up do not fit the number of records.
    """
    has_own_epochs = config.optim.epochs is not None
    n_records, processes = data.n_records, n_processes(config.trainer, placement.device)
    config, chosen = with_length(config, n_records or 0, saved, processes)
    data.batch_size = config.optim.batch_size or 0
    steps_per_epoch = data.steps_per_epoch
    steps = total_steps(config.optim, steps_per_epoch or 0)
    epochs: float | None = config.optim.epochs or 0.0
    if config.optim.max_steps:
        epochs = steps / steps_per_epoch if steps_per_epoch else None
    config = with_val_every(config, steps, saved)
    free, _ = free_memory(config.trainer, placement.device)
    needed = sizes(config, base.config, data, placement)
    return Plan(
        config,
        base,
        placement,
        data.template,
        steps,
        epochs,
        chosen,
        has_own_epochs,
        n_records,
        warmup_steps(config.optim, steps),
        with_whole_layers(needed, config.trainer, free),
        run_identity(config, steps, **_facts(base, placement, initial, data)),
    )


def _facts(
    base: Base, placement: Placement, initial: InitialAdapter, data: AlpacaDataModule
) -> dict[str, Any]:
    """Return what a resumed run must share besides its configuration."""
    return {
        "base": base.identity.weights[:16],
        "tokenizer": base.identity.tokenizer[:16],
        "template": data.template.to_dict(),
        "precision": placement.precision,
        "init_from": initial.sha256,
        "base.bos_id": base.tokenizer.bos_id,
        "base.eos_id": base.tokenizer.eos_id,
        "base.stop_ids": sorted(base.tokenizer.stop_ids),
        **{f"base.{key}": value for key, value in base.config.computed().items()},
        **{f"data.{key}": value for key, value in data.identity().items()},
    }


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield the lines that tell a user the plan, with warnings.

    Raises:
        UserError: memory or disk do not suffice.
    """
    config, optim, base, steps = plan.config, plan.config.optim, plan.base.config, plan.steps
    needed, processes = plan.needed, n_processes(config.trainer, plan.placement.device)
    yield check_memory(needed, *free_memory(config.trainer, plan.placement.device))
    if needed.whole_layers:
        n_sharded = base.n_layer - needed.whole_layers
        yield f"layers: {needed.whole_layers} whole on each device, {n_sharded} sharded over {processes}"
    yield check_disk(Path(config.out), base, config, steps)
    yield (
        f"model: {plan.base.identity.name}, {n_numbers(base_shapes(base)):,} frozen parameters; adapter: "
        f"{plan.n_trained:,} trained ({parameter_counts(config.adapter, base)})"
    )
    batch_size = optim.batch_size or 0
    epochs = f", epochs {plan.epochs:.3g}" if plan.epochs is not None else ""
    yield (
        f"run: {counted(steps, 'step')} of {counted(batch_size, 'record')}{epochs}"
        f"{f' ({plan.chosen})' if plan.chosen else ''}; "
        f"lr {optim.peak_lr:g} (base_lr {optim.peak_lr * 256 / batch_size:g}{_lora_rate(config)}), "
        f"{optim.schedule}, "
        f"warm-up {counted(plan.warmup, 'step')}; {config.out}"
    )
    if optim.peak_lr == 0:
        yield "warning: the learning rate is 0, so nothing will be learned; set optim.lr"
    elif plan.warmup > steps / 2:
        yield (
            f"warning: the warm-up takes {plan.warmup} of the run's {counted(steps, 'step')}; "
            "lower optim.warmup (0.05 is usual) or train longer"
        )
    elif (few := few_steps(config, steps, plan.n_records or 0)) is not None:
        yield f"warning: {few}"
    why = plan.placement.executor.why_not_fast
    if why is not None:
        yield f"note: {why}: the layers run without the fused kernels, and more slowly"


def _lora_rate(config: Config) -> str:
    share = config.optim.lr_scale_lora if config.adapter.lora.rank else None
    return "" if share is None else f"; LoRA {share * config.optim.peak_lr:.2g}"


def write_adapter(
    plan: Plan, path: Path, state: dict[str, Tensor], summary: dict[str, Any], *, make_folder: bool = True
) -> None:
    """Write an adapter of a run, whole or not at all; ``summary`` has the steps and losses it has reached.

    With ``make_folder``, a missing folder is made.

    Raises:
        UserError: the file cannot be written.
    """
    config, base = plan.config, plan.base
    names = [name if is_hub_name(name) else Path(name).name for name in as_names(config.data.train)]
    training = {
        "data": title(names),
        "epochs": plan.epochs,
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
    save_adapter(path, state, info, make_folder=make_folder)
