"""How far the adapters of two processes are from those of one, and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetune_runs import Stopper, arguments
from torch import Tensor
from warm_runs import two_ranks

from lit_adapter.config import Config, OptimConfig
from lit_adapter.training.checkpoint import read_checkpoint
from lit_adapter.training.finetune import finetune
from lit_adapter.training.schedule import learning_rate

STEPS = 4


def state_after(out: Path, step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Every adapter tensor with AdamW's two averages."""
    checkpoint = read_checkpoint(out / "checkpoints" / f"step-{step:07d}.ckpt")
    averages = checkpoint["optimizer_states"][0]["state"].values()
    found = [
        (weight, average["exp_avg"], average["exp_avg_sq"])
        for weight, average in zip(checkpoint["state_dict"].values(), averages, strict=True)
    ]
    assert all(weight.shape == first.shape for weight, first, _ in found)
    return found


def update(first: Tensor, second: Tensor, optim: OptimConfig, step: int) -> Tensor:
    """AdamW's update of step ``step`` (from 1) as a share of the learning rate, by its published formula."""
    beta1, beta2 = optim.betas
    return (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + optim.eps)


def largest_update(optim: OptimConfig, step: int) -> float:
    """What no update exceeds, as a share of the rate, whatever the gradients: by Cauchy and Schwarz."""
    beta1, beta2 = optim.betas
    weights = sum((beta1**2 / beta2) ** age for age in range(step))
    averages = (1 - beta1) / math.sqrt(1 - beta2) * math.sqrt(weights)
    return averages * math.sqrt(1 - beta2**step) / (1 - beta1**step)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "rounding"), [("32-true", 1e-6), ("bf16-true", 5e-2)])
def test_gradients_agree_and_adapters_as_far_as_adamw_lets_them(
    tiny: Callable[..., Config],
    tiny_base: Path,
    tiny_records: Path,
    tmp_path: Path,
    precision: str,
    rounding: float,
) -> None:
    """The averages are linear in the gradients, or in their squares, so they show whether those agree.

    What the adapters differ by is AdamW's update of those averages and nothing else. It divides by their
    size, so an element whose gradient is no larger than rounding may move by the rate in either direction.
    """
    options = [
        "--optim.max_steps",
        f"{STEPS}",
        "--trainer.save_every",
        "1",
        "--trainer.keep_checkpoints",
        "9",
    ]
    options += ["--adapter.norms", "false"]  # one rate for all
    options += ["--trainer.samples", "0", "--trainer.val_every", "100", "--trainer.precision", precision]
    config = tiny(*options, out="one")
    assert finetune(config, say=Stopper()) == 0
    cache = {"LIT_ADAPTER_CACHE": str(tmp_path / "cache")}
    command = arguments(tiny_base, tiny_records, tmp_path / "two", *options)
    for run in two_ranks(command, tmp_path / "log", cache):
        assert run.wait() == 0, run.output
    optim = config.optim
    apart = [torch.zeros_like(weight) for weight, _, _ in state_after(tmp_path / "one", 1)]
    bound = 0.0
    for step in range(1, STEPS + 1):
        rate = learning_rate(optim, step - 1, STEPS)
        bound += 2 * rate * largest_update(optim, step)
        pairs = zip(*(state_after(tmp_path / out, step) for out in ("one", "two")), strict=True)
        for number, ((weight, *one), (other, *two)) in enumerate(pairs):
            for average, its in zip(one, two, strict=True):
                assert (average - its).norm() <= 2 * rounding * average.norm()
            moved = rate * (update(*one, optim, step) - update(*two, optim, step))
            apart[number] = apart[number] * (1 - rate * optim.weight_decay) - moved
            torch.testing.assert_close(weight - other, apart[number], rtol=1e-3, atol=1e-6)
    assert max(float(tensor.abs().max()) for tensor in apart) <= bound
