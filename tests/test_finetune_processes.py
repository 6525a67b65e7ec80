"""scripts/finetune.py as a real process, and as two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from finetune_runs import TINY

ROOT = Path(__file__).parent.parent


def command(base: Path, data: Path, out: Path, *options: str) -> list[str]:
    script = [sys.executable, str(ROOT / "scripts" / "finetune.py"), "--config", str(TINY)]
    return [*script, "--base", str(base), "--data.train", str(data), "--out", str(out), *options]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"LIT_ADAPTER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=200)


def test_a_mistake_is_one_line_and_status_two(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("base: nowhere\noptim:\n  batchsize: 3\n")
    script = [sys.executable, str(ROOT / "scripts" / "finetune.py"), "--config", str(bad)]
    start = time.perf_counter()
    done = run(script, environment)
    assert time.perf_counter() - start < 2
    assert done.returncode == 2
    assert done.stderr == f"error: {bad}:3: unknown key 'optim.batchsize'; did you mean 'batch_size'?\n"


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)]
)
def test_a_signal_saves_and_leaves_with_its_status(
    tiny_base: Path,
    tiny_records: Path,
    tmp_path: Path,
    environment: dict[str, str],
    number: signal.Signals,
    status: int,
) -> None:
    out = tmp_path / "run"
    arguments = command(
        tiny_base, tiny_records, out, "--optim.epochs", "2000", "--trainer.val_every", "100000"
    )
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(number)
                break
        rest = process.stdout.read()
    assert process.returncode == status
    saved = sorted((out / "checkpoints").iterdir())[-1]
    assert str(saved) in rest


def test_killed_at_random_moments_the_run_ends_in_the_same_bytes(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """SIGKILL after a number of lines, resume, again and again; the lines are the moments."""
    options = ["--trainer.save_every", "1", "--optim.epochs", "4"]
    whole = run(command(tiny_base, tiny_records, tmp_path / "whole", *options), environment)
    assert whole.returncode == 0, whole.stderr
    out, resume = tmp_path / "killed", []
    for kills in range(4):
        arguments = [*command(tiny_base, tiny_records, out, *options), *resume]
        with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            steps = (line for line in process.stdout if line.startswith("step") and "/" in line.split()[1])
            for _ in range(3 + kills):
                next(steps, None)
            process.kill()
        resume = ["--resume", "last"]
    last = run([*command(tiny_base, tiny_records, out, *options), *resume], environment)
    assert last.returncode == 0, last.stderr
    assert (out / "adapter.safetensors").read_bytes() == (
        tmp_path / "whole" / "adapter.safetensors"
    ).read_bytes()
