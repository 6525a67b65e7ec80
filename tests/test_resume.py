"""A run that is stopped anywhere and resumed ends in the bytes of one that never stopped."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from finetune_runs import arguments
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm_runs import Run, two_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# 48 records, 8 a step, two epochs of 6 steps; 48 held-out records are two batches of a validation.
LAYOUT = ["--optim.epochs", "2", "--trainer.val_every", "4", "--trainer.samples", "0"]
FOUR_ROWS = ["--optim.row_tokens", "240"]
LOW = ["--trainer.precision", "bf16-true"]
WORKERS = ["--data.workers", "2"]
DROPOUT = ["--adapter.dropout", "0.1"]

STOPS = [
    ("backward 2", signal.SIGTERM),  # inside a step: after the second row of the first, or in the second step
    ("line step 3/", signal.SIGTERM),  # inside an epoch
    ("validation 1", signal.SIGTERM),  # during the validation of step 4
    ("validation 1", signal.SIGKILL),  # during the same, which the resumed run begins with
    ("line step 6/", signal.SIGINT),  # on the last step of an epoch
    ("line step 7/", signal.SIGUSR1),  # on the first of the next
    ("write 2", signal.SIGKILL),  # after the checkpoint of step 8, before its validation
    ("line step 10/", signal.SIGKILL),  # two steps after a checkpoint
    ("backward 2", signal.SIGKILL),  # inside a step, between two of its rows if it has several
    ("validation 2", signal.SIGKILL),  # during the last validation: no step is left to do
]
# Two processes agree on a line's signal with the loss of the next step.
STOPS_OF_TWO = [
    ("backward 2", signal.SIGTERM),
    ("line step 3/", signal.SIGTERM),
    ("validation 1", signal.SIGTERM),
    ("validation 1", signal.SIGKILL),
    ("line step 5/", signal.SIGINT),
    ("line step 7/", signal.SIGUSR1),
    ("line step 10/", signal.SIGKILL),
    ("backward 2", signal.SIGKILL),
    ("validation 2", signal.SIGKILL),
]
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0, signal.SIGKILL: -9}


def run_of(base: Path, data: Path, out: Path, *options: str) -> list[str]:
    return arguments(base, data, out, "--data.val", str(data), *LAYOUT, *options)


def written(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("adapter.safetensors", "best.safetensors")]


@pytest.mark.parametrize("options", [DROPOUT, [*WORKERS, *LOW], [*WORKERS, *DROPOUT, *FOUR_ROWS]])
def test_one_process(tiny_base: Path, tiny_records: Path, tmp_path: Path, options: list[str]) -> None:
    cache = {"LIT_ADAPTER_CACHE": str(tmp_path / "cache")}
    whole = Run(run_of(tiny_base, tiny_records, tmp_path / "whole", *options), tmp_path / "whole.log", cache)
    assert whole.wait() == 0, whole.output
    command = run_of(tiny_base, tiny_records, tmp_path / "stopped", *options)
    for event, number in STOPS:
        run = Run(command, tmp_path / "log", cache, event, number)
        assert run.wait() == STATUS[number], (event, run.output)
        assert number == signal.SIGKILL or "stopped by" in run.output
        assert not (tmp_path / "stopped" / "adapter.safetensors").exists()
        command = [*command, "--resume", "last"]
    last = Run(command, tmp_path / "log", cache)
    assert last.wait() == 0, last.output
    assert written(tmp_path / "stopped") == written(tmp_path / "whole")
    for folder in ("whole", "stopped"):  # no point is missing, and none is there twice
        events = EventAccumulator(str(tmp_path / folder / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
        assert [event.step for event in events.Scalars("val/loss")] == [0, 4, 8, 12]


@pytest.mark.parametrize("options", [[*DROPOUT, *LOW], [*FOUR_ROWS, *WORKERS]])
def test_two_processes(tiny_base: Path, tiny_records: Path, tmp_path: Path, options: list[str]) -> None:
    """The signal goes to either of them; a kill to the first, which the second follows."""
    cache = {"LIT_ADAPTER_CACHE": str(tmp_path / "cache")}
    command = run_of(tiny_base, tiny_records, tmp_path / "whole", *options)
    for run in two_ranks(command, tmp_path / "whole.log", cache):
        assert run.wait() == 0, run.output
    command = run_of(tiny_base, tiny_records, tmp_path / "stopped", *options)
    for number, (event, what) in enumerate(STOPS_OF_TWO):
        on_first = what == signal.SIGKILL or event.startswith("line") or number % 2
        events = (event, "") if on_first else ("", event)
        first, second = two_ranks(command, tmp_path / "log", cache, events, what)
        assert first.wait() == STATUS[what], (event, first.output)
        assert what == signal.SIGKILL or "stopped by" in first.output
        if what == signal.SIGKILL:
            second.process.kill()
        else:
            assert second.wait() == 0, (event, second.output)
        command = [*command, "--resume", "last"]
    for run in two_ranks(command, tmp_path / "log", cache):
        assert run.wait() == 0, run.output
    assert written(tmp_path / "stopped") == written(tmp_path / "whole")


def test_killed_after_any_write(tiny_base: Path, tiny_records: Path, tmp_path: Path) -> None:
    """Configuration, the start, and from then on checkpoint, best and adapter file in turn."""
    cache = {"LIT_ADAPTER_CACHE": str(tmp_path / "cache")}
    options = ["--optim.max_steps", "4", "--trainer.val_every", "2", "--trainer.save_every", "2"]
    whole = Run(run_of(tiny_base, tiny_records, tmp_path / "whole", *options), tmp_path / "whole.log", cache)
    assert whole.wait() == 0, whole.output
    out = tmp_path / "killed"
    command = run_of(tiny_base, tiny_records, out, *options)
    for number in range(1, 20):
        run = Run(command, tmp_path / "log", cache, f"write {number}", signal.SIGKILL)
        if run.wait() == 0:
            break
        if not list(out.glob("checkpoints/*.ckpt")):
            shutil.rmtree(out)
            continue
        resumed = Run([*command, "--resume", "last"], tmp_path / "log", cache)
        assert resumed.wait() == 0, resumed.output
        assert written(out) == written(tmp_path / "whole"), number
        shutil.rmtree(out)
    assert 7 < number < 11  # each of its writes has been the last
