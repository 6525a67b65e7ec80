"""What an evaluation adds to an adapter's model card: scores as metadata and as a table, and plots."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError
from lit_adapter.evaluation import plots, tables
from lit_adapter.evaluation.history import history
from lit_adapter.evaluation.results import RESULTS, places_of, read_results
from lit_adapter.evaluation.style import STYLE
from lit_adapter.weights.model_card import Evaluated

CURVES, SCORES = "loss.svg", "scores.svg"


def evaluated(adapter: Path, folder: Path | None = None) -> Evaluated:
    """Return what a card says about the training and the evaluation of an adapter, if available.

    The evaluation is in ``folder``; by default in the adapter's run folder, or in a folder of it.

    Raises:
        UserError: ``folder`` holds no evaluation, or one of other adapters.
    """
    files = _curves(adapter)
    found, name = _results(adapter, folder)
    if found is None:
        return Evaluated(section=_pictures(files), files=files)
    scores, titles = found["scores"], found.get("metrics", {})
    files |= _score_plot(scores, titles, name)
    data = found.get("data", {})
    source = Path(str(data.get("source", "held-out records"))).name
    metrics = [
        {"type": metric, "name": tables.title_of(metric, titles), "value": score["value"]}
        for metric, score in scores[name].items()
    ]
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"name": source, "type": source},
        "metrics": metrics,
    }
    section = (
        f"## Evaluation\n\nOn {data.get('records', 'the')} records of `{source}`, with 95 % intervals.\n\n"
    )
    section += _table(scores, titles, name) + _pictures(files)
    return Evaluated([result], section, files)


def _results(adapter: Path, folder: Path | None) -> tuple[dict[str, Any] | None, str]:
    """Return an evaluation's results and the adapter's name in them; None if there are none."""
    run = adapter.resolve().parent
    paths = [run / RESULTS, *sorted(run.glob(f"*/{RESULTS}"))] if folder is None else [folder / RESULTS]
    for path in paths:
        if folder is None and not path.is_file():
            continue
        found = read_results(path)
        scores = found.get("scores")
        if not isinstance(scores, dict):  # an evaluation of only tasks or a plain text
            if folder is None:
                continue
            raise UserError(f"{path}: not the results of an evaluation on records")
        models, own = found["models"], adapter.resolve()
        mine = (one for one in models if own in places_of(one.get("adapter"), path, adapter))
        name = next((one["name"] for one in mine if one.get("name") in scores), None)
        if name is not None:
            return found, str(name)
        if folder is not None:
            raise UserError(f"{path}: evaluates other adapters than {adapter}")
    return None, ""


def _table(scores: dict[str, Any], titles: dict[str, str], name: str) -> str:
    sides = {"base": scores.get("base", {}), "adapter": scores[name]}
    lines = ["| | base | adapter |", "|---|---|---|"]
    for metric in scores[name]:
        cells = [tables.with_interval(metric, of[metric]) if metric in of else "" for of in sides.values()]
        lines.append(f"| {tables.title_of(metric, titles)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _curves(adapter: Path) -> dict[str, bytes]:
    run = history(adapter)
    series = [plots.Series("training", run.train), plots.Series("held out", run.held_out)]
    drawn = plots.lines([one for one in series if one.points], "step", "loss, nats per target")
    return {CURVES: _alone(drawn)} if drawn else {}


def _score_plot(scores: dict[str, Any], titles: dict[str, str], name: str) -> dict[str, bytes]:
    bars = []
    for metric, score in scores[name].items():
        for place, of in enumerate((scores.get("base", {}).get(metric), score)):
            if of is not None and tables.is_share(metric):
                label = f"{tables.title_of(metric, titles)}{'' if place else ', base'}"
                shown = tables.shown(metric, of["value"])
                bars.append(plots.Bar(label, of["value"], of["low"], of["high"], shown, place))
    return {SCORES: _alone(plots.bars(bars))} if bars else {}


def _alone(plot: str) -> bytes:
    """Return a plot as a separate file, with its legend as text below it, in the page's light colours."""
    drawing, _, legend = plot.partition("</svg>")
    names = re.findall(r"</svg>([^<]*)</span>", legend)
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", STYLE.partition("@media")[0]))
    height = int(re.findall(r'height="(\d+)"', drawing)[0])
    drawing = drawing.replace(f'0 {height}"', f'0 {height + 20}"', 1).replace(
        f'height="{height}"', f'height="{height + 20}"', 1
    )
    entries = [
        f'<tspan fill="var(--series-{place % 6})" dx="16">{name}</tspan>' for place, name in enumerate(names)
    ]
    style = (
        f"<style>text {{ fill: {colours['dim']}; font: 11.5px sans-serif; }} "
        f".grid {{ stroke: {colours['line']}; }} .whisker {{ stroke: {colours['ink']}; fill: none; }}</style>"
    )
    drawing = drawing.replace(">", f">{style}", 1)
    text = f'<text x="50" y="{height + 13}">{"".join(entries)}</text>' if entries else ""
    whole = f"{drawing}{text}</svg>"
    return re.sub(r"var\(--([\w-]+)\)", lambda found: colours[found[1]], whole).encode()


def _pictures(files: Iterable[str]) -> str:
    titles = {CURVES: "Loss over steps", SCORES: "Scores beside the base"}
    return "".join(f"\n\n![{titles[name]}]({name})" for name in files)
