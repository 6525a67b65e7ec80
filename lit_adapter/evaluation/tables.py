"""The tables of a report, as plain cells that Markdown, HTML and the terminal show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lit_adapter.errors import counted
from lit_adapter.evaluation.metrics import METRICS

MOST_SENTENCES = 4
"""How many a report without comparisons begins with."""
TITLES = {"loss": "loss (nats per token)", "perplexity": "perplexity", "macro_f1": "macro F1"}


@dataclass(frozen=True)
class Table:
    """Cells by row; the first column is names."""

    title: str
    header: list[str]
    rows: list[list[str]]


def is_share(metric: str) -> bool:
    """Whether a metric is from 0 to 1, and shown as a percentage."""
    return metric in METRICS or metric == "macro_f1"


def shown(metric: str, value: float) -> str:
    """Return a value as people read it."""
    return f"{value:.1%}" if is_share(metric) else number(value)


def number(value: float) -> str:
    """Return a number with four significant digits, or whole from 1,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def with_interval(metric: str, found: dict[str, Any]) -> str:
    """Return a value with its interval."""
    low, high = (shown(metric, found[end]).removesuffix("%") for end in ("low", "high"))
    return f"{shown(metric, found['value'])} ({low} to {high})"


def with_error(value: float, spread: float | None) -> str:
    """Return a value with its standard error, where it has one."""
    return number(value) + ("" if spread is None else f" \u00b1 {spread:.2g}")


def title_of(metric: str, titles: dict[str, str]) -> str:
    """Return a metric's title."""
    return titles.get(metric, TITLES.get(metric, metric))


def summary(found: dict[str, Any]) -> list[str]:
    """Return one sentence for each adapter against the base, on the first metric."""
    metric = next(iter(found.get("metrics", ())), None)
    return [
        _sentence(found, metric, row)
        for row in found.get("comparisons", ())
        if row["metric"] == metric and row["against"] == "base" and row["records"]
    ]


def lead(found: dict[str, Any]) -> list[str]:
    """Return what a report begins with: the summary, or without comparisons the first values."""
    return summary(found) or _first_values(found)


def _first_values(found: dict[str, Any]) -> list[str]:
    table = score_table(found) if "scores" in found else forgetting_table(found)
    if table is None:
        return []
    of_models = slice(1, 1 + len(found["models"]))
    sentences = []
    for row in table.rows[:MOST_SENTENCES]:
        pairs = zip(table.header[of_models], row[of_models], strict=True)
        values = ", ".join(f"{name} {value}" for name, value in pairs)
        sentences.append(f"{_capital(row[0])}: {values}.")
    return sentences


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(found: dict[str, Any], metric: str, row: dict[str, Any]) -> str:
    mine, base = (found["scores"][row[key]][metric] for key in ("model", "against"))
    title = title_of(metric, found["metrics"])
    return (
        f"{_capital(title)} on {counted(row['records'], 'record')}: {row['model']} "
        f"{with_interval(metric, mine)}, base {with_interval(metric, base)}; "
        f"{_verdict(row)} ({_p(row)})."
    )


def all_tables(found: dict[str, Any]) -> list[Table]:
    """Return the tables that the results have."""
    made = [score_table(found)] if "scores" in found else []
    made += [comparison_table(found)] if found.get("comparisons") else []
    made += [field_table(found)] if "fields" in found else []
    forgetting = forgetting_table(found)
    return [*made, *([forgetting] if forgetting else [])]


def score_table(found: dict[str, Any]) -> Table:
    """Return every model's numbers on the records."""
    names = list(found["scores"])
    rows = []
    for metric in (*found["metrics"], "macro_f1", "loss", "perplexity"):
        values = [found["scores"][name].get(metric) for name in names]
        if any(values):
            cells = ["" if value is None else with_interval(metric, value) for value in values]
            rows.append([title_of(metric, found["metrics"]), *cells])
    return Table("Scores, with 95 % intervals", ["", *names], rows)


def comparison_table(found: dict[str, Any]) -> Table:
    """Return every paired comparison."""
    rows = [_comparison(row, found) for row in found["comparisons"] if row["records"]]
    header = ["", "metric", "difference", "p", "verdict", "detectable from"]
    return Table("Paired comparisons", header, rows)


def _comparison(row: dict[str, Any], found: dict[str, Any]) -> list[str]:
    share = is_share(row["metric"])
    unit = " points" if share else ""
    keys = ("difference", "low", "high", "detectable")
    difference, low, high, least = (
        "" if row[key] is None else f"{100 * row[key]:+.1f}" if share else f"{row[key]:+.3g}" for key in keys
    )
    return [
        f"{row['model']} against {row['against']}",
        title_of(row["metric"], found["metrics"]),
        f"{difference} ({low} to {high}){unit}",
        _p(row).removeprefix("p ").removeprefix("= "),
        _verdict(row),
        least.removeprefix("+") + unit if least else "none, with so few records",
    ]


def _verdict(row: dict[str, Any]) -> str:
    if row["difference"] == 0:
        return "no difference"
    return "may be due to chance" if row["noise"] else "more than chance"


def _p(row: dict[str, Any]) -> str:
    return "p < 0.001" if row["p_value"] < 0.001 else f"p = {row['p_value']:.2g}"


def field_table(found: dict[str, Any]) -> Table:
    """Return the share of equal values by field of JSON outputs."""
    names = list(found["fields"])
    keys = list(dict.fromkeys(key for name in names for key in found["fields"][name]))
    rows = []
    for key in keys:
        cells = [found["fields"][name].get(key) for name in names]
        rows.append([key, str(cells[0]["records"]), *(f"{c['equal'] / c['records']:.1%}" for c in cells)])
    return Table("JSON fields that are equal", ["field", "records", *names], rows)


PLAIN = {"perplexity": "plain text, perplexity", "bits_per_byte": "plain text, bits per byte"}


def beside_records(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, tuple[float, float | None]]]]:
    """Yield the title of every result on tasks and plain text, with each model's value and standard error."""
    for task, metrics in found.get("tasks", {}).items():
        for metric, by_model in metrics.items():
            title = f"{task}, {metric}"
            yield title, {name: (score["value"], score["stderr"]) for name, score in by_model.items()}
    if "plain" in found:
        for key, title in PLAIN.items():
            yield title, {name: (values[key], None) for name, values in found["plain"].items()}


def forgetting_table(found: dict[str, Any]) -> Table | None:
    """Return tasks and plain text before and after, with the change; None if neither was asked for."""
    names = [model["name"] for model in found["models"]]
    measured = beside_records(found)
    rows = [[title, *_cells([by_model[name] for name in names])] for title, by_model in measured]
    if not rows:
        return None
    changes = [f"{name} - {names[0]}" for name in names[1:]]
    return Table("Before and after: what else was learned or forgotten", ["", *names, *changes], rows)


def _cells(values: list[tuple[float, float | None]]) -> list[str]:
    """Return values with their standard errors, and their differences from the first."""
    cells = [with_error(value, spread) for value, spread in values]
    apart = [value - values[0][0] for value, _ in values[1:]]
    return [*cells, *("+" * (value >= 0) + number(value) for value in apart)]
