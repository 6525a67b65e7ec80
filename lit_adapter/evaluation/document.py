"""Self-contained HTML files: the report of an evaluation, and a comparison of runs."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping

from lit_adapter.errors import visible
from lit_adapter.evaluation.style import STYLE
from lit_adapter.evaluation.tables import Table


def document(title: str, parts: Iterable[str]) -> str:
    """Return a page of these parts below a title, light or dark like the reader's system."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{escaped(title)}</title><style>{STYLE}</style>"
    body = f"<h1>{escaped(title)}</h1>{''.join(parts)}"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def escaped(text: str) -> str:
    """Return a text of any origin as HTML that shows it, hidden characters included."""
    return html.escape(visible(text))


def table_of(table: Table) -> str:
    """Return a table under its title."""
    header = "".join(f"<th>{escaped(cell)}</th>" for cell in table.header)
    rows = "".join(f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f'<h2>{escaped(table.title)}</h2><div class="wide"><table><tr>{header}</tr>{rows}</table></div>'


def plots_of(title: str, drawn: Mapping[str, str]) -> str:
    """Return the plots that are not empty, each with its title, under a common title."""
    cards = [f"<div><h3>{escaped(name)}</h3>{plot}</div>" for name, plot in drawn.items() if plot]
    return f'<h2>{escaped(title)}</h2><div class="plots">{"".join(cards)}</div>' if cards else ""
