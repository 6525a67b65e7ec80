"""Runs on a CUDA device, compared with the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetune_runs import TINY, Stopper
from safetensors.torch import load_file

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


@pytest.mark.parametrize(
    ("strategy", "devices", "tensor_parallel"),
    [("ddp", 1, 1), ("ddp", 2, 1), ("fsdp2", 1, 1), ("fsdp2", 2, 1), ("fsdp2", 2, 2)],
)
def test_gpus_together_take_the_steps_of_one(
    tiny: Callable[..., Config],
    tiny_base: Path,
    tiny_records: Path,
    tmp_path: Path,
    strategy: str,
    devices: int,
    tensor_parallel: int,
) -> None:
    if devices > torch.cuda.device_count():
        pytest.skip(f"needs {devices} CUDA devices")
    options = ["--trainer.accelerator", "cuda", "--optim.max_steps", "5"]
    finetune(tiny(*options, out="one"), say=Stopper())
    script = [
        sys.executable,
        "scripts/finetune.py",
        "--config",
        str(TINY),
        "--base",
        str(tiny_base),
        *options,
    ]
    layout = ["--trainer.devices", str(devices), "--trainer.strategy", strategy]
    layout += ["--trainer.tensor_parallel", str(tensor_parallel)]
    arguments = [*script, "--data.train", str(tiny_records), "--out", str(tmp_path / "together"), *layout]
    root = Path(__file__).parents[1]
    done = subprocess.run(arguments, cwd=root, env=os.environ, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    one, together = (load_file(tmp_path / out / "adapter.safetensors") for out in ("one", "together"))
    for name, tensor in one.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=1e-5, msg=f"{name}: {{}}".format)
