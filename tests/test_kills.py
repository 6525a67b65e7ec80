"""A run that is killed at random moments and resumed ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_runs import SCRIPT, arguments, launch
from warm_runs import Run

from lit_adapter.errors import UserError
from lit_adapter.training.checkpoint import read_checkpoint
from lit_adapter.weights.adapter_file import read_adapter

KILLS = 26
"""How many kills in each of the two loops."""
SAVE_EVERY = 3
STEPS = 45
OPTIONS = [
    "--optim.max_steps",
    str(STEPS),
    "--trainer.save_every",
    str(SAVE_EVERY),
    "--trainer.val_every",
    "5",
]


def check_files(out: Path, seen: int) -> None:
    """Every file is whole, and the newest checkpoint is not older than the last save interval."""
    for path in [*out.glob("*.safetensors")]:
        read_adapter(path)
    checkpoints = sorted(out.glob("checkpoints/step-*.ckpt"))
    for path in checkpoints:
        assert read_checkpoint(path)["global_step"] == int(path.stem.removeprefix("step-"))
    newest = int(checkpoints[-1].stem.removeprefix("step-")) if checkpoints else 0
    assert newest > seen - SAVE_EVERY - 1, (
        f"step {seen} was reported, but the newest checkpoint is of {newest}"
    )


def last_step(output: str) -> int:
    return max((int(step) for step in re.findall(r"^step (\d+)/", output, re.MULTILINE)), default=0)


def killed_cold(command: list[str], seconds: float, cache: dict[str, str], log: Path) -> str:
    """A process with its imports, killed after ``seconds``; returns what it has printed."""
    with launch([sys.executable, str(SCRIPT), *command], cache, log) as process:
        time.sleep(seconds)
        process.kill()
    return log.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("workers", [0, 2])
def test_kills_at_random_moments_change_no_byte(
    tiny_base: Path,
    tiny_records: Path,
    tmp_path: Path,
    workers: int,
    record_property: Callable[[str, object], None],
) -> None:
    seed = int(os.environ.get("LIT_ADAPTER_TEST_SEED") or random.SystemRandom().randrange(10**6))
    moments = random.Random(seed)
    cache = {"LIT_ADAPTER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    options = [*OPTIONS, "--data.workers", str(workers)]
    assert Run(["--help"], tmp_path / "log", cache).wait() == 0  # the first fork waits for the imports
    start = time.monotonic()
    whole = Run(arguments(tiny_base, tiny_records, tmp_path / "whole", *options), tmp_path / "log", cache)
    assert whole.wait() == 0, whole.output
    life = time.monotonic() - start
    wanted = [
        (tmp_path / "whole" / name).read_bytes() for name in ("adapter.safetensors", "best.safetensors")
    ]
    out, kills, runs = tmp_path / "killed", 0, 0
    while kills < KILLS or out.exists():
        command = arguments(tiny_base, tiny_records, out, *options)
        if list(out.glob("checkpoints/*.ckpt")):
            command += ["--resume", "last"]
        elif out.exists():  # killed before its first checkpoint: nothing to resume, and that is said
            refused = Run([*command, "--resume", "last"], tmp_path / "log", cache)
            assert refused.wait() == 2, refused.output
            assert "cannot resume" in refused.output
            if out.exists():  # where nothing had come into it, the refused resume has removed it
                shutil.rmtree(out)
        if kills >= KILLS:
            run = Run(command, tmp_path / "log", cache)
            assert run.wait() == 0, f"seed {seed}: {run.output}"
        elif kills % 9 == 5:  # also in the seconds of imports, which a fork does not have
            output = killed_cold(command, moments.uniform(0.0, 2 * life), cache, tmp_path / "cold")
            kills += 1
            check_files(out, last_step(output))
            continue
        else:
            run = Run(command, tmp_path / "log", cache)
            run.process.join(moments.uniform(0.0, 0.7 * life))
            run.process.kill()  # nothing happens where it has ended
            status = run.wait()
            assert status in (0, -signal.SIGKILL), f"seed {seed}: {run.output}"
            kills += status != 0
            check_files(out, last_step(run.output))
            if status:
                continue
        runs += 1
        got = [(out / name).read_bytes() for name in ("adapter.safetensors", "best.safetensors")]
        assert got == wanted, f"seed {seed}"
        shutil.rmtree(out)
    counted = f"{kills} kills; {runs} runs ended in the bytes of one that nothing disturbed"
    record_property("kills", f"workers {workers}, seed {seed}: {counted}")


@pytest.mark.slow
def test_a_fork_runs_the_script_itself(tiny_base: Path, tiny_records: Path, tmp_path: Path) -> None:
    """A forked script prints the same message and leaves with the same status as a new process."""
    command = arguments(tiny_base, tiny_records, tmp_path / "run", "--optim.batch_size", "99")
    fork = Run(command, tmp_path / "log", {"LIT_ADAPTER_CACHE": str(tmp_path / "cache")})
    assert fork.wait() == 2
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert fork.output == done.stdout + done.stderr
    with pytest.raises(UserError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "run" / "checkpoints" / "step-0000001.ckpt")
