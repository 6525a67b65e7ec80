"""From a plan to the model in memory, ready for Lightning."""

from __future__ import annotations

from torch import Tensor

from lit_adapter.device import own_device
from lit_adapter.model.adapter import attach, load_adapter_state
from lit_adapter.training.module import LitAdapter
from lit_adapter.training.plan import Plan
from lit_adapter.training.sharding import ShardedLitAdapter
from lit_adapter.training.signals import Signals
from lit_adapter.training.strategy import is_sharded
from lit_adapter.weights.load import empty_base, load_base


def load_module(plan: Plan, initial: dict[str, Tensor] | None, signals: Signals) -> LitAdapter:
    """Load the base, attach its adapter, and wrap both for Lightning.

    A base that is sharded over the processes is read later, when they are connected.

    Args:
        plan: the run.
        initial: tensors of its initial adapter, if any.
        signals: what the process is asked to do.

    Raises:
        UserError: the base cannot be read, or the initial adapter does not fit it.
    """
    config, base, placement = plan.config, plan.base, plan.placement
    sharded = is_sharded(config.trainer)
    if sharded:
        model = empty_base(base.folder, dtype=placement.dtype)
    else:
        model = load_base(base.folder, device=own_device(placement.device), dtype=placement.dtype)
    attach(model, config.adapter, config.seed)
    if initial is not None:
        load_adapter_state(model, initial, source=str(config.init_from))
    arguments = (model, config.optim, plan.steps, config.seed, signals)
    recompute = config.trainer.recompute
    if sharded:
        return ShardedLitAdapter(*arguments, base=base.folder, dtype=placement.dtype, recompute=recompute)
    if placement.device.type == "cuda":
        from lit_adapter.model import fused  # needs Triton, which comes with CUDA builds of torch

        fused.prepare(model, float8=config.trainer.base_precision == "fp8")
    return LitAdapter(*arguments, recompute=recompute)
