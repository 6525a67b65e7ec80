"""The device of a run, its precision and its executor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lit_adapter.config import Config
from lit_adapter.device import choose_device, choose_dtype, own_device
from lit_adapter.errors import UserError
from lit_adapter.model.block_weights import BESIDE_FLOAT8
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.executors import Executor, Setting, choose_for_training
from lit_adapter.streams import Say
from lit_adapter.training.sharding import check_sharding
from lit_adapter.training.strategy import check_layout


@dataclass(frozen=True)
class Placement:
    """Where and how a run computes."""

    device: torch.device
    precision: str
    """Lightning's name for it, never auto."""
    executor: Executor
    """What computes the blocks, and why it is not the fast one of the device."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the base's weights."""
        return dtype_of(self.precision)


def choose_placement(config: Config, base: LlamaConfig, saved_precision: str | None, say: Say) -> Placement:
    """Choose device and precision, and make the device CUDA's current one.

    Precision auto keeps that of a resumed run, ``saved_precision``; ``say`` gets a line about its choice.

    Raises:
        UserError: settings that the machine, its devices or the base cannot satisfy.
    """
    options = config.trainer
    device = choose_device(options.accelerator)
    check_layout(options, device)
    check_sharding(options, base)
    if device.type == "cuda":
        torch.cuda.set_device(own_device(device))  # kernels use the current device, before Lightning sets it
    precision: str = options.precision
    if precision == "auto":
        faster = "bf16-true" if choose_dtype(None, device) == torch.bfloat16 else "32-true"
        precision, why = faster, f"the faster one on this {device.type}; adapter and optimizer in fp32"
        if saved_precision is not None:
            precision, why = saved_precision, "that of the resumed run"
        say(f"precision: {precision}, {why}")
    setting = Setting(device, dtype_of(precision))
    executor = choose_for_training(base, config.adapter, setting, options.tensor_parallel)
    no_float8 = executor.why_not_fast or (BESIDE_FLOAT8 if "linears" in config.adapter.parts else None)
    if no_float8 is not None and options.base_precision == "fp8":
        raise UserError(f"trainer.base_precision is fp8, but {no_float8}; use base_precision full")
    return Placement(device, precision, executor)


def dtype_of(precision: str) -> torch.dtype:
    """Return the precision of the base's weights; the adapter is fp32 in any case."""
    return torch.bfloat16 if precision == "bf16-true" else torch.float32
