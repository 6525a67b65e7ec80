"""The results on a terminal."""

from __future__ import annotations

import sys
from typing import Any

from lit_adapter.errors import visible
from lit_adapter.evaluation import tables
from lit_adapter.streams import say


def show(found: dict[str, Any]) -> None:
    """Print the tables, the sentences of the summary and the warnings."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    forgetting = tables.forgetting_table(found)
    for table in [
        *([tables.score_table(found)] if "scores" in found else []),
        *([forgetting] if forgetting else []),
    ]:
        drawn = Table(title=table.title, title_justify="left")
        for place, name in enumerate(table.header):
            drawn.add_column(visible(name), justify="left" if place == 0 else "right")
        for row in table.rows:
            drawn.add_row(*(Text(visible(cell)) for cell in row))
        console.print(drawn)
    for line in tables.summary(found):
        say(line)
    for line in found.get("warnings", []):
        say(f"warning: {line}", sys.stderr)
