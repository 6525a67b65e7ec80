"""How many processes a run has, and what they exchange.

ddp: every process reads the whole base; the adapter's gradients are averaged during the backward pass. fsdp2:
the base is sharded over the devices and gathered one layer at a time; the adapter, some MB, is whole on every
device, and its gradients are averaged once a step. With tensor_parallel, each group of devices computes the
same rows with the heads divided among them; data parallelism is over the groups.
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
    """A frozen base sharded over all processes by FSDP2, with an adapter that is whole on every process.

    No trained parameter is sharded, so clipping, optimizer, checkpoints and adapter file are those of one
    process, and saving gathers nothing. The methods taken from `Strategy` replace those for sharded
    parameters.
    """

    lightning_restore_optimizer = True
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    load_model_state_dict = Strategy.load_model_state_dict
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint

    def model_to_device(self) -> None:
        """Do nothing: `configure_model` has placed everything, and a sharded parameter in use cannot move."""

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Average the gradients over the processes, then step as usual."""
        average_gradients([parameter for group in optimizer.param_groups for parameter in group["params"]])
        return super().optimizer_step(optimizer, closure, model, **kwargs)


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace the parameters' gradients by their mean over all processes, with one collective."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    means = together.split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def is_sharded(options: TrainerConfig) -> bool:
    """Return whether the base is sharded over the devices."""
    return options.strategy == "fsdp2"


def whole_because(options: TrainerConfig) -> str | None:
    """Return the setting that rules out a sharded base, or None."""
    if options.precision == "16-mixed":
        return "precision 16-mixed"
    return "base_precision fp8" if options.base_precision == "fp8" else None


def choose_strategy(options: TrainerConfig, device: torch.device) -> Strategy | str:
    """Return Lightning's strategy for a run."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if is_sharded(options):
        return ShardedStrategy(
            data_parallel_size=n_shares(options, device),
            tensor_parallel_size=options.tensor_parallel,
            process_group_backend=backend,
        )
    several = options.num_nodes > 1 or options.devices != 1
    if options.strategy == "ddp" or (options.strategy == "auto" and several):
        # Every process reads the frozen base itself; with init_sync the first would send it to the others.
        return DDPStrategy(process_group_backend=backend, broadcast_buffers=False, init_sync=False)
    return "auto"


def check_layout(options: TrainerConfig, device: torch.device) -> None:
    """Check the number of processes against the machine and the launcher, and the settings that depend on it.

    Raises:
        UserError: settings that the device or a sharded base does not allow, more devices than there are, a
            launcher that started another number of processes, or several nodes without a launcher.
    """
    _check_precision(options, device)
    whole = whole_because(options)
    if is_sharded(options) and whole:
        raise UserError(f"trainer.strategy is fsdp2, which excludes trainer.{whole}; use bf16-true, or ddp")
    _check_tensor_parallel(options, processes_per_node(options, device))
    if options.whole_layers not in ("auto", 0) and not is_sharded(options):
        raise UserError(
            f"trainer.whole_layers is {options.whole_layers}, which needs trainer.strategy fsdp2, "
            f"not {options.strategy}; otherwise all layers are whole"
        )
    gpu = device.type == "cuda"
    # Two processes may share a core, to try several devices; more would only be slow.
    available = torch.cuda.device_count() if gpu else max(2, os.cpu_count() or 1)
    if isinstance(options.devices, int) and options.devices > available:
        kind = "GPUs" if gpu else "CPU cores"
        raise UserError(
            f"trainer.devices is {options.devices}, but this machine has {available} {kind}; lower it"
        )
    started = launched()
    if started is None:
        missing = [name for name in ("MASTER_ADDR", "NODE_RANK") if name not in os.environ]
        if options.num_nodes > 1 and missing:
            raise UserError(
                f"trainer.num_nodes is {options.num_nodes}, but nothing started this run on the other nodes; "
                "start it with torchrun or srun (docs/many_gpus.md), or set trainer.num_nodes 1"
            )
        return
    launcher, processes = started
    per_node = processes_per_node(options, device)
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
            f"{wanted}, which does not divide trainer.devices, {per_node}; "
            "tensor parallelism stays within a node"
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
    """Return the plugin that keeps Lightning from requeueing a SLURM job, which the job's script does."""
    return [SLURMEnvironment(auto_requeue=False)] if _launched_by_slurm() else []


def n_processes(options: TrainerConfig, device: torch.device) -> int:
    """Return the number of processes of a run, on all its nodes."""
    return options.num_nodes * processes_per_node(options, device)


def n_shares(options: TrainerConfig, device: torch.device) -> int:
    """Return how many shares a step's rows are divided into; a tensor-parallel group computes one share."""
    return n_processes(options, device) // options.tensor_parallel


def processes_per_node(options: TrainerConfig, device: torch.device) -> int:
    """Return the number of processes of one node."""
    if options.devices == "auto":
        return torch.cuda.device_count() if device.type == "cuda" else 1
    return int(options.devices)


def launched() -> tuple[str, int] | None:
    """Return the launcher's name and the number of processes it started, or None without a launcher."""
    if TorchElasticEnvironment.detect():
        return "torchrun", int(os.environ["WORLD_SIZE"])
    if _launched_by_slurm():
        return "SLURM", int(os.environ["SLURM_NTASKS"])
    by_hand = {"LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()
    return ("a launcher", int(os.environ["WORLD_SIZE"])) if by_hand else None


def _launched_by_slurm() -> bool:
    return not TorchElasticEnvironment.detect() and SLURMEnvironment.detect()
