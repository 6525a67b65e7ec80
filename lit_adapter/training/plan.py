"""The plan of a run, said before it starts: what is trained, how long, at which rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from lit_adapter.config import Config
from lit_adapter.errors import counted
from lit_adapter.model.adapter import adapter_parameters, parameter_counts
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.layout import base_shapes
from lit_adapter.model.llama import Llama
from lit_adapter.training.schedule import warmup_steps


def announce(
    config: Config,
    base: LlamaConfig,
    name: str,
    model: Llama,
    steps: int,
    unfused: str | None,
    say: Callable[[str], None],
) -> None:
    """Say parameters, steps and schedule, and warn of a rate of 0, a long warm-up, or slow blocks.

    Args:
        config: the run.
        base: the base's sizes.
        name: the base's name.
        model: the base with its adapter.
        steps: optimizer steps of the run.
        unfused: why the CUDA kernels are not used on a GPU, if so.
        say: gets the lines.
    """
    optim, warmup = config.optim, warmup_steps(config.optim, steps)
    trained = sum(parameter.numel() for _, parameter in adapter_parameters(model))
    frozen = sum(math.prod(shape) for shape in base_shapes(base).values())
    say(
        f"model: {name}, {frozen:,} frozen parameters; adapter: {trained:,} trained "
        f"({parameter_counts(config.adapter, base)})"
    )
    base_lr = optim.peak_lr * 256 / optim.batch_size
    say(
        f"run: {counted(steps, 'step')} of {counted(optim.batch_size, 'record')}; "
        f"lr {optim.peak_lr:g} (base_lr {base_lr:g}), {optim.schedule}, "
        f"warm-up {counted(warmup, 'step')}; {config.out}"
    )
    if optim.peak_lr == 0:
        say("warning: the learning rate is 0, so nothing will be learned; set optim.lr")
    elif warmup > steps / 2:
        say(
            f"warning: the warm-up takes {warmup} of the run's {counted(steps, 'step')}; "
            "lower optim.warmup (0.05 is usual) or train longer"
        )
    if unfused is not None:
        say(f"note: {unfused}: the layers are computed without the kernels made for them, and slower")
