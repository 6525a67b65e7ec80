"""Signals at every stage of a run, in one process and in two; a process that dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from finetune_runs import SCRIPT, arguments, launch
from warm_runs import (
    Run,
    signal_after_token,
    signal_after_write,
    signal_at_line,
    signal_in_validation,
    two_ranks,
)

from lit_adapter.training.checkpoint import read_checkpoint

LONG = ["--optim.epochs", "3000", "--trainer.val_every", "100000", "--data.workers", "2"]
SECONDS = 250
"""How long a stop may take: a fraction of a second, but other work may share the machine."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"LIT_ADAPTER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


def saved_and_said(out: Path, output: str) -> int:
    """Return the step that the last line names, whose checkpoint is the newest and can be read."""
    found = re.search(r"stopped by SIG\w+ after step (\d+): (\S+); --resume last continues", output)
    assert found, output
    path = Path(found[2])
    assert path == sorted(out.glob("checkpoints/*.ckpt"))[-1]
    assert read_checkpoint(path)["global_step"] == int(found[1])
    assert "Traceback" not in output
    return int(found[1])


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)]
)
def test_during_training(
    tiny_base: Path,
    tiny_records: Path,
    tmp_path: Path,
    environment: dict[str, str],
    number: signal.Signals,
    status: int,
) -> None:
    """The whole group gets the signal, loader workers too."""
    run = Run(arguments(tiny_base, tiny_records, tmp_path / "run", *LONG), tmp_path / "log", environment)
    run.wait_for("step 3/")
    os.killpg(run.pid, number)
    assert run.wait(SECONDS) == status, run.output
    assert saved_and_said(tmp_path / "run", run.output) >= 3


