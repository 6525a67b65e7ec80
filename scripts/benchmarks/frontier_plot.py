"""The plot of a frontier: held-out loss over trained parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.frontier import Result
from benchmarks.frontier_table import Point, points
from lit_adapter.errors import UserError

COLORS = ("tab:blue", "tab:orange", "tab:green")
"""Of prefixes, LoRA, and both together."""
TICKS = (50e3, 100e3, 173e3, 300e3, 600e3, 1.2e6, 2.4e6)


def plot(results: Sequence[Result], courses: Sequence[str], path: Path) -> None:
    """Draw held-out loss over parameters: a picture for each course that was run, a line for each kind.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("--plot needs the package matplotlib; run: pip install -e '.[measure]'") from None
    lines = {course: _lines(points(results, course)) for course in courses}
    lines = {course: found for course, found in lines.items() if found}
    kinds = sorted(dict.fromkeys(kind for found in lines.values() for kind in found), key=_family)
    figure, axes = plt.subplots(1, len(lines), figsize=(5 * len(lines), 5.5), squeeze=False)
    for axis, (course, found) in zip(axes[0], lines.items(), strict=True):
        for kind, own in found.items():
            losses = [p.loss for p in own]
            ends = [[p.loss - min(p.losses) for p in own], [max(p.losses) - p.loss for p in own]]
            family = _family(kind)
            marker = "osD^v<>p"[[k for k in kinds if _family(k) == family].index(kind) % 8]
            style = {"color": COLORS[family], "marker": marker, "markersize": 5, "linewidth": 1}
            axis.errorbar([p.parameters for p in own], losses, yerr=ends, label=kind, capsize=2, **style)
        axis.set(xscale="log", title=course, xlabel="trained parameters")
        axis.set_ylabel("held-out loss (nats per target)")
        axis.set_xticks(TICKS, [f"{tick / 1e3:,.0f} k" for tick in TICKS], minor=False)
        axis.set_xticks([], minor=True)
        sizes = [p.parameters for own in found.values() for p in own]
        axis.set_xlim(0.85 * min(sizes), 1.15 * max(sizes))
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path)
    plt.close(figure)


def _lines(found: Sequence[Point]) -> dict[str, list[Point]]:
    """Return the points of every kind of adapter that has several sizes."""
    own = {p.line: [other for other in found if other.line == p.line] for p in found}
    return {kind: own[kind] for kind in sorted(own, key=_family) if len(own[kind]) > 1}


def _family(kind: str) -> int:
    """Return 0 for a prefix, 1 for LoRA, 2 for both."""
    return ("prefix" in kind) + 2 * ("LoRA" in kind) - 1
