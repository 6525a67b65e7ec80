"""A benchmark's rows, written as they come and shown as a table, and its progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lit_adapter.files.write import write_json

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


class Report:
    """Rows by name; the file is rewritten whenever one changes, so that an interrupted run leaves its rows.

    Args:
        machine: stored in every row under ``machine``.
        path: the JSON file, or None.
    """

    def __init__(self, machine: dict[str, Any], path: str | None) -> None:
        self.machine, self.path = machine, path
        self.rows: dict[str, Row] = {}

    def put(self, row: Row) -> None:
        """Add or replace a row."""
        self.rows[row["name"]] = {**row, "machine": self.machine}
        if self.path is not None:
            write_json(Path(self.path), list(self.rows.values()))

    def markdown(self, columns: Sequence[Column]) -> str:
        """Return header and table, fastest first, and below it why methods failed."""
        machine = self.machine
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        lines = [
            f"{machine['device']}, {machine['dtype']}; measured matrix product "
            f"{machine['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s, copy "
            f"{machine['copy_bytes_per_s'] / 1e9:.4g} GB/s; seed {machine['seed']}; {versions}",
            "",
            "| method | " + " | ".join(name for name, _ in columns) + " |",
            "|---|" + "---:|" * len(columns),
        ]
        ordered = sorted(self.rows.values(), key=lambda row: -(row["useful_tokens_per_s"] or 0))
        for row in ordered:
            cells = [show(row) for _, show in columns] if "error" not in row else ["failed"]
            lines.append(
                f"| {row['name']} | " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |"
            )
        lines += [f"\n{row['name']}: {row['error']}" for row in ordered if "error" in row]
        return "\n".join(lines)


def number(key: str, form: str = ",.0f", factor: float = 1.0) -> Callable[[Row], str]:
    """Return a function that formats a row's number; empty if it was not measured."""

    def show(row: Row) -> str:
        value = row.get(key)
        return "" if value is None else format(value * factor, form)

    return show


def spread(row: Row) -> str:
    """Format the median and, in brackets, the slowest and fastest repeat."""
    low, high = row["useful_tokens_per_s_spread"]
    return f"{row['useful_tokens_per_s']:,.1f} ({low:,.1f} to {high:,.1f})"


def spread_if_any(row: Row) -> str:
    """Format the rate of a row that has one."""
    return spread(row) if row["useful_tokens_per_s"] else ""


def failure(error: Exception) -> str:
    """Return an exception in one line."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:300]}"


def progress_bar() -> Progress:
    """Return a progress bar on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(file=sys.stderr),
    )
