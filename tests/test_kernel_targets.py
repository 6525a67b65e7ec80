"""Kernels without a GPU: they compile for every generation with bf16 and fit its memory, and they compute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Shared memory of a program, in bytes, by compute capability (CUDA C++ Programming Guide)."""


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_attention_compiles_and_fits(capability: int) -> None:
    pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA")
    script = Path(__file__).with_name("kernel_targets.py")
    done = subprocess.run(
        [sys.executable, str(script), str(capability)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    needed = [line.split() for line in done.stdout.splitlines()]
    assert len({name for name, _ in needed}) == 7
    assert max(int(size) for _, size in needed) <= SHARED[capability], needed


def interpreted_errors(script: str) -> list[float]:
    pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA")
    path, interpreted = Path(__file__).with_name(script), os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=interpreted, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(line.split()[-1]) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "n"), [("interpreted.py", 20), ("interpreted_decoding.py", 186)])
def test_the_fused_executors_compute_what_the_modules_compute_in_the_interpreter(script: str, n: int) -> None:
    errors = interpreted_errors(script)
    assert len(errors) == n
    assert max(errors) < 1e-5, errors
