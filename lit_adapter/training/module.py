"""The Lightning module: one batch is one optimizer step, whatever it takes to compute it.

A `StepBatch` carries the step's rows and the number of targets of the whole step, over all rows and all
processes. Each row's summed loss is divided by that number before its backward pass, so that the step
does not depend on how it is divided into rows. Optimization is manual because the rows of a step are
accumulated here; clipping and unscaling stay where Lightning's precision plugins expect them.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lit_adapter import streams
from lit_adapter.config import OptimConfig
from lit_adapter.data.module import share_of_rows
from lit_adapter.data.packing import StepBatch
from lit_adapter.errors import UserError, counted
from lit_adapter.model.adapter import (
    adapter_parameters,
    adapter_state,
    load_adapter_state,
    parts_of,
    trained_modules,
)
from lit_adapter.model.attention import PackedRow
from lit_adapter.model.executors import Executor, KernelError, choose, despite_kernels, give_up_kernels
from lit_adapter.model.llama import Llama
from lit_adapter.model.loss import row_loss
from lit_adapter.training.schedule import learning_rate
from lit_adapter.training.signals import Signals

MEASURED = ("last", "bad_steps_in_a_row", "skipped_steps", "validated_step", "val_loss")
"""Attributes of the module that a checkpoint keeps."""
WITHOUT_KERNELS = "the run goes on without kernels, which is slower"


class LitAdapter(LightningModule):
    """Trains the adapter of a frozen model; its state is the adapter alone.

    ``model`` is the frozen base with its adapter attached; ``seed`` is that of the prefix dropout. All
    processes exchange ``signals`` along with the step's loss. With ``recompute``, the backward pass
    recomputes the blocks; see `row_loss`.
    """

    def __init__(
        self,
        model: Llama,
        config: OptimConfig,
        total_steps: int,
        seed: int = 0,
        signals: Signals | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.config, self.total_steps, self.seed = model, config, total_steps, seed
        self.recompute, self.signals = recompute, signals or Signals()
        self._chosen: dict[bool, Executor] = {}
        self.has_dropout = any(getattr(module, "dropout", 0) for module in model.modules())
        self.bad_steps_in_a_row, self.skipped_steps = 0, 0
        self.validated_step, self.val_loss = -1, math.nan
        self.last: dict[str, float] = {}
        """Loss, gradient norm, learning rate and tokens of the last step, for the report."""
        self.step_seconds = 0.0
        """How long the last step took; its loss was read then, so the device was done."""

    def transfer_batch_to_device(self, batch: StepBatch, device: torch.device, *unused: Any) -> StepBatch:
        """Leave the step on the CPU, where its rows are planned; they go to the device one at a time."""
        return batch

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Accumulate the step's rows, then update the adapter."""
        started = time.perf_counter()
        optimizer: Any = self.optimizers()
        rate = learning_rate(self.config, batch.step, self.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        try:
            total = self._accumulate(batch)
        except KernelError as error:  # some rows may be accumulated already
            self.go_on_with_modules(error)
            optimizer.zero_grad()
            total = self._accumulate(batch)
        self.last = {"tokens": batch.n_tokens}
        self._sum_and_targets = total, batch.n_targets
        optimizer.step()
        optimizer.zero_grad()
        self.last["lr"] = optimizer.param_groups[0]["lr"]
        self._data.finish(batch)
        self._count_bad_steps(batch.step)
        self.step_seconds = time.perf_counter() - started

    def _accumulate(self, batch: StepBatch) -> Tensor:
        """Accumulate the gradients of the step's rows, and return the sum of their losses."""
        if self.has_dropout:
            seed_dropout(self.seed, batch.step, self.global_rank)
        total = torch.zeros((), device=self.device)
        _, n_shares = share_of_rows(self.trainer)
        strategy: Any = self.trainer.strategy
        for number, row in enumerate(batch.rows, start=1):
            waits = number < len(batch.rows) and isinstance(strategy, ParallelStrategy)
            with strategy.block_backward_sync() if waits else nullcontext():
                loss = row_loss(self.model, row, recompute=self.recompute, executor=self._executor())
                # Gradients are averaged over processes, but the step's loss is a sum over their rows.
                self.manual_backward(loss * (n_shares / batch.n_targets))
            total += loss.detach()
        return total

    def go_on_with_modules(self, error: KernelError) -> None:
        """Leave the rest of the run to the modules.

        Raises:
            UserError: this is one of several processes, and the others may be waiting for its gradients.
        """
        if self.trainer.world_size > 1:
            raise UserError(f"process {self.global_rank}: {error}; --resume last continues") from error
        give_up_kernels(error)
        self._chosen.clear()
        streams.say(f"warning: {error}; {WITHOUT_KERNELS}")

    def _executor(self) -> Executor:
        """Return the executor for training or evaluation mode, chosen once: a survey takes time."""
        if self.training not in self._chosen:
            self._chosen[self.training] = choose(self.model, "training")
        return self._chosen[self.training]

    def _over_processes(self, loss: Tensor) -> float:
        """Return the summed losses of all processes; the same message exchanges received signals."""
        if self.trainer.world_size == 1:
            return float(loss)
        values = torch.tensor([0.0, *self.signals.flags()], device=loss.device)
        values[0] = loss
        total, *flags = self.trainer.strategy.reduce(values, reduce_op="sum").tolist()
        self.signals.agree(flags)
        return total / self.n_copies

    @property
    def n_copies(self) -> int:
        """The number of processes that compute the same rows."""
        return self.trainer.world_size // share_of_rows(self.trainer)[1]

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Measure and clip the unscaled gradient; drop it if it or the loss is not finite.

        Gradients and loss are already summed over processes, so that all of them decide alike.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        bound = self.config.clip if self.config.clip is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, bound)
        total, n_targets = self._sum_and_targets  # read here, so that the host waits for the GPU once
        self.last |= {"loss": self._over_processes(total) / n_targets, "grad_norm": float(norm)}
        if not math.isfinite(self.last["grad_norm"] + self.last["loss"]):
            for parameter in parameters:
                parameter.grad = None

    def _count_bad_steps(self, step: int) -> None:
        if math.isfinite(self.last["grad_norm"] + self.last["loss"]):
            self.bad_steps_in_a_row = 0
            return
        self.bad_steps_in_a_row += 1
        self.skipped_steps += 1
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and math.isfinite(self.last["loss"]) and scaler.get_scale() > 1:
            self.bad_steps_in_a_row = 0  # the scaler is still looking for its scale
            return
        if self.bad_steps_in_a_row >= self.config.max_bad_steps:
            raise UserError(
                f"step {step + 1}: loss {self.last['loss']}, gradient norm {self.last['grad_norm']}; "
                f"skipped {counted(self.bad_steps_in_a_row, 'step')} in a row, so training stops; "
                f"{self._culprits(step)}; the last checkpoint is unaffected"
            )

    @torch.no_grad()
    def _culprits(self, step: int) -> str:
        """Compute every record of the step alone, on all processes alike, and name those that fail."""
        losses = {where: float(self._loss_alone(row)) for where, row in self._data.rows_of_step(step)}
        bad = {where: f" (loss {loss})" for where, loss in losses.items() if not math.isfinite(loss)}
        named = bad or dict.fromkeys(losses, "")
        shown = ", ".join(where + text for where, text in list(named.items())[:4])
        shown += f" and {len(named) - 4} more" if len(named) > 4 else ""
        if bad:
            return f"the loss is not finite in {shown}; check those records, or lower optim.lr"
        return f"no record's own loss is at fault (of {shown}); lower optim.lr"

    def _loss_alone(self, row: PackedRow) -> Tensor:
        """Return a row's loss without gradients, by the modules if a kernel does not compile."""
        return despite_kernels(
            lambda: row_loss(self.model, row, executor=self._executor()), self.go_on_with_modules
        )

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Sum the loss of the held-out records."""
        if batch_idx == 0:
            self.val_sum, self.val_targets = torch.zeros((), device=self.device), 0
        for row in batch.rows:
            self.val_sum += self._loss_alone(row)
        self.val_targets += batch.n_targets

    def on_validation_epoch_end(self) -> None:
        """Publish the held-out loss per target, unless a signal ended the validation early."""
        if self.trainer.should_stop:
            return
        total = float(self.trainer.strategy.reduce(self.val_sum, reduce_op="sum")) / self.n_copies
        self.validated_step, self.val_loss = self.trainer.global_step, total / self.val_targets

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store measurements and counts, which a resumed run continues."""
        checkpoint["measured"] = {name: getattr(self, name) for name in MEASURED}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore measurements and counts."""
        for name in MEASURED:
            setattr(self, name, checkpoint["measured"][name])
        for optimizer in checkpoint["optimizer_states"]:  # perhaps written on another device
            for group in optimizer["param_groups"]:
                group["fused"] = self._fused

    def configure_optimizers(self) -> Optimizer:
        """Return AdamW on the adapter's parameters, grouped by rate and decay."""
        config, groups = self.config, self._parameter_groups()
        return AdamW(groups, lr=config.peak_lr, betas=config.betas, eps=config.eps, fused=self._fused)

    @property
    def _fused(self) -> bool | None:
        """True for AdamW as one kernel on a GPU, unless a scaler must unscale the gradient before clipping.

        Otherwise None, which lets torch choose; False would be a loop over parameters.
        """
        on_gpu = all(parameter.is_cuda for _, parameter in adapter_parameters(self.model))
        return True if on_gpu and getattr(self.trainer.precision_plugin, "scaler", None) is None else None

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups that are not empty, each with its share of the rate and its decay."""
        groups: dict[tuple[str | None, bool], list[Tensor]] = {}
        parts = [] if self.model.adapter is None else parts_of(self.model.adapter)
        of_part = {part.name: groups.setdefault((part.lr_share, part.decays), []) for part in parts}
        for _, module in trained_modules(self.model):
            of_part[module.part] += [getattr(module, name) for name in module.trained]
        return [
            {
                "params": parameters,
                "lr_scale": 1.0 if lr_share is None else getattr(self.config, lr_share),
                "weight_decay": self.config.weight_decay if decays else 0.0,
            }
            for (lr_share, decays), parameters in groups.items()
            if parameters
        ]

    def on_train_start(self) -> None:
        """Replace the settings that a resumed optimizer restored by those of this run."""
        optimizer: Any = self.optimizers()
        for group, own in zip(optimizer.param_groups, self._parameter_groups(), strict=True):
            group["weight_decay"], group["lr_scale"] = own["weight_decay"], own["lr_scale"]
            group["betas"], group["eps"] = tuple(self.config.betas), self.config.eps

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the adapter; the frozen base is never saved."""
        return adapter_state(self.model)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:
        """Load an adapter; its names and shapes must be exactly this model's."""
        load_adapter_state(self.model, dict(state_dict), source="checkpoint")


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed what a process drops in a step, so that a resumed run drops what an unstopped one would.

    Processes that share the heads of a row draw each for the heads and channels that it computes.
    """
    place = np.random.SeedSequence((seed, step, rank))
    torch.manual_seed(int(place.generate_state(1, np.uint64)[0]))
