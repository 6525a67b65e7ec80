"""Threads of torch sleep while they wait for each other, if and only if other programs use the same cores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from lit_adapter import spinning

STEPS = """
import sys, time
import torch
from lit_adapter.spinning import yield_shared_cores

matrix = torch.randn(256, 256)

def rate(seconds):
    start, n = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        matrix.mm(matrix).add_(1)
        n += 1
    return n / (time.monotonic() - start)

spinning = rate(2)
watch = yield_shared_cores()
rate(2 * 0.25 + 1)
print(spinning, rate(2), watch is not None)
"""


def run(code: str, **variables: str) -> list[str]:
    unset = ("OMP_NUM_THREADS", *spinning.OWN_SETTINGS)
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))} | variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.split()


@pytest.fixture
def busy_cores() -> Iterator[None]:
    """A program on every core that never waits."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("busy_cores")
def test_beside_busy_programs_it_is_faster_by_far() -> None:
    """Measured on two cores: 17 times as fast."""
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("one core: no thread waits for another")
    before, after, watches = run(STEPS)
    assert watches == "True"
    assert float(after) > 2 * float(before)


@pytest.mark.parametrize(
    "variables", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}, {"OMP_NUM_THREADS": "1"}]
)
def test_a_setting_of_the_users_decides(variables: dict[str, str]) -> None:
    code = "from lit_adapter.spinning import yield_shared_cores; print(yield_shared_cores())"
    assert run(code, **variables) == ["None"]


class Teams:
    """What would start idle threads; counts them."""

    running = 0

    def __init__(self) -> None:
        Teams.running += 1

    def end(self) -> None:
        Teams.running -= 1


def test_teams_are_there_while_threads_wait_for_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two limits nothing changes."""
    Teams.running = 0
    shares = iter([0.0, 0.02, 0.05, 0.5, 2.0, 0.05, 0.05, 0.02, 0.0, 0.05, 0.2])
    total, seen = 0.0, []

    def waited() -> float:
        nonlocal total
        seen.append(Teams.running)
        total += next(shares) * spinning.PERIOD
        return total

    monkeypatch.setattr(spinning, "PERIOD", 1e-3)
    monkeypatch.setattr(spinning, "waited", waited)
    with pytest.raises(StopIteration):
        spinning._watch(Teams)  # type: ignore[arg-type]
    assert seen == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1]


def test_the_time_waited_grows_where_two_threads_share_a_core() -> None:
    code = """
import os, threading, time
from lit_adapter.spinning import waited
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
end = time.monotonic() + 1
def spin():
    while time.monotonic() < end:
        sum(range(1000))
before = waited()
if os.fork() == 0:
    spin()
    os._exit(0)
spin()
print(waited() - before)
"""
    assert 0.2 < float(run(code)[0]) < 1


def test_idle_teams_end() -> None:
    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate()]

    teams = spinning.IdleTeams(2)
    assert names().count("idle team") == 2
    teams.end()
    end = time.monotonic() + 20
    while "idle team" in names():
        assert time.monotonic() < end
        time.sleep(0.01)
