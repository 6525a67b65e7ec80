"""``report.md`` and ``report.html``: the results for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_adapter.errors import visible
from lit_adapter.evaluation import tables
from lit_adapter.evaluation.page import page
from lit_adapter.evaluation.samples import Sample, samples
from lit_adapter.evaluation.tables import Table
from lit_adapter.files.write import write_text

Answers = dict[str, list[dict[str, Any]]]
"""Every model's rows of ``answers.jsonl``."""


def write_report(out: Path, found: dict[str, Any], answers: Answers, adapters: Sequence[Path]) -> None:
    """Write both files into ``out``.

    Args:
        out: the evaluation's folder.
        found: the contents of ``results.json``.
        answers: empty without records.
        adapters: whose runs' curves are shown.
    """
    shown = samples(found, answers) if answers else {}
    write_text(out / "report.md", _markdown(found, shown))
    write_text(out / "report.html", page(found, answers, shown, adapters))


def _markdown(found: dict[str, Any], shown: dict[str, list[Sample]]) -> str:
    parts = ["# Evaluation", *tables.lead(found)]
    parts += [f"**Warning:** {line}" for line in found.get("warnings", [])]
    for table in tables.all_tables(found):
        parts += [f"## {table.title}", markdown_table(table)]
    for title, chosen in shown.items():
        parts.append(f"## {title}")
        parts += ["\n".join(_markdown_sample(sample)) for sample in chosen]
    run = found["run"]
    parts.append(f"{run['device']}, {run['precision']}, {run['seconds']:.0f} s")
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """Return a table in Markdown, without its title."""
    ruler = ["---", *["---:"] * (len(table.header) - 1)]
    rows = [table.header, ruler, *table.rows]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(text: str) -> str:
    return visible(text).replace("|", "\\|").replace("\n", " ")


def _markdown_sample(sample: Sample) -> list[str]:
    texts = {"request": sample.request, "expected": sample.reference, **sample.answers}
    lines = [f"- {sample.origin}"]
    for name, text in texts.items():
        lines += [f"  - {_cell(name)}:", *(f"        {visible(line)}" for line in text.splitlines() or [""])]
    return lines
