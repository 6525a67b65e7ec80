"""A frontier as a table: every method at the best of its learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks.frontier import SEEDS, Method, Result, of_method


@dataclass(frozen=True)
class Point:
    """A method at its best rate on a course."""

    line: str
    parameters: int
    lr: float
    losses: tuple[float, ...]
    """One for each seed."""
    exact: float | None
    """The mean over the seeds that were asked for answers."""
    plain: float | None

    @property
    def loss(self) -> float:
        """The mean over the seeds."""
        return mean(self.losses)


def points(results: Sequence[Result], course: str) -> list[Point]:
    """Return a course's frontier: every method at the rate whose first seed was best, by size."""
    found = []
    for method in dict.fromkeys(Method(r.line, r.options) for r in results if r.course == course):
        done = of_method(results, course, method)
        searched = [result for result in done if result.seed == SEEDS[0]]
        best = min(searched or done, key=lambda result: result.loss)
        same = [result for result in done if result.power == best.power]
        losses = tuple(result.loss for result in same)
        exact, plain = _mean(r.exact for r in same), _mean(r.plain for r in same)
        found.append(Point(method.line, best.parameters, best.lr, losses, exact, plain))
    return sorted(found, key=lambda point: (point.parameters, point.loss))


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there; None if there is none."""
    there = [value for value in values if value is not None]
    return mean(there) if there else None


def table(results: Sequence[Result], course: str) -> str:
    """Return a course's frontier as Markdown."""
    lines = [
        "| adapter | parameters | lr | held-out loss | spread | exact | plain text |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for p in points(results, course):
        spread = f"{max(p.losses) - min(p.losses):.4f}" if len(p.losses) > 1 else ""
        exact = "" if p.exact is None else f"{p.exact:.1%}"
        plain = "" if p.plain is None else f"{p.plain:.4f}"
        size = f"{p.line} | {p.parameters:,} | {p.lr:g}"
        lines.append(f"| {size} | {p.loss:.4f} | {spread} | {exact} | {plain} |")
    return "\n".join(lines)
