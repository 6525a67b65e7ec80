"""``report.html``: one file that needs nothing else; light or dark as the reader's system is."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_adapter.errors import visible
from lit_adapter.evaluation import plots, tables
from lit_adapter.evaluation.history import History, history, strengths
from lit_adapter.evaluation.samples import Sample
from lit_adapter.evaluation.tables import Table

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --dim: #5d6776; --page: #ffffff; --card: #f5f7fa; --line: #d8dee6;
  --heat: #1f6fb4; --good: #1a7f4b; --bad: #b3372f; --warn: #fff4d6; --series-0: #7b8794; --series-1: #1f6fb4;
  --series-2: #d9742b; --series-3: #2c8a57; --series-4: #8a55b8; --series-5: #b83a5e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --dim: #9aa5b4; --page: #14181f; --card: #1d232d;
  --line: #333c49; --heat: #5ab0f2; --good: #5fce94; --bad: #f08a80; --warn: #3a3115; --series-0: #98a4b3;
  --series-1: #5ab0f2; --series-2: #f0a062; --series-3: #62c995; --series-4: #bf95e6; --series-5: #ef83a2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
.dim { color: var(--dim); font-size: .88rem; }
.lead { font-size: 1.08rem; margin: .5rem 0; }
.warning { background: var(--warn); padding: .5rem .8rem; border-radius: 6px; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots > div { background: var(--card); border-radius: 8px;
  padding: .8rem 1rem; max-width: 100%; overflow-x: auto; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--dim); font: 11.5px system-ui, sans-serif; }
svg text.on-heat { fill: var(--page); } svg .grid { stroke: var(--line); } .whisker { stroke: var(--ink); fill: none; }
.legend { margin: .2rem 0 0; font-size: .85rem; } .legend span { margin-right: 1rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--dim); font-weight: 600; } td { font-variant-numeric: tabular-nums; }
.sample { background: var(--card); border-radius: 8px; padding: .7rem 1rem; margin: .6rem 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .8rem; margin-top: .4rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.45 ui-monospace, monospace; }
.right { color: var(--good); } .wrong { color: var(--bad); }
"""
BINS = 8
"""Of lengths."""


def page(
    found: dict[str, Any],
    answers: dict[str, list[dict[str, Any]]],
    shown: dict[str, list[Sample]],
    adapters: Sequence[Path],
) -> str:
    """Return the page: summary, tables, plots, answers."""
    names = [model["name"] for model in found["models"]]
    title = "Evaluation of " + (", ".join(names[1:]) or names[0])
    parts = [f"<h1>{_e(title)}</h1>", f'<p class="dim">{_e(_about(found))}</p>']
    parts += [f'<p class="lead">{_e(line)}</p>' for line in tables.summary(found)]
    parts += [f'<p class="warning">{_e(line)}</p>' for line in found.get("warnings", [])]
    if "scores" in found:
        parts += [_table(tables.score_table(found)), _plots("Scores", _score_plots(found, answers))]
    if found.get("comparisons"):
        parts.append(_table(tables.comparison_table(found)))
    forgetting = tables.forgetting_table(found)
    parts += [_table(forgetting)] if forgetting else []
    parts += [_table(tables.field_table(found))] if "fields" in found else []
    for adapter, name in zip(adapters, names[1:], strict=True):
        parts.append(_plots(f"Training of {name}", _training_plots(adapter, history(adapter))))
    for heading, some in shown.items():
        parts += [f"<h2>{_e(heading)}</h2>", *map(_sample, some)]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_e(title)}</title>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>{"".join(parts)}</body></html>\n'


def _e(text: str) -> str:
    return html.escape(visible(text))


def _about(found: dict[str, Any]) -> str:
    run = found["run"]
    parts = []
    if "data" in found:
        parts.append(f"{found['data']['source']}, {found['data']['records']:,} records")
        if found["data"]["stop_early"]:
            parts.append("answers end where they can no longer be right")
    return ", ".join([*parts, run["device"], run["precision"], f"{run['seconds']:.0f} s"])


def _table(table: Table) -> str:
    header = "".join(f"<th>{_e(cell)}</th>" for cell in table.header)
    rows = "".join(f"<tr>{''.join(f'<td>{_e(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f'<h2>{_e(table.title)}</h2><div class="wide"><table><tr>{header}</tr>{rows}</table></div>'


def _plots(title: str, drawn: dict[str, str]) -> str:
    cards = [f"<div><h3>{_e(name)}</h3>{plot}</div>" for name, plot in drawn.items() if plot]
    return f'<h2>{_e(title)}</h2><div class="plots">{"".join(cards)}</div>' if cards else ""


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
    """Return mean length and loss per token of records of similar length."""
    measured = sorted((row["targets"], row["loss"]) for row in rows if row["targets"])
    size = max(1, math.ceil(len(measured) / BINS))
    parts = [measured[at : at + size] for at in range(0, len(measured), size)]
    return [(sum(n for n, _ in p) / len(p), sum(x for _, x in p) / sum(n for n, _ in p)) for p in parts]


def _training_plots(adapter: Path, run: History) -> dict[str, str]:
    losses = [plots.Series("training", run.train), plots.Series("held out", run.held_out)]
    drawn = {"Loss": plots.lines([one for one in losses if one.points], "step", "nats per token")}
    gates = strengths(adapter)
    if gates:
        layers = list(map(str, gates))
        heads = list(map(str, range(max(map(len, gates.values())))))
        drawn["Strength of the gates at the end"] = plots.heat(
            list(gates.values()), layers, heads, row_title="layers", column_title="attention heads"
        )
    if run.gates:
        steps = sorted({step for curve in run.gates.values() for step, _ in curve})
        chosen = steps[:: max(1, math.ceil(len(steps) / 32))]
        by_layer = {layer: dict(curve) for layer, curve in sorted(run.gates.items())}
        values = [[of.get(step, math.nan) for step in chosen] for of in by_layer.values()]
        drawn["Strength of the gates over steps"] = plots.heat(
            values,
            list(map(str, by_layer)),
            [f"{step:.0f}" for step in chosen],
            row_title="layers",
            column_title="steps",
        )
    return drawn


def _sample(sample: Sample) -> str:
    sides = [f"<div><h3>expected</h3><pre>{_e(sample.reference)}</pre></div>"]
    for name, text in sample.answers.items():
        score, loss = sample.scores[name], sample.losses[name]
        verdict = "" if score is None else "right" if score >= 1 else "wrong"
        numbers = [
            f"{score:.2g}" if score is not None else "",
            f"loss {loss:.2f}" if loss is not None else "",
        ]
        shown = ", ".join(filter(None, numbers))
        sides.append(
            f'<div><h3>{_e(name)} <span class="dim">{shown}</span></h3><pre class="{verdict}">{_e(text)}</pre></div>'
        )
    head = f'<span class="dim">{_e(sample.origin)}</span><pre>{_e(sample.request)}</pre>'
    return f'<div class="sample">{head}<div class="sides">{"".join(sides)}</div></div>'
