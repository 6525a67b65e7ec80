"""What an evaluation adds to an adapter's model card: scores as metadata and as tables, and plots."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError, counted
from lit_adapter.evaluation import plots, tables
from lit_adapter.evaluation.contestants import BASE
from lit_adapter.evaluation.history import history
from lit_adapter.evaluation.report import markdown_table
from lit_adapter.evaluation.results import RESULTS, places_of, read_results
from lit_adapter.evaluation.style import STYLE
from lit_adapter.evaluation.tables import Table
from lit_adapter.files.read import file_sha256
from lit_adapter.weights.model_card import Evaluated

CURVES, SCORES = "loss.svg", "scores.svg"
MEASURED = ("scores", "tasks", "plain")
"""Keys of results, of which an evaluation has at least one."""
ARGUMENTS = {"few_shot": "num_few_shot"}
"""What cards on the Hub call a setting."""


@dataclass(frozen=True)
class _Part:
    """What an evaluation says about an adapter on one data set."""

    identity: str
    """The same for data of the same name in another evaluation: a card could not tell them apart."""
    dataset: dict[str, Any]
    metrics: list[dict[str, Any]]
    """Both as the Hub's ``model-index`` has them."""
    heading: str
    """Parts with the same one share a table."""
    rows: list[list[str]]
    """Title, base and adapter."""


def evaluated(adapter: Path, folder: Path | None = None) -> Evaluated:
    """Return what a card says about the training and the evaluations of an adapter, if available.

    The evaluation is in ``folder``; by default, all in the adapter's run folder and in its folders are taken,
    but none of an earlier state of the adapter. Of several on data of one name the first counts, and one
    without a limit before others.

    Raises:
        UserError: ``folder`` holds no evaluation, or one of other adapters.
    """
    evaluations = sorted(_evaluations(adapter, folder), key=_is_limited)
    on_records = next(((found, name) for found, name in evaluations if name in found.get("scores", {})), None)
    files = _curves(adapter) | (_score_plot(*on_records) if on_records else {})
    parts: dict[str, _Part] = {}
    for found, name in evaluations:
        for part in (*_on_records(found, name), *_on_tasks(found, name), *_on_plain_text(found, name)):
            parts.setdefault(part.identity, part)
    results = [
        {"task": {"type": "text-generation"}, "dataset": part.dataset, "metrics": part.metrics}
        for part in parts.values()
    ]
    section = ["## Evaluation"] if parts else []
    for heading in dict.fromkeys(part.heading for part in parts.values()):
        rows = [row for part in parts.values() if part.heading == heading for row in part.rows]
        section += [heading, markdown_table(Table("", ["", BASE, "adapter"], rows))]
    return Evaluated(results, "\n\n".join([*section, *_pictures(files)]), files)


def _evaluations(adapter: Path, folder: Path | None) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the results of every evaluation of an adapter, with the adapter's name in them."""
    own = adapter.resolve()
    everywhere = [own.parent / RESULTS, *sorted(own.parent.glob(f"*/{RESULTS}"))]
    paths = [path for path in everywhere if path.is_file()] if folder is None else [folder / RESULTS]
    digest = file_sha256(adapter) if paths else ""
    for path in paths:
        found = read_results(path)
        if not _measures(found):
            if folder is None:
                continue
            raise UserError(f"{path}: not the results of an evaluation on records, tasks or a plain text")
        mine = (
            one
            for one in found["models"]
            if own in places_of(one.get("adapter"), path, adapter) and one.get("sha256", digest) == digest
        )
        name = next((one["name"] for one in mine if "name" in one), None)
        if name is not None:
            yield found, str(name)
        elif folder is not None:
            raise UserError(f"{path}: evaluates other adapters than {adapter}, or an earlier state of it")


def _is_limited(evaluation: tuple[dict[str, Any], str]) -> bool:
    return evaluation[0].get("run", {}).get("limit") is not None


def _measures(found: dict[str, Any]) -> bool:
    kinds = [found[key] for key in MEASURED if key in found]
    return any(kinds) and all(isinstance(kind, dict) for kind in kinds)