def test_during_a_save(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    command = arguments(tiny_base, tiny_records, tmp_path / "run", *LONG)
    run = Run(command, tmp_path / "log", environment, partial(signal_after_write, 7))
    assert run.wait() == 143, run.output
    # The flag is looked at before the save: one more step is done and saved.
    assert saved_and_said(tmp_path / "run", run.output) == 5


@pytest.mark.slow
def test_a_long_validation_is_left(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """The held-out records would take minutes; the signal comes in their first batch."""
    many = tmp_path / "many.jsonl"
    line = json.dumps({"instruction": "Say it back.", "input": "red apple", "output": "red apple river"})
    many.write_text(f"{line}\n" * 20_000)
    command = arguments(tiny_base, tiny_records, tmp_path / "run", *LONG, "--data.val", str(many))
    run = Run(command, tmp_path / "log", environment, partial(signal_in_validation, 1))
    run.wait_for("stopped by SIGTERM after step 0")
    assert "held-out loss" not in run.output
    assert run.wait(SECONDS) == 143
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_samples_are_left_after_a_token(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """Eight hundred tokens of a sample are to come; the signal comes with the first; few follow it."""
    command = arguments(tiny_base, tiny_records, tmp_path / "run", *LONG, "--trainer.sample_tokens", "800")
    run = Run(command, tmp_path / "log", environment, partial(signal_after_token, most=5))
    assert run.wait() == 143, run.output
    assert saved_and_said(tmp_path / "run", run.output) == 1


def test_before_training_nothing_is_left_behind(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    out = tmp_path / "run"
    command = arguments(tiny_base, tiny_records, out, "--optim.max_steps", "1")
    run = Run(command, tmp_path / "log", environment, partial(signal_at_line, "data:"))
    assert run.wait(SECONDS) == 143, run.output
    assert run.output.endswith("stopped by SIGTERM before training; there was nothing to save\n")
    assert not out.exists()
    again = Run(command, tmp_path / "log", environment)
    assert again.wait() == 0, again.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_while_it_imports(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, environment: dict[str, str], number: signal.Signals
) -> None:
    code = (
        "import builtins, os, sys; sound = builtins.__import__\n"
        "def importing(name, *rest, **named):\n"
        f"    if name == 'lightning.pytorch': os.kill(os.getpid(), {int(number)})\n"
        "    return sound(name, *rest, **named)\n"
        "builtins.__import__ = importing\n"
        "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [str(SCRIPT), *arguments(tiny_base, tiny_records, tmp_path / "run")]
    code = f"import sys; sys.argv = {command!r}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=SECONDS,
    )
    assert done.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}[number]
    assert done.stderr == f"stopped by {number.name} before training; there was nothing to save\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    out = tmp_path / "run"
    command = arguments(tiny_base, tiny_records, out, *LONG, "--optim.batch_size", "40")
    run = Run(command, tmp_path / "log", environment, partial(signal_at_line, "step 4/", signal.SIGINT))
    run.wait_for("step 4/")
    os.kill(run.pid, signal.SIGINT)
    assert run.wait(SECONDS) == 130, run.output
    assert all(read_checkpoint(path) for path in out.glob("checkpoints/*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("events", "step", "options"),
    [
        ((partial(signal_at_line, "step 3/"), None), 4, []),
        ((None, partial(signal_in_validation, 2)), 4, []),
        ((partial(signal_in_validation, 1), None), 0, []),
        ((signal_after_token, None), 1, []),  # the other one waits in step 1
        ((None, signal_after_token), 1, ["--trainer.strategy", "fsdp2"]),  # both generate
    ],
)
def test_two_processes_agree(
    tiny_base: Path,
    tiny_records: Path,
    tmp_path: Path,
    environment: dict[str, str],
    events: tuple[Callable[[], None] | None, Callable[[], None] | None],
    step: int,
    options: list[str],
) -> None:
    """One process gets the signal, between steps, in a validation or in a sample; both stop after a step."""
    many = [*options, "--data.val", str(tiny_records), "--trainer.val_every", "4", "--optim.epochs", "3000"]
    command = arguments(tiny_base, tiny_records, tmp_path / "run", *many)
    first, second = two_ranks(command, tmp_path / "log", environment, events)
    assert first.wait() == 143, first.output
    assert second.wait(SECONDS) == 0, second.output
    assert second.output == ""
    assert saved_and_said(tmp_path / "run", first.output) == step


def wait_for(log: Path, text: str, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while text not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in found]


def second_processes(process: int) -> list[int]:
    """The processes of a run that its first one has started, but not the server of its loader workers."""
    variables = {child: Path(f"/proc/{child}/environ").read_bytes() for child in children(process)}
    return [child for child, text in variables.items() if b"LOCAL_RANK=1" in text]


def processes_of(folder: Path) -> list[str]:
    """Processes whose command line names a folder of this test."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in text:
            found.append(text)
    return found


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU encodes without worker processes")
@pytest.mark.parametrize(
    ("number", "status", "seconds"),
    [(signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 1.5)],
)
def test_while_worker_processes_encode(
    tiny_base: Path,
    tmp_path: Path,
    environment: dict[str, str],
    number: signal.Signals,
    status: int,
    seconds: float,
) -> None:
    """The whole group gets the signal, when its first worker starts or later: one line, no process left."""
    many, log = tmp_path / "many.jsonl", tmp_path / "log"
    line = json.dumps({"instruction": "Say it back. " * 40, "output": "red apple river " * 20})
    many.write_text(f"{line}\n" * 60_000)
    command = [sys.executable, str(SCRIPT), *arguments(tiny_base, many, tmp_path / "run")]
    with launch(command, environment, log) as process:
        while process.poll() is None and not any(map(is_spawned, children(process.pid))):
            time.sleep(0.01)
        time.sleep(seconds)
        os.killpg(process.pid, number)
        assert process.wait(SECONDS) == status
        stopped = f"stopped by {number.name} before training; there was nothing to save\n"
        assert log.read_text() == f"encoding 60,000 records, once\n{stopped}"
    end = time.monotonic() + SECONDS
    with suppress(ProcessLookupError):
        while os.killpg(process.pid, 0) is None:  # there is still one
            assert time.monotonic() < end
            time.sleep(0.1)


def is_spawned(process: int) -> bool:
    return b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["group", "other"])
def test_two_processes_that_lightning_starts(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, environment: dict[str, str], target: str
) -> None:
    """First SIGTERM while the second one still imports: both get there and leave; then during training."""
    out, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, str(SCRIPT), *arguments(tiny_base, tiny_records, out, *LONG)]
    command += ["--trainer.devices", "2"]
    with launch(command, environment, log) as process:
        wait_for(log, "run: ")
        while not (others := second_processes(process.pid)):
            time.sleep(0.01)
        if target == "group":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            os.kill(others[0], signal.SIGTERM)
        assert process.wait(SECONDS) == 143, log.read_text()
    assert saved_and_said(out, log.read_text()) == 0
    with launch([*command, "--resume", "last"], environment, log) as process:
        wait_for(log, "step 3/")
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(SECONDS) == 143, log.read_text()
    assert saved_and_said(out, log.read_text()) >= 3
    end = time.monotonic() + SECONDS
    while processes_of(out):  # the second process may end a moment after the first
        assert time.monotonic() < end, processes_of(out)
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_process_that_dies_is_named(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, environment: dict[str, str], strategy: str
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, str(SCRIPT), *arguments(tiny_base, tiny_records, out, *LONG)]
    command += ["--trainer.devices", "2", "--trainer.strategy", strategy]
    with launch(command, environment, log) as process:
        wait_for(log, "step 5/")
        (other,) = second_processes(process.pid)
        os.kill(other, signal.SIGKILL)
        assert process.wait(SECONDS) == 1, log.read_text()
    # Python's resource tracker outlives the killed process and may report its semaphores at any moment.
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    newest = sorted(out.glob("checkpoints/*.ckpt"))[-1]
    assert errors == [
        f"error: process 1 (pid {other}) was killed by signal 9; the run ends; "
        f"{newest} is complete, --resume last continues"
    ]
    assert "Traceback" not in log.read_text()
    read_checkpoint(newest)
    with launch([*command, "--resume", "last"], environment, log) as process:
        wait_for(log, "tokens/s")
        process.kill()  # the first one, this time
    end = time.monotonic() + SECONDS
    while processes_of(out):
        assert time.monotonic() < end
        time.sleep(0.2)


def test_what_a_test_has_started_ends_with_it(tmp_path: Path) -> None:
    """Also in a session of its own, and where the test is killed."""
    code = (
        "import os, signal, sys; from pathlib import Path; from finetune_runs import launch\n"
        "print(launch(['sleep', '300'], {}, Path(sys.argv[1])).pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == -signal.SIGKILL, done.stderr
    status, end = Path(f"/proc/{int(done.stdout)}/status"), time.monotonic() + SECONDS
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < end, status.read_text()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_under_torchrun(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """SIGTERM to the agent: the processes save; the agent itself returns 1."""
    out, log = tmp_path / "run", tmp_path / "log"
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*agent, str(SCRIPT), *arguments(tiny_base, tiny_records, out, *LONG), "--trainer.devices", "2"]
    with launch(command, environment, log) as process:
        wait_for(log, "step 3/")
        process.terminate()
        assert process.wait(SECONDS) == 1, log.read_text()
    found = re.search(r"stopped by SIGTERM after step (\d+): (\S+);", log.read_text())
    assert found, log.read_text()
    assert read_checkpoint(Path(found[2]))["global_step"] == int(found[1]) >= 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_leaves_no_loader_worker_behind(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """Steps of so many rows that a pipe does not hold them: the workers wait for a reader that is gone."""
    out, log = tmp_path / "run", tmp_path / "log"
    many_rows = ["--optim.batch_size", "40", "--optim.row_tokens", "200", "--data.workers", "3"]
    options = [*LONG, *many_rows, "--trainer.samples", "0"]
    command = [sys.executable, str(SCRIPT), *arguments(tiny_base, tiny_records, out, *options)]
    with launch(command, environment, log) as process:
        wait_for(log, "step 2/")
        process.kill()
    end = time.monotonic() + SECONDS
    while processes_of(out):
        assert time.monotonic() < end, processes_of(out)
        time.sleep(0.2)
