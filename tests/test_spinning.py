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

SPUN = """
import time
import torch
from lit_adapter.spinning import IdleTeams

matrix = torch.randn(256, 256)

def spun(rounds=300):
    "Processor time while every thread but this one has nothing to do."
    total = 0
    for _ in range(rounds):
        matrix.mm(matrix)
        start = time.process_time()
        time.sleep(2e-3)
        total += time.process_time() - start
    return total

before = spun()
teams = IdleTeams(2)
time.sleep(1)
print(before, spun())
"""
STEPS = """
import threading, time
import torch
from lit_adapter.spinning import yield_shared_cores

yield_shared_cores()
matrix, end = torch.randn(256, 256), time.monotonic() + 250
while time.monotonic() < end and "idle team" not in (thread.name for thread in threading.enumerate()):
    matrix.mm(matrix)
print(time.monotonic() < end)
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
        timeout=300,
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


def test_idle_teams_end_the_spinning() -> None:
    """Processor time is compared, which other programs do not change as they change the rate."""
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("one core: no thread waits for another")
    before, after = map(float, run(SPUN))
    assert after < before / 2


@pytest.mark.slow
@pytest.mark.usefixtures("busy_cores")
def test_beside_busy_programs_teams_start() -> None:
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("one core: no thread waits for another")
    assert run(STEPS) == ["True"]


def test_a_setting_of_the_users_decides() -> None:
    """As one thread does, for which nothing waits."""
    code = """
import os
import torch
from lit_adapter.spinning import yield_shared_cores
decide, n_threads = yield_shared_cores.__wrapped__, torch.get_num_threads()
for name, value in (("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7")):
    os.environ[name] = value
    print(decide() is None)
    del os.environ[name]
torch.set_num_threads(1)
print(decide() is None)
torch.set_num_threads(n_threads)
print(decide() is None)
"""
    alone = len(os.sched_getaffinity(0)) == 1
    assert run(code) == ["True", "True", "True", str(alone)]


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
        spinning._watch(Teams, threading.Event())  # type: ignore[arg-type]
    assert seen == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1]


def test_the_time_waited_grows_where_two_threads_share_a_core() -> None:
    code = """
import os, threading, time
from lit_adapter.spinning import waited
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
start = time.monotonic()
end = start + 1
def spin():
    while time.monotonic() < end:
        sum(range(1000))
before = waited()
if os.fork() == 0:
    spin()
    os._exit(0)
spin()
print(waited() - before, time.monotonic() - start)
"""
    seconds, most = map(float, run(code))
    assert 0.2 < seconds < most


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


@pytest.mark.parametrize("program", [0.05, 1.0], ids=["while they start", "while they wait"])
def test_a_program_ends_in_order_with_teams(program: float) -> None:
    """A thread within torch when the interpreter ends would abort the process."""
    code = f"""
import time
import torch
from lit_adapter import spinning
seconds = iter(range(10**9))
spinning.PERIOD, spinning.waited = 0.01, lambda: float(next(seconds))
torch_ones = torch.ones
torch.ones = lambda n: [torch_ones(n).add_(1) for _ in range(500)][-1]
spinning.yield_shared_cores()
time.sleep({program})
print("ended")
"""
    assert run(code) == ["ended"]
