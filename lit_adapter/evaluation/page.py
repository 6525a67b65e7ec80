"""``report.html``: summary, tables, plots and answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from lit_adapter.evaluation import plots, tables
from lit_adapter.evaluation.document import document, escaped, plots_of, table_of
from lit_adapter.evaluation.history import History, Strengths, history, strengths
from lit_adapter.evaluation.samples import Sample

BINS = 8
"""Number of bins of lengths."""
MOMENTS = 3
"""Earlier steps whose gates are shown by layer and head."""


def page(
    found: dict[str, Any],
    answers: dict[str, list[dict[str, Any]]],
    shown: dict[str, list[Sample]],
    adapters: Sequence[Path],
) -> str:
    """Return the page: summary, tables, plots, answers."""
    names = [model["name"] for model in found["models"]]
    parts = [f'<p class="dim">{escaped(_about(found))}</p>']
    parts += [f'<p class="lead">{escaped(line)}</p>' for line in tables.lead(found)]
    parts += [f'<p class="warning">{escaped(line)}</p>' for line in found.get("warnings", [])]
    parts += map(table_of, tables.all_tables(found))
    if "scores" in found:
        parts.append(plots_of("Scores", _score_plots(found, answers)))
    for adapter, name in zip(adapters, names[1:], strict=True):
        parts.append(plots_of(f"Training of {name}", _training_plots(adapter, history(adapter))))
    for heading, some in shown.items():
        parts += [f"<h2>{escaped(heading)}</h2>", *map(_sample, some)]
    return document("Evaluation of " + (", ".join(names[1:]) or names[0]), parts)


def _about(found: dict[str, Any]) -> str:
    run = found["run"]
    parts = []
    if "data" in found:
        parts.append(f"{found['data']['source']}, {found['data']['records']:,} records")
        if found["data"]["stop_early"]:
            parts.append("answers end where they can no longer be right")
    return ", ".join([*parts, run["device"], run["precision"], f"{run['seconds']:.0f} s"])


def _score_plots(found: dict[str, Any], answers: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    drawn = {}
    for metric, title in found["metrics"].items():
        bars = [
            plots.Bar(name, of["value"], of["low"], of["high"], tables.shown(metric, of["value"]), place)
            for place, name in enumerate(answers)
            if (of := found["scores"][name].get(metric)) is not None
        ]
        drawn[f"{title}, with 95 % intervals"] = plots.bars(bars) if bars else ""
    curves = [plots.Series(name, _loss_by_length(rows)) for name, rows in answers.items()]
    drawn["Loss by length of the output"] = plots.lines(curves, "tokens of the output", "nats per token")
    for name, matrix in found.get("confusion", {}).items():
        columns = [*matrix["labels"], matrix["other"]]
        drawn[f"Confusion, {name}"] = plots.heat(
            matrix["counts"], matrix["labels"], columns, row_title="output", column_title="answer", shown=True
        )
    return drawn


def _loss_by_length(rows: Sequence[dict[str, Any]]) -> list[plots.Point]:
    """Return mean length and loss per token of records of similar length; equal lengths stay together."""
    measured = sorted((row["targets"], row["loss"]) for row in rows if row["targets"])
    size = max(1, math.ceil(len(measured) / BINS))
    parts: list[list[plots.Point]] = []
    for length, loss in measured:
        if not parts or (len(parts[-1]) >= size and parts[-1][-1][0] != length):
            parts.append([])
        parts[-1].append((length, loss))
    lengths = [sum(length for length, _ in part) for part in parts]
    return [(n / len(p), sum(x for _, x in p) / n) for n, p in zip(lengths, parts, strict=True)]


def _training_plots(adapter: Path, run: History) -> dict[str, str]:
    losses = [plots.Series("training", run.train), plots.Series("held out", run.held_out)]
    drawn = {"Loss": plots.lines([one for one in losses if one.points], "step", "nats per token")}
    last = strengths(adapter)
    if run.gates:
        drawn["Strength of the gates over steps"] = _over_steps(run.gates)
    if last:
        moments = {f"at step {step}": run.gates[step] for step in _spread(sorted(run.gates)[:-1], MOMENTS)}
        moments["of the adapter"] = last
        most = max(value for of in moments.values() for row in of.values() for value in row)
        drawn |= {f"Gates {when}": _by_head(of, most) for when, of in moments.items()}
    return drawn


def _spread(items: Sequence[int], most: int) -> Sequence[int]:
    """Return at most ``most`` items, evenly spread."""
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, min(most, len(items)))]


def _over_steps(gates: dict[int, Strengths]) -> str:
    """Draw the mean over the heads of each layer."""
    chosen = _spread(sorted(gates), 32)
    layers = sorted({layer for step in chosen for layer in gates[step]})
    values = [[fmean(gates[step].get(layer, [math.nan])) for step in chosen] for layer in layers]
    rows, columns = list(map(str, layers)), list(map(str, chosen))
    return plots.heat(values, rows, columns, row_title="layers", column_title="steps")


def _by_head(of: Strengths, most: float) -> str:
    """Draw layers by heads, shaded in proportion to ``most``."""
    heads = list(map(str, range(max(map(len, of.values())))))
    rows = list(of.values())
    return plots.heat(
        rows, list(map(str, of)), heads, row_title="layers", column_title="attention heads", most=most
    )


def _sample(sample: Sample) -> str:
    sides = [f"<div><h3>expected</h3><pre>{escaped(sample.reference)}</pre></div>"]
    for name, text in sample.answers.items():
        score, loss = sample.scores[name], sample.losses[name]
        verdict = "" if score is None else "right" if score >= 1 else "wrong"
        numbers = [
            f"{score:.2g}" if score is not None else "",
            f"loss {loss:.2f}" if loss is not None else "",
        ]
        shown = ", ".join(filter(None, numbers))
        title = f'<h3>{escaped(name)} <span class="dim">{shown}</span></h3>'
        sides.append(f'<div>{title}<pre class="{verdict}">{escaped(text)}</pre></div>')
    head = f'<span class="dim">{escaped(sample.origin)}</span><pre>{escaped(sample.request)}</pre>'
    return f'<div class="sample">{head}<div class="sides">{"".join(sides)}</div></div>'
