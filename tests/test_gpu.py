"""Runs on a CUDA device, compared with the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetune_runs import Stopper

import lit_adapter
from lit_adapter.config import Config
from lit_adapter.training.finetune import finetune
from lit_adapter.weights.adapter_file import read_adapter

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_training_on_a_gpu_ends_where_the_cpu_ends(tiny: Callable[..., Config], precision: str) -> None:
    finetune(tiny(out="cpu"), say=Stopper())
    finetune(
        tiny("--trainer.accelerator", "cuda", "--trainer.precision", precision, out="gpu"), say=Stopper()
    )
    cpu, gpu = (read_adapter(Path(tiny(out=out).out) / "adapter.safetensors") for out in ("cpu", "gpu"))
    assert {tensor.dtype for tensor in gpu[1].values()} == {torch.float32}
    tolerance = 1e-3 if precision == "32-true" else 0.03
    assert gpu[0].training["val_loss"] == pytest.approx(cpu[0].training["val_loss"], abs=tolerance)


def test_a_gpu_answers_as_the_cpu_does(tiny: Callable[..., Config], tiny_base: Path) -> None:
    config = tiny("--optim.lr", "0.2")
    finetune(config, say=Stopper())
    file = Path(config.out) / "adapter.safetensors"
    on_cpu, on_gpu = (
        lit_adapter.load(adapter=file, base=tiny_base, device=device, dtype="float32")
        for device in ("cpu", "cuda")
    )
    ids = torch.randint(0, 200, (2, 40))
    torch.testing.assert_close(on_gpu.logits(ids).cpu(), on_cpu.logits(ids), rtol=1e-3, atol=1e-3)
    tasks = [("Say it back.", "red green"), ("Repeat the words.", "")]
    assert on_gpu.generate_batch(tasks, max_new_tokens=20) == on_cpu.generate_batch(tasks, max_new_tokens=20)
