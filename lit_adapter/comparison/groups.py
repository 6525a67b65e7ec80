"""Runs that differ only in their seed, and the spread of their results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_adapter.comparison.runs import OWN, WITHOUT_EFFECT, Run

MOST_NAMED = 4
"""Settings that name a group."""
MOST = 28
"""Characters of a setting that are shown."""


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the settings in which runs differ, without their folders."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name != "out")
    return [name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1]


@dataclass(frozen=True)
class Group:
    """Runs of one setting with several seeds."""

    name: str
    runs: list[Run]

    def spread(self, measure: Callable[[Run], float]) -> tuple[float, float]:
        """Return mean and standard deviation (of a sample; NaN for one run) of the finite values."""
        values = [value for run in self.runs if math.isfinite(value := measure(run))]
        mean = statistics.fmean(values) if values else math.nan
        return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def groups(runs: Sequence[Run]) -> list[Group]:
    """Return the groups, in the order of their first runs; empty if no setting has several seeds."""
    names = [name for name in differing(runs) if name not in (*OWN, *WITHOUT_EFFECT)]
    found: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        found.setdefault(run.setting, []).append(run)
    if all(len(members) < 2 for members in found.values()):
        return []
    return [Group(_name(members, names), members) for members in found.values()]


def _name(members: Sequence[Run], names: Sequence[str]) -> str:
    """Return the settings of a group, or its runs if many settings differ, which another table shows."""
    if len(names) > MOST_NAMED:
        return ", ".join(run.name for run in members)
    run = members[0]
    return ", ".join(f"{name} {in_a_cell(run.settings.get(name))}" for name in names) or "all runs"


def in_a_cell(value: object) -> str:
    """Return a setting as a short line: the start of a text, the end of a path, ``-`` for null."""
    if value is None:
        return "-"
    text = " ".join(map(str, value)) if isinstance(value, list) else " ".join(str(value).split())
    if len(text) <= MOST:
        return text
    return f"\u2026{text[1 - MOST :]}" if "/" in text and " " not in text else f"{text[: MOST - 1]}\u2026"
