"""The executors: ways to compute the blocks of a model, and the one place that chooses among them.

    modules       `Block.compute`: every model on every device
    fused         `fused`: training on CUDA, a block as one autograd node
    CUDA decoding `fused_decode`: prompts and decode steps on CUDA
    CPU decoding  `cpu_decode`: decode steps on a CPU

A fast executor has a function ``unsupported(model, setting)``, which returns why it cannot compute a model
exactly as the modules would. It names what it knows; `survey.obstacle` finds everything else. A kernel that
turns out not to compile raises `KernelError`, and its caller continues with the modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Literal, TypeVar

import torch

from lit_adapter.errors import shorten
from lit_adapter.model.adapter import attach
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.llama import Llama, empty_llama

T = TypeVar("T")
Purpose = Literal["training", "decoding"]
"""Training computes packed rows with gradients; decoding reads prompts into a cache and adds tokens."""


@dataclass(frozen=True)
class Setting:
    """Where and in which precision a model is computed."""

    device: torch.device
    dtype: torch.dtype
    """Of the base's weights."""

    @classmethod
    def of(cls, model: Llama) -> Setting:
        """Return the setting of a loaded model."""
        weight = model.embed_tokens.weight
        return cls(weight.device, weight.dtype)


@dataclass(frozen=True)
class Executor:
    """A choice: an executor, and why it is not the fast one of the device."""

    name: Literal["modules", "fused", "CUDA decoding", "CPU decoding"]
    why_not_fast: str | None = None


class KernelError(RuntimeError):
    """A kernel cannot be compiled on this device. The modules compute the same without it.

    Args:
        kernel: its name.
        cause: what the compiler says.
    """

    def __init__(self, kernel: str, cause: BaseException) -> None:
        said = " ".join(str(cause).split())
        super().__init__(f"the kernel {kernel} does not compile on this device ({shorten(said, 160)})")


_given_up: list[KernelError] = []


def give_up_kernels(error: KernelError) -> None:
    """From now on, leave everything that this process computes to the modules."""
    _given_up.append(error)


def despite_kernels(work: Callable[[], T], give_up: Callable[[KernelError], None]) -> T:
    """Do some work, and do it again after ``give_up`` if one of its kernels does not compile.

    ``give_up`` leaves what follows to the modules, or raises; it must be safe to begin the work twice.
    """
    try:
        return work()
    except KernelError as error:
        give_up(error)
        return work()


def kernels_given_up() -> str | None:
    """Return why this process no longer uses kernels; None while it does."""
    return str(_given_up[0]) if _given_up else None


_FAST: dict[tuple[str, Purpose], tuple[Executor, str]] = {
    ("cuda", "training"): (Executor("fused"), "cuda_support"),
    ("cuda", "decoding"): (Executor("CUDA decoding"), "cuda_support"),
    ("cpu", "decoding"): (Executor("CPU decoding"), "cpu_decode"),
}


def choose(model: Llama, purpose: Purpose, setting: Setting | None = None) -> Executor:
    """Return the executor for a model.

    Args:
        model: with its adapter attached; on the meta device for a choice before loading.
        purpose: what is computed.
        setting: device and precision of the model when it is loaded; by default those that it has now.
    """
    setting = Setting.of(model) if setting is None else setting
    fast = _FAST.get((setting.device.type, purpose))
    if fast is None:
        return Executor("modules")
    if purpose == "decoding" and model.n_shards > 1:
        return Executor("modules", f"{model.n_shards} processes share the attention heads")
    if purpose == "decoding" and model.is_sharded:
        return Executor("modules", "the model is sharded")
    executor, module = fast
    # Imported here: these modules import this one.
    why = import_module(f"lit_adapter.model.{module}").unsupported(model, setting)
    if setting.device.type == "cuda":
        why = why or kernels_given_up()
    return executor if why is None else Executor("modules", why)


def choose_for_training(
    config: LlamaConfig, adapter: AdapterConfig, setting: Setting, tensor_parallel: int = 1
) -> Executor:
    """Return the executor that will train a model which is not loaded yet.

    Args:
        config: sizes of the base.
        adapter: sizes and form of the adapter.
        setting: device and precision of the run.
        tensor_parallel: processes that share the attention heads.
    """
    # One block of each kind decides, adapted where any is.
    alike = {config.kind_of(layer): layer for layer in range(config.n_layer)}
    model = empty_llama(config.of_layers(sorted(alike.values())))
    attach(model, replace(adapter, layers=len(alike) if adapter.prompt_length else None))
    model.n_shards = tensor_parallel
    return choose(model, "training", setting)
