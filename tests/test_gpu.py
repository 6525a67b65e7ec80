"""Runs on a CUDA device, compared with the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetune_runs import Stopper, arguments
from safetensors.torch import load_file

import lit_adapter
from lit_adapter.config import Config
from lit_adapter.model.llama import Block
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
    ("options", "tolerance"),
    # Rounding to e4m3, done on a CPU, moves the loss of a random base by up to 0.2 of 6.5.
    [((), 0.02), (("--trainer.recompute", "true"), 0.02), (("--trainer.base_precision", "fp8"), 0.3)],
    ids=["bf16", "recompute", "fp8"],
)
def test_fused_blocks_learn_what_the_modules_learn(
    tiny: Callable[..., Config],
    fused_base: Path,
    options: tuple[str, ...],
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lit_adapter.model.fused import FusedView

    computed: list[int] = []
    block = FusedView.run

    def seen(view: FusedView, module: Block, x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        computed.append(module.self_attn.index)
        return block(view, module, x, rows)

    base = ("--base", str(fused_base))
    finetune(tiny(*base, out="cpu"), say=Stopper())
    monkeypatch.setattr(FusedView, "run", seen)
    cuda = ("--trainer.accelerator", "cuda", "--trainer.precision", "bf16-true")
    finetune(tiny(*base, *cuda, *options, out="gpu"), say=Stopper())
    assert set(computed) == {0, 1, 2, 3}
    cpu, gpu = (read_adapter(Path(tiny(out=out).out) / "adapter.safetensors")[0] for out in ("cpu", "gpu"))
    assert gpu.training["val_loss"] == pytest.approx(cpu.training["val_loss"], abs=tolerance)


@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_on_another_device(
    tiny: Callable[..., Config], first: str, then: str, adamw_forms: set[tuple[str, bool | None]]
) -> None:
    finetune(tiny(out="whole"), say=Stopper())
    assert finetune(tiny("--trainer.accelerator", first, out="moved"), say=Stopper("step 4/")) == 143
    assert adamw_forms == {("cpu", None), (first, first == "cuda" or None)}
    adamw_forms.clear()
    moved_on = tiny("--trainer.accelerator", then, out="moved")
    assert finetune(moved_on, resume="last", say=Stopper()) == 0
    assert adamw_forms == {(then, then == "cuda" or None)}
    whole, moved = (load_file(Path(tiny(out=out).out) / "adapter.safetensors") for out in ("whole", "moved"))
    for name, tensor in whole.items():
        torch.testing.assert_close(moved[name], tensor, rtol=1e-3, atol=1e-4)


TWO = [("ddp", 2, 1), ("fsdp2", 2, 1), ("fsdp2", 2, 2)]
EIGHT = [("ddp", 8, 1), ("fsdp2", 8, 1), ("fsdp2", 8, 2)]
LAYOUTS = [("ddp", 1, 1), ("fsdp2", 1, 1), *TWO, *EIGHT]


@pytest.mark.parametrize(("strategy", "devices", "tensor_parallel"), LAYOUTS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])  # the modules; the fused blocks
def test_gpus_together_take_the_steps_of_one(
    tiny: Callable[..., Config],
    fused_base: Path,
    tiny_records: Path,
    tmp_path: Path,
    strategy: str,
    devices: int,
    tensor_parallel: int,
    precision: str,
) -> None:
    if devices > torch.cuda.device_count():
        pytest.skip(f"needs {devices} CUDA devices")
    options = ["--base", str(fused_base), "--trainer.accelerator", "cuda", "--trainer.precision", precision]
    options += ["--optim.max_steps", "5"]
    finetune(tiny(*options, out="one"), say=Stopper())
    layout = ["--trainer.devices", str(devices), "--trainer.strategy", strategy]
    layout += ["--trainer.tensor_parallel", str(tensor_parallel)]
    given = arguments(fused_base, tiny_records, tmp_path / "together", *options, *layout)
    script = [sys.executable, "scripts/finetune.py", *given]
    root = Path(__file__).parents[1]
    done = subprocess.run(script, cwd=root, env=os.environ, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    one, together = (load_file(tmp_path / out / "adapter.safetensors") for out in ("one", "together"))
    apart = {name: (together[name] - tensor).abs() for name, tensor in one.items()}
    if precision == "32-true":
        assert max(float(values.max()) for values in apart.values()) < 1e-5
    else:  # AdamW moves a number whose gradient is all rounding a whole step; a record less makes 0.015
        assert float(torch.cat([values.flatten() for values in apart.values()]).mean()) < 3e-3


def test_rows_without_a_wait_between_them_find_the_whole_base(tiny_base: Path) -> None:
    """A layer gathered though its turn never comes would leave another's weights wrong in the next row."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA devices")
    script = Path(__file__).with_name("sharded_rows.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script, tiny_base]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrong losses: 0, wrong gradients: 0.") == 2
