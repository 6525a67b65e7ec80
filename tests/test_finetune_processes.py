"""scripts/finetune.py as a real process, and as two."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
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
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = run(script, environment)
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert used < 2  # of the processor: importing torch alone takes longer
    assert done.returncode == 2
    assert done.stderr == f"error: {bad}:3: unknown key 'optim.batchsize'; did you mean 'batch_size'?\n"


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("LOCAL_RANK", "1")])
def test_a_stray_variable_of_a_launcher_is_one_line(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, environment: dict[str, str], name: str, value: str
) -> None:
    done = run(command(tiny_base, tiny_records, tmp_path / "run"), {**environment, name: value})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {name} is ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
