"""A comparison as one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lit_adapter.comparison.runs import Run
from lit_adapter.errors import visible
from lit_adapter.evaluation import plots
from lit_adapter.evaluation.document import document, escaped, plots_of, table_of
from lit_adapter.evaluation.history import History
from lit_adapter.evaluation.tables import Table


def page(runs: Sequence[Run], tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Return the page: notes, curves, tables."""
    warned = [f'<p class="warning">{escaped(note[:1].upper() + note[1:])}.</p>' for note in notes]
    curves = {
        "Held-out loss": _curves(runs, lambda history: history.held_out),
        "Training loss": _curves(runs, lambda history: history.train),
    }
    parts = [*warned, plots_of("Curves", curves), *map(table_of, tables)]
    return document(f"Comparison of {len(runs)} runs", parts)


def _curves(runs: Sequence[Run], curve: Callable[[History], Sequence[plots.Point]]) -> str:
    series = [plots.Series(visible(run.name), curve(run.curves)) for run in runs]
    return plots.lines(series, "step", "nats per target")
