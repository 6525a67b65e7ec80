"""Where a run's processes come from, and what they exchange.

ddp: the base is whole on every device, read there by each process itself; the adapter's gradients are
averaged while the backward pass goes on. fsdp2: the base is cut over the devices and gathered a layer at
a time; the adapter, some MB, is whole everywhere, and its gradients are averaged once a step. With
tensor_parallel groups of devices share the heads and the rows; data parallelism is over the groups.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from lit_adapter.config import TrainerConfig
from lit_adapter.errors import UserError, counted


class ShardedStrategy(ModelParallelStrategy):
    """A frozen base cut over all processes by FSDP2, under an adapter that every process has whole.

    What is trained is no sharded tensor: clipping, optimizer, checkpoints and the adapter file are those
    of one process, and nothing of the base is ever gathered to save it.
    """

    lightning_restore_optimizer = True
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    load_model_state_dict = Strategy.load_model_state_dict
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint

    def model_to_device(self) -> None:
        """Leave everything where `configure_model` has put it: torch cannot move a cut parameter in use."""

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Average the gradients over the processes, then step as usual."""
        average_gradients([parameter for group in optimizer.param_groups for parameter in group["params"]])
        return super().optimizer_step(optimizer, closure, model, **kwargs)


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace the parameters' gradients by their mean over all processes, in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for gradient, mean in zip(
        gradients, together.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(mean.view_as(gradient))


def is_sharded(options: TrainerConfig) -> bool:
    """Tell whether the base is cut over the devices."""
    return options.strategy == "fsdp2"


def whole_because(options: TrainerConfig) -> str | None:
    """Return the setting for which the base has to be whole on every device; None where it may be cut."""
    if options.precision == "16-mixed":
        return "precision 16-mixed"
    return "base_precision fp8" if options.base_precision == "fp8" else None


def choose_strategy(options: TrainerConfig, device: torch.device) -> Strategy | str:
    """Return Lightning's strategy for a run."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if is_sharded(options):
        return ShardedStrategy(
            data_parallel_size=n_processes(options, device) // options.tensor_parallel,
            tensor_parallel_size=options.tensor_parallel,
            process_group_backend=backend,
        )
    several = options.num_nodes > 1 or options.devices != 1
    if options.strategy == "ddp" or (options.strategy == "auto" and several):
        # Every process reads the frozen base itself: without init_sync the first would send it to all.
        return DDPStrategy(process_group_backend=backend, broadcast_buffers=False, init_sync=False)
    return "auto"


def check_layout(options: TrainerConfig, device: torch.device) -> None:
    """Compare the wanted processes with the machine and with what a launcher has started.

    Raises:
        UserError: settings that do not go with the device or with a cut base, more devices than there are,
            a launcher that started another number of processes, or several nodes and nothing that would
            start the others.
    """
    _check_precision(options, device)
    whole = whole_because(options)
    if is_sharded(options) and whole:
        raise UserError(
            f"trainer.strategy is fsdp2, which does not go with trainer.{whole}; use bf16-true, or ddp"
        )
    _check_tensor_parallel(options, _per_node(options, device))
    gpu = device.type == "cuda"
    # Two processes can share a core, as a trial of several devices; many would only starve it.
    available = torch.cuda.device_count() if gpu else max(2, os.cpu_count() or 1)
    if isinstance(options.devices, int) and options.devices > available:
        kind = "GPUs" if gpu else "processor cores at most"
        raise UserError(
            f"trainer.devices is {options.devices}, but this machine has {available} {kind}; lower it"
        )
    started = _launched()
    if started is None:
        missing = [name for name in ("MASTER_ADDR", "NODE_RANK") if name not in os.environ]
        if options.num_nodes > 1 and missing:
            raise UserError(
                f"trainer.num_nodes is {options.num_nodes}, but nothing started this run on the other nodes; "
                "start it with torchrun or srun (docs/many_gpus.md), or set trainer.num_nodes 1"
            )
        return
    launcher, processes = started
    per_node = _per_node(options, device)
    if processes != n_processes(options, device):
        raise UserError(
            f"{launcher} started {counted(processes, 'process')}, but "
            f"trainer.num_nodes {options.num_nodes} times trainer.devices {per_node} is "
            f"{n_processes(options, device)}; make them equal"
        )


def _check_tensor_parallel(options: TrainerConfig, per_node: int) -> None:
    wanted = f"trainer.tensor_parallel is {options.tensor_parallel}"
    if options.tensor_parallel > 1 and not is_sharded(options):
        raise UserError(f"{wanted}, which needs trainer.strategy fsdp2, not {options.strategy}")
    if per_node % options.tensor_parallel:
        raise UserError(
            f"{wanted}, which does not divide the {per_node} of trainer.devices; "
            "devices that share heads are of one node"
        )


def _check_precision(options: TrainerConfig, device: torch.device) -> None:
    wanted = options.precision
    if wanted == "16-mixed" and device.type == "cpu":
        raise UserError("trainer.precision is 16-mixed, which needs a GPU; use bf16-true or 32-true on a CPU")
    exact = device.type == "cpu" or wanted not in ("auto", "bf16-true")
    if options.base_precision == "fp8" and exact:
        raise UserError(
            f"trainer.base_precision is fp8 with precision {wanted} on a {device.type}; "
            "it needs bf16-true and a GPU: use base_precision full"
        )


def launcher_plugins() -> list[Any]:
    """Return what Lightning must know of the launcher: on SLURM, that a run resumes by itself."""
    return [SLURMEnvironment(auto_requeue=False)] if _launched_by_slurm() else []


def n_processes(options: TrainerConfig, device: torch.device) -> int:
    """Return the processes of a run, on all its nodes."""
    return options.num_nodes * _per_node(options, device)


def _per_node(options: TrainerConfig, device: torch.device) -> int:
    """Return the processes of one node."""
    if options.devices == "auto":
        return torch.cuda.device_count() if device.type == "cuda" else 1
    return int(options.devices)


def _launched() -> tuple[str, int] | None:
    """Return a launcher's name and how many processes it started, or None without one."""
    if TorchElasticEnvironment.detect():
        return "torchrun", int(os.environ["WORLD_SIZE"])
    if _launched_by_slurm():
        return "SLURM", int(os.environ["SLURM_NTASKS"])
    by_hand = {"LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()
    return ("a launcher", int(os.environ["WORLD_SIZE"])) if by_hand else None


def _launched_by_slurm() -> bool:
    return not TorchElasticEnvironment.detect() and SLURMEnvironment.detect()
