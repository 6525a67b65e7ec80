"""How torch's threads wait for each other: spinning on cores of their own, sleeping on shared ones.

A thread that has done its part of a product spins for milliseconds before it sleeps. If another program has
the core of the thread that it waits for, its spinning keeps that thread from its own core, and training slows
down many times over. GNU's OpenMP library hardly spins while it manages more threads than there are cores
(see ``gomp_throttled_spin_count_var`` in its source). Idle threads of ours, each with a team of its own, make
it do so for as long as cores are shared. The threads that compute stay the same, and so do their results.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from threading import Event, Thread

PERIOD = 0.25
"""Seconds between looks at how long threads have waited for a core."""
SHARED, ALONE = 0.1, 0.03
"""Seconds waited per second from which cores count as shared, and below which they no longer do."""
OWN_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""The user's own settings, which take precedence."""
_TASKS = Path("/proc/self/task")


@cache
def yield_shared_cores() -> Thread | None:
    """From now on, let torch's threads sleep while other programs use this process's cores.

    Return the thread that does this; None if there is nothing to do: with one thread, another OpenMP library,
    a setting of the user's, or a system that does not tell how long threads wait.
    """
    import torch

    n_threads, n_cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    is_set = any(name in os.environ for name in OWN_SETTINGS)
    if is_set or n_threads == 1 or waited() is None or "libgomp" not in Path("/proc/self/maps").read_text():
        return None
    # Each team adds all of its threads except the calling one.
    n_teams = max(0, n_cores - n_threads) // (n_threads - 1) + 1
    ended = Event()
    watch = Thread(target=_watch, args=(partial(IdleTeams, n_teams), ended), name="shared cores", daemon=True)
    watch.start()
    atexit.register(_stop, watch, ended)
    return watch


def _stop(watch: Thread, ended: Event) -> None:
    """Let all threads end before the interpreter does: one still within torch would abort the process."""
    ended.set()
    watch.join()


def waited() -> float | None:
    """Return the seconds for which this process's threads have waited for a core; None if unknown."""
    total = 0
    try:
        for task in _TASKS.iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                total += int((task / "schedstat").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return total / 1e9


def _watch(start_teams: Callable[[], IdleTeams], ended: Event) -> None:
    before = waited() or 0.0
    teams: IdleTeams | None = None
    while not ended.wait(PERIOD):
        now = waited() or 0.0
        share, before = (now - before) / PERIOD, now
        if teams is None and share > SHARED:
            teams = start_teams()
        elif teams is not None and share < ALONE:
            teams.end()
            teams = None
    if teams is not None:
        teams.end()


class IdleTeams:
    """Threads that have made the OpenMP library manage more threads than there are cores."""

    def __init__(self, number: int) -> None:
        self._ended = Event()
        self._threads = [Thread(target=self._run, name="idle team", daemon=True) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        import torch

        torch.ones(1 << 18).add_(1)  # large enough to be divided over a team
        self._ended.wait()

    def end(self) -> None:
        """End them, after which the library no longer counts their teams."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
