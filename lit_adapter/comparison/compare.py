"""Runs side by side, on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_adapter.comparison import tables
from lit_adapter.comparison.groups import groups
from lit_adapter.comparison.page import page
from lit_adapter.comparison.runs import read_runs
from lit_adapter.errors import visible
from lit_adapter.evaluation.tables import Table
from lit_adapter.files.write import write_text


def compare(folders: Sequence[Path], *, html: Path | None = None, by: str = tables.HELD_OUT) -> list[Table]:
    """Read runs, write the page ``html`` if it is given, and return the tables, best runs first.

    Runs are ordered ``by`` a metric of their evaluations, or their lowest held-out loss.

    Raises:
        UserError: a folder that is no run, an unknown metric, or a page that cannot be written.
    """
    runs = tables.ordered(read_runs(folders), by)
    grouped, differing = groups(runs), tables.settings_table(runs)
    found = [tables.results_table(runs), *([tables.groups_table(grouped)] if grouped else [])]
    found += [differing] if differing else []
    found.append(tables.cost_table(runs))
    if html is not None:
        write_text(html, page(runs, found))
    return found


def show(found: Sequence[Table]) -> None:
    """Print tables; in a pipe they are as wide as they need to be."""
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)
    for table in found:
        drawn = Drawn(title=table.title, title_justify="left")
        for place, name in enumerate(table.header):
            drawn.add_column(visible(name), justify="left" if place == 0 else "right")
        for row in table.rows:
            drawn.add_row(*(Text(visible(cell)) for cell in row))
        console.print(drawn)
