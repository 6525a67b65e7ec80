"""Runs side by side, on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_adapter.comparison import tables
from lit_adapter.comparison.groups import groups
from lit_adapter.comparison.page import page
from lit_adapter.comparison.runs import read_runs
from lit_adapter.evaluation.tables import Table
from lit_adapter.evaluation.terminal import draw
from lit_adapter.files.write import write_text
from lit_adapter.streams import say


def compare(
    paths: Sequence[Path], *, html: Path | None = None, by: str = tables.HELD_OUT
) -> tuple[list[Table], list[str]]:
    """Read runs, write the page ``html`` if it is given, and return the tables, best runs first, and notes.

    Runs are ordered ``by`` a metric of their evaluations, or their lowest held-out loss.

    Raises:
        UserError: a folder that is not a run, an unknown metric, or a page that cannot be written.
    """
    runs = read_runs(paths)
    metric = tables.metric_named(runs, by)
    runs = tables.ordered(runs, metric)
    grouped, differing, notes = groups(runs), tables.settings_table(runs), tables.notes(runs)
    found = [tables.results_table(runs), *([tables.groups_table(grouped, metric)] if grouped else [])]
    found += [differing] if differing else []
    found.append(tables.cost_table(runs))
    if html is not None:
        write_text(html, page(runs, found, notes))
    return found, notes


def show(found: Sequence[Table], notes: Sequence[str]) -> None:
    """Print tables and notes; in a pipe they are as wide as they need to be."""
    from rich.console import Console

    console = Console()
    draw(found, console if console.is_terminal else Console(width=10_000))
    for note in notes:
        say(f"note: {note}")
