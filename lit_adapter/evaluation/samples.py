"""Which answers a report shows: the worst ones, and those that an adapter has changed most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHOWN = 8
"""Samples of each kind; as many first records are always answered to the end."""
CUT = " \u2026"
"""Marks an answer that ended where it could no longer be right."""


@dataclass(frozen=True)
class Sample:
    """One record, and what the models answered."""

    origin: str
    request: str
    reference: str
    answers: dict[str, str]
    scores: dict[str, float | None]
    """Scores by the first metric."""
    losses: dict[str, float | None]
    """Nats per token of the reference."""
    is_whole: bool
    """Whether no answer was ended early."""


def samples(found: dict[str, Any], answers: dict[str, list[dict[str, Any]]]) -> dict[str, list[Sample]]:
    """Return samples by title; a title without samples is left out."""
    metric, last = next(iter(found["metrics"])), list(answers)[-1]
    n_whole = SHOWN if found["data"]["stop_early"] else len(answers[last])
    all_ = [
        _sample(metric, {name: rows[i] for name, rows in answers.items()}, i < n_whole)
        for i in range(len(answers[last]))
    ]
    wrong = [sample for sample in all_ if (sample.scores[last] or 0.0) < 1.0]
    wrong.sort(key=lambda sample: (sample.scores[last] or 0.0, -(sample.losses[last] or 0.0)))
    chosen = {f"Worst answers of {last}": wrong[:SHOWN]}
    if len(answers) > 1:
        first = next(iter(answers))
        by_change = sorted(all_, key=lambda sample: _change(sample, first, last))
        worse = [sample for sample in by_change if _change(sample, first, last)[0] < 0][:SHOWN]
        better = [sample for sample in reversed(by_change) if _change(sample, first, last)[0] > 0][:SHOWN]
        chosen[f"Better before: {first} ahead of {last}"] = worse
        chosen[f"Most improved: {last} ahead of {first}"] = better
    return {title: some for title, some in chosen.items() if some}


def _sample(metric: str, rows: dict[str, dict[str, Any]], is_whole: bool) -> Sample:
    any_ = next(iter(rows.values()))
    return Sample(
        any_["origin"],
        "\n\n".join(text for text in (any_["instruction"], any_["input"]) if text),
        any_["reference"],
        {name: row["answer"] + CUT * _is_cut(row["scores"][metric], is_whole) for name, row in rows.items()},
        {name: row["scores"][metric] for name, row in rows.items()},
        {name: row["loss"] / row["targets"] if row["targets"] else None for name, row in rows.items()},
        is_whole,
    )


def _is_cut(score: float | None, is_whole: bool) -> bool:
    """Whether an answer may have ended early; one that is right has not."""
    return not is_whole and (score or 0.0) < 1


def _change(sample: Sample, first: str, last: str) -> tuple[float, bool, float]:
    """Return how much better an answer became, whether it is whole, and how much its output gained."""
    score = (sample.scores[last] or 0.0) - (sample.scores[first] or 0.0)
    return score, sample.is_whole, (sample.losses[first] or 0.0) - (sample.losses[last] or 0.0)
