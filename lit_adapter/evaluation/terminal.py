"""Results and tables on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from lit_adapter.errors import visible
from lit_adapter.evaluation import tables
from lit_adapter.evaluation.tables import Table
from lit_adapter.streams import say


def show(found: dict[str, Any]) -> None:
    """Print the tables of scores and of forgetting, the sentences of the summary and the warnings."""
    from rich.console import Console

    forgetting = tables.forgetting_table(found)
    scores = [tables.score_table(found)] if "scores" in found else []
    draw([*scores, *([forgetting] if forgetting else [])], Console())
    for line in tables.summary(found):
        say(line)
    for line in found.get("warnings", []):
        say(f"warning: {line}", sys.stderr)


def draw(found: Iterable[Table], console: Any) -> None:
    """Print tables on a console of rich's."""
    from rich.table import Table as Drawn
    from rich.text import Text

    for table in found:
        drawn = Drawn(title=table.title, title_justify="left")
        for place, name in enumerate(table.header):
            drawn.add_column(visible(name), justify="left" if place == 0 else "right")
        for row in table.rows:
            drawn.add_row(*(Text(visible(cell)) for cell in row))
        console.print(drawn)
