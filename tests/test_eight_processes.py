"""A run that is stopped, killed and moved between one and eight processes learns what one process does."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from finetune_runs import Stopper, arguments
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm_runs import Run, several_ranks, signal_after_backward

from lit_adapter.config import Config
from lit_adapter.training.checkpoint import read_checkpoint
from lit_adapter.training.finetune import finetune
from lit_adapter.weights.adapter_file import read_adapter

SIX_RECORDS = ["--optim.batch_size", "6"]
"""Of eight processes, two have nothing to compute in any step; the others' records differ in length."""
STEADY = ["--optim.schedule", "constant", "--optim.warmup", "0", "--optim.eps", "1e-3"]
OPTIONS = [*SIX_RECORDS, *STEADY, "--trainer.samples", "0", "--trainer.save_every", "2"]
STEPS = 12
DDP, FSDP2 = ("--trainer.strategy", "ddp"), ("--trainer.strategy", "fsdp2")
HEADS = ("--trainer.tensor_parallel", "2")


def ended(runs: list[Run]) -> list[int]:
    """Wait for all processes of a run, and return their statuses."""
    try:
        return [run.wait(600) for run in runs]
    finally:
        for run in runs:
            run.process.kill()


def newest(out: Path) -> int:
    """The step of the newest checkpoint, which can be read."""
    path = max(out.glob("checkpoints/*.ckpt"))
    step: int = read_checkpoint(path)["global_step"]
    assert path.name == f"step-{step:07d}.ckpt"
    return step


def losses(out: Path) -> list[float]:
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = events.Scalars("loss/train")
    assert [event.step for event in found] == list(range(1, STEPS + 1))
    return [event.value for event in found]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_on_eight_processes_stops_dies_and_moves(
    tiny: Callable[..., Config], tiny_base: Path, tiny_records: Path, tmp_path: Path
) -> None:
    """SIGTERM to one of eight, a kill of one of four; then eight in two layouts, three and five."""
    finetune(tiny(*OPTIONS, "--optim.max_steps", f"{STEPS}", out="whole"), say=Stopper())
    out, cache = tmp_path / "moved", {"LIT_ADAPTER_CACHE": str(tmp_path / "cache")}

    def processes(n: int, *options: str, prepare: dict[int, Callable[[], None]] | None = None) -> list[Run]:
        command = arguments(tiny_base, tiny_records, out, *OPTIONS, *options)
        return several_ranks(n, command, tmp_path / f"log-{n}", cache, prepare or {})

    runs = processes(8, *DDP, prepare={5: partial(signal_after_backward, 3)})
    assert ended(runs) == [143, *[0] * 7], runs[0].output
    assert re.search("stopped by SIGTERM after step 3: ", runs[0].output)
    assert newest(out) == 3

    kill = partial(signal_after_backward, 3, signal.SIGKILL)
    runs = processes(4, *FSDP2, *HEADS, "--resume", "last", prepare={3: kill})
    statuses = ended(runs)
    assert statuses[3] == -signal.SIGKILL
    assert 0 not in statuses, [run.output for run in runs]
    assert newest(out) == 4

    later = ((8, (*FSDP2, *HEADS), 6), (8, FSDP2, 8), (3, DDP, 10), (5, FSDP2, STEPS))
    for n, layout, steps in later:
        runs = processes(n, *layout, "--resume", "last", "--optim.max_steps", f"{steps}")
        assert ended(runs) == [0] * n, [run.output for run in runs]
        assert newest(out) == steps

    one, moved = (read_adapter(tmp_path / name / "adapter.safetensors")[0] for name in ("whole", "moved"))
    assert moved.training["val_loss"] == pytest.approx(one.training["val_loss"], abs=1e-5)
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    whole = load_file(tmp_path / "whole" / "adapter.safetensors")
    for name, tensor in load_file(out / "adapter.safetensors").items():
        torch.testing.assert_close(tensor, whole.pop(name), rtol=0, atol=1e-6, msg=name)
    assert not whole
