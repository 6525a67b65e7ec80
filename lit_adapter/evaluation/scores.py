"""Every model's scores and losses, their intervals, and their differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_adapter.errors import counted
from lit_adapter.evaluation import labels, statistics
from lit_adapter.evaluation.answer_file import AnswerFile
from lit_adapter.evaluation.contestants import Contestant
from lit_adapter.evaluation.metrics import canonical, json_value
from lit_adapter.evaluation.on_records import Subject


def results(asked: Subject, models: Sequence[Contestant], file: AnswerFile) -> dict[str, Any]:
    """Return the scores of every model with their intervals, comparisons, and tables of single metrics."""
    table = {one.name: _Column(asked, one.name, file) for one in models}
    names = [metric.name for metric in asked.metrics]
    comparisons = [
        {
            "model": other.name,
            "against": first.name,
            "metric": metric,
            **_compared(table, other, first, metric),
        }
        for first, other in _pairs(models)
        for metric in ("loss", *names)
    ]
    found: dict[str, Any] = {
        "metrics": {metric.name: metric.title for metric in asked.metrics},
        "scores": {name: column.estimates() for name, column in table.items()},
        "comparisons": comparisons,
    }
    if "label" in names:
        found["confusion"] = {name: column.confusion() for name, column in table.items()}
    if "json_fields" in names:
        found["fields"] = {name: column.fields() for name, column in table.items()}
    return found


def _pairs(models: Sequence[Contestant]) -> list[tuple[Contestant, Contestant]]:
    """Return the pairs to compare: every adapter with the base, and with the adapter before it."""
    base, *adapters = models
    return [(base, one) for one in adapters] + list(pairwise(adapters))


class _Column:
    """One model's values, record by record."""

    def __init__(self, asked: Subject, name: str, file: AnswerFile) -> None:
        self.asked = asked
        self.rows = [file.values[name, i] for i in range(len(asked.records))]
        self.answers = [row["answer"] for row in self.rows]

    def values(self, metric: str) -> NDArray[np.float64]:
        """Return the scores ``[records]``; NaN for a record that does not count."""
        key = [row["loss"] if metric == "loss" else row["scores"][metric] for row in self.rows]
        return np.array([np.nan if value is None else value for value in key], np.float64)

    @property
    def targets(self) -> NDArray[np.float64]:
        """Targets of each record ``[records]``."""
        return np.array([row["targets"] for row in self.rows], np.float64)

    def estimates(self) -> dict[str, Any]:
        """Return every number that the model has, with its interval."""
        loss, targets = self.values("loss"), self.targets
        kept = ~np.isnan(loss)
        found = {}
        if kept.any():
            of_loss = statistics.estimate(loss[kept], targets[kept])
            found["loss"] = asdict(of_loss)
            found["perplexity"] = asdict(of_loss) | {
                name: math.exp(min(getattr(of_loss, name), 50.0)) for name in ("value", "low", "high")
            }
        for metric in self.asked.metrics:
            values = self.values(metric.name)
            values = values[~np.isnan(values)]
            if len(values):
                found[metric.name] = asdict(statistics.estimate(values))
        if "label" in found:
            _, codes = labels.coded(self.answers, self.asked.references)
            macro = statistics.estimate_of(lambda rows: labels.macro_f1(codes[rows]), len(codes))
            found["macro_f1"] = asdict(macro)
        return found

    def confusion(self) -> dict[str, Any]:
        """Return the confusion matrix."""
        counted_ = labels.confusion(self.answers, self.asked.references)
        return {"labels": [*counted_.labels], "other": labels.OTHER, "counts": counted_.counts.tolist()}

    def fields(self) -> dict[str, Any]:
        """Return for each field of the references how many answers have the same value."""
        right: dict[str, list[bool]] = {}
        for text, reference in zip(self.answers, self.asked.references, strict=True):
            given, wanted = json_value(text), json_value(reference)
            for key, value in wanted.items() if isinstance(wanted, dict) else ():
                there = isinstance(given, dict) and key in given
                right.setdefault(key, []).append(there and canonical(given[key]) == canonical(value))
        return {key: {"equal": sum(found), "records": len(found)} for key, found in right.items()}


def _compared(table: dict[str, _Column], other: Contestant, first: Contestant, metric: str) -> dict[str, Any]:
    values, against = table[other.name].values(metric), table[first.name].values(metric)
    kept = ~(np.isnan(values) | np.isnan(against))
    if not kept.any():
        return {"records": 0}
    weights = table[other.name].targets[kept] if metric == "loss" else None
    found = statistics.compare(values[kept], against[kept], weights)
    return {**asdict(found), "noise": found.is_noise, "records": int(kept.sum())}


def warnings(found: dict[str, Any]) -> list[str]:
    """Return a line for every comparison by the first metric that shows nothing but chance."""
    lines = []
    first = next(iter(found["metrics"]))
    for row in found["comparisons"]:
        if row["metric"] == first and row.get("noise"):
            least = row["detectable"]
            few = "is too few to show one" if row["records"] == 1 else "are too few to show one"
            shows = few if least is None else f"would show one from about {least:.2f}"
            lines.append(
                f"{row['model']} and {row['against']} do not differ by more than chance in {first} "
                f"({row['difference']:+.3f}, p = {row['p_value']:.2f}): {counted(row['records'], 'record')} "
                f"{shows}"
            )
    return lines
