"""A run that is stopped anywhere and resumed ends with the bytes of one that was never stopped."""

from __future__ import annotations

import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from finetune_runs import arguments
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm_runs import (
    Run,
    signal_after_backward,
    signal_after_write,
    signal_at_line,
    signal_in_validation,
    two_ranks,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# 48 records, 8 a step, two epochs of 6 steps; 48 held-out records are two batches of a validation.
LAYOUT = ["--optim.epochs", "2", "--trainer.val_every", "4", "--trainer.samples", "0"]
FOUR_ROWS = ["--optim.row_tokens", "240"]
LOW = ["--trainer.precision", "bf16-true"]
WORKERS = ["--data.workers", "2"]
DROPOUT = ["--adapter.dropout", "0.1"]

STOPS = [
    (partial(signal_after_backward, 2), signal.SIGTERM),  # between two rows of a step, or in the second step
    (partial(signal_at_line, "step 3/"), signal.SIGTERM),  # inside an epoch
    (partial(signal_in_validation, 1), signal.SIGTERM),  # during the validation of step 4
    (partial(signal_in_validation, 1), signal.SIGKILL),  # the resumed run begins with it
    (partial(signal_at_line, "step 6/"), signal.SIGINT),  # on the last step of an epoch
    (partial(signal_at_line, "step 7/"), signal.SIGUSR1),  # on the first of the next
    (partial(signal_after_write, 2), signal.SIGKILL),  # after the checkpoint of step 8, before its validation
    (partial(signal_at_line, "step 10/"), signal.SIGKILL),  # two steps after a checkpoint
    (partial(signal_after_backward, 2), signal.SIGKILL),  # inside a step, between two rows if it has several
    (partial(signal_in_validation, 2), signal.SIGKILL),  # during the last validation: no step is left to do
]
# Two processes agree on a line's signal with the loss of the next step.
STOPS_OF_TWO = [
    (partial(signal_after_backward, 2), signal.SIGTERM),
    (partial(signal_at_line, "step 3/"), signal.SIGTERM),
    (partial(signal_in_validation, 1), signal.SIGTERM),
    (partial(signal_in_validation, 1), signal.SIGKILL),
    (partial(signal_at_line, "step 5/"), signal.SIGINT),
    (partial(signal_at_line, "step 7/"), signal.SIGUSR1),
    (partial(signal_at_line, "step 10/"), signal.SIGKILL),
    (partial(signal_after_backward, 2), signal.SIGKILL),
    (partial(signal_in_validation, 2), signal.SIGKILL),
]
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0, signal.SIGKILL: -9}


def run_of(base: Path, data: Path, out: Path, *options: str) -> list[str]:
    return arguments(base, data, out, "--data.val", str(data), *LAYOUT, *options)


def written(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("adapter.safetensors", "best.safetensors")]


@pytest.mark.parametrize("options", [DROPOUT, [*WORKERS, *LOW], [*WORKERS, *DROPOUT, *FOUR_ROWS]])
def test_stops_anywhere_change_no_byte_of_one_process(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, options: list[str]
) -> None:
    cache = {"LIT_ADAPTER_CACHE": str(tmp_path / "cache")}
    whole = Run(run_of(tiny_base, tiny_records, tmp_path / "whole", *options), tmp_path / "whole.log", cache)
    assert whole.wait() == 0, whole.output
    command = run_of(tiny_base, tiny_records, tmp_path / "stopped", *options)
    for event, number in STOPS:
        run = Run(command, tmp_path / "log", cache, partial(event, number))
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
        assert [event.step for event in events.Scalars("loss/train")] == list(range(1, 13))
        assert [event.step for event in events.Scalars("loss/held_out")] == [0, 4, 8, 12]


@pytest.mark.parametrize("options", [[*DROPOUT, *LOW], [*FOUR_ROWS, *WORKERS]])
def test_stops_anywhere_change_no_byte_of_two_processes(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, options: list[str]
) -> None:
    """Either process gets the signal; the first gets the kill, and the second follows."""
    cache = {"LIT_ADAPTER_CACHE": str(tmp_path / "cache")}
    command = run_of(tiny_base, tiny_records, tmp_path / "whole", *options)
    for run in two_ranks(command, tmp_path / "whole.log", cache):
        assert run.wait() == 0, run.output
    command = run_of(tiny_base, tiny_records, tmp_path / "stopped", *options)
    for number, (event, what) in enumerate(STOPS_OF_TWO):
        on_first = what == signal.SIGKILL or event.func is signal_at_line or number % 2
        send = partial(event, what)
        first, second = two_ranks(
            command, tmp_path / "log", cache, (send, None) if on_first else (None, send)
        )
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


def test_a_kill_after_any_write_changes_no_byte(tiny_base: Path, tiny_records: Path, tmp_path: Path) -> None:
    """Configuration, the start, and from then on checkpoint, best and adapter file in turn."""
    cache = {"LIT_ADAPTER_CACHE": str(tmp_path / "cache")}
    options = ["--optim.max_steps", "4", "--trainer.val_every", "2", "--trainer.save_every", "2"]
    whole = Run(run_of(tiny_base, tiny_records, tmp_path / "whole", *options), tmp_path / "whole.log", cache)
    assert whole.wait() == 0, whole.output
    out = tmp_path / "killed"
    command = run_of(tiny_base, tiny_records, out, *options)
    for number in range(1, 20):
        run = Run(command, tmp_path / "log", cache, partial(signal_after_write, number, signal.SIGKILL))
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
