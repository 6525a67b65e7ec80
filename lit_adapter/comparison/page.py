"""A comparison as one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from lit_adapter.comparison.runs import Run
from lit_adapter.errors import visible
from lit_adapter.evaluation import plots
from lit_adapter.evaluation.history import History
from lit_adapter.evaluation.page import STYLE
from lit_adapter.evaluation.tables import Table


def page(runs: Sequence[Run], tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Return the page: notes, curves, tables."""
    title = f"Comparison of {len(runs)} runs"
    warned = [f'<p class="warning">{_escaped(note[:1].upper() + note[1:])}.</p>' for note in notes]
    body = [f"<h1>{title}</h1>", *warned, _curves(runs), *map(_table, tables)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n'
        f"<body>{''.join(body)}</body></html>\n"
    )


def _curves(runs: Sequence[Run]) -> str:
    cards = [
        _card("Held-out loss", runs, lambda curves: curves.held_out),
        _card("Training loss", runs, lambda curves: curves.train),
    ]
    return f'<h2>Curves</h2><div class="plots">{"".join(cards)}</div>' if any(cards) else ""


def _card(title: str, runs: Sequence[Run], curve: Callable[[History], plots.Sequence[plots.Point]]) -> str:
    series = [plots.Series(visible(run.name), curve(run.curves)) for run in runs]
    plot = plots.lines(series, "step", "nats per target")
    return f"<div><h3>{title}</h3>{plot}</div>" if plot else ""


def _table(table: Table) -> str:
    header = "".join(f"<th>{_escaped(cell)}</th>" for cell in table.header)
    rows = "".join(f"<tr>{''.join(f'<td>{_escaped(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    title = _escaped(table.title)
    return f'<h2>{title}</h2><div class="wide"><table><tr>{header}</tr>{rows}</table></div>'


def _escaped(text: str) -> str:
    return html.escape(visible(text))
