"""Mistakes that scripts/finetune.py answers in one line before it loads anything."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_runs import SCRIPT, arguments
from warm_runs import run_script


def test_a_mistake_is_one_line_and_status_two(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("base: nowhere\noptim:\n  batchsize: 3\n")
    script = [sys.executable, str(SCRIPT), "--config", str(bad)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert used < 2  # of the processor: importing torch alone takes longer
    assert done.returncode == 2
    assert done.stderr == f"error: {bad}:3: unknown key 'optim.batchsize'; did you mean 'batch_size'?\n"


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("LOCAL_RANK", "1")])
def test_a_stray_variable_of_a_launcher_is_one_line(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, name: str, value: str
) -> None:
    done = run_script("finetune.py", *arguments(tiny_base, tiny_records, tmp_path / "run"), **{name: value})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {name} is ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