def _on_records(found: dict[str, Any], name: str) -> Iterator[_Part]:
    scores, titles, data = found.get("scores", {}), found.get("metrics", {}), found.get("data", {})
    if name not in scores:
        return
    source = _file_name(data, "held-out records")
    metrics = [_metric(kind, score, tables.title_of(kind, titles)) for kind, score in scores[name].items()]
    sides = [scores.get(BASE, {}), scores[name]]
    rows = [
        [title["name"], *(tables.with_interval(kind, of[kind]) if kind in of else "" for of in sides)]
        for kind, title in zip(scores[name], metrics, strict=True)
    ]
    heading = f"On {data.get('records', 'the')} records of `{source}`, with 95 % intervals."
    dataset = {"name": source, "type": source}
    yield _Part(f"records {source}", dataset, metrics, heading, rows)


def _on_tasks(found: dict[str, Any], name: str) -> Iterator[_Part]:
    asked = {key: found.get("run", {}).get(key) for key in ("limit", "few_shot", "chat_template")}
    heading = "On tasks of lm-evaluation-harness, with standard errors" + _conditions(**asked) + "."
    arguments = {
        ARGUMENTS.get(key, key): value
        for key, value in asked.items()
        if not (value is None or value is False)
    }
    for task, by_metric in found.get("tasks", {}).items():
        dataset = {"name": task, "type": task, **({"args": arguments} if arguments else {})}
        metrics, rows = [], []
        for kind, by_model in by_metric.items():
            if name in by_model:
                metrics.append(_metric(kind.partition(" ")[0], by_model[name], kind))
                sides = [by_model.get(side) for side in (BASE, name)]
                cells = [tables.with_error(side["value"], side["stderr"]) if side else "" for side in sides]
                rows.append([f"{task}, {kind}", *cells])
        if rows:
            yield _Part(f"task {task}", dataset, metrics, heading, rows)


def _conditions(limit: int | None, few_shot: int | None, chat_template: bool | None) -> str:
    """Return how tasks were asked, where that is not as they say."""
    told = [f"the first {limit} questions of each"] if limit is not None else []
    told += [f"{counted(few_shot, 'example')} before each question"] if few_shot is not None else []
    told += ["in the base's chat template"] if chat_template else []
    return "".join(f", {one}" for one in told)


def _on_plain_text(found: dict[str, Any], name: str) -> Iterator[_Part]:
    plain, about = found.get("plain", {}), found.get("plain_text", {})
    if name not in plain:
        return
    source = _file_name(about, "plain text")
    titles = {"perplexity": "perplexity", "bits_per_byte": "bits per byte"}
    metrics = [_metric(kind, {"value": plain[name][kind]}, title) for kind, title in titles.items()]
    rows = [
        [title, *(tables.number(plain[side][kind]) if side in plain else "" for side in (BASE, name))]
        for kind, title in titles.items()
    ]
    heading = f"On {plain[name]['tokens']:,} tokens of the plain text `{source}`."
    dataset = {"name": source, "type": source}
    yield _Part(f"plain text {source}", dataset, metrics, heading, rows)


def _metric(kind: str, score: dict[str, Any], title: str) -> dict[str, Any]:
    return {"type": kind, "name": title, "value": score["value"]}


def _file_name(about: dict[str, Any], otherwise: str) -> str:
    """Return a file's name without its folder, which is nobody else's business."""
    return Path(str(about.get("source", otherwise))).name


def _curves(adapter: Path) -> dict[str, bytes]:
    run = history(adapter)
    series = [plots.Series("training", run.train), plots.Series("held out", run.held_out)]
    drawn = plots.lines([one for one in series if one.points], "step", "loss, nats per target")
    return {CURVES: _alone(drawn)} if drawn else {}


def _score_plot(found: dict[str, Any], name: str) -> dict[str, bytes]:
    scores, titles = found["scores"], found.get("metrics", {})
    bars = []
    for metric, score in scores[name].items():
        for place, of in enumerate((scores.get(BASE, {}).get(metric), score)):
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


def _pictures(files: Iterable[str]) -> list[str]:
    titles = {CURVES: "Loss over steps", SCORES: "Scores beside the base"}
    return [f"![{titles[name]}]({name})" for name in titles if name in files]
