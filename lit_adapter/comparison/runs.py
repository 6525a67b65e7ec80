"""The contents of a run folder: configuration, losses, cost, and evaluations of its adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_adapter.config import dotted
from lit_adapter.errors import UserError
from lit_adapter.evaluation.history import History, history
from lit_adapter.evaluation.results import RESULTS, places_of, read_results
from lit_adapter.evaluation.tables import beside_records, title_of
from lit_adapter.files.read import read_json
from lit_adapter.weights.adapter_search import ADAPTER

RECORD = "run.json"
OWN = ("out", "seed")
"""Settings in which the runs of a group differ."""
WITHOUT_EFFECT = (
    "data.workers",
    *(f"trainer.{name}" for name in ("log_every", "save_every", "keep_checkpoints", "progress", "logger")),
    *(f"trainer.{name}" for name in ("samples", "sample_tokens")),
)
"""Settings that do not affect results."""
NORMAL_95 = 1.96
"""Half the width of a 95 % interval, in standard errors."""


@dataclass(frozen=True)
class Metric:
    """A metric and the records that it was measured on."""

    name: str
    title: str
    records: str = ""
    """The hash of the records; empty for tasks and plain text."""
    source: str = ""
    """The name of the records if there are several sets; empty for the only one."""

    @property
    def on(self) -> str:
        """The suffix of the metric's name."""
        return f" on {self.source}" if self.source else ""


@dataclass(frozen=True)
class Run:
    """One run; numbers that its files do not give are NaN."""

    name: str
    folder: Path
    record: dict[str, Any]
    settings: dict[str, Any]
    """The configuration by dotted names."""
    curves: History
    scores: dict[Metric, dict[str, float]] = field(default_factory=dict)
    """Value and 95 % interval (``low``, ``high``)."""

    def number(self, *path: str) -> float:
        """Return a number of ``run.json``."""
        value = self._at(path)
        return float(value) if isinstance(value, int | float) else math.nan

    def _at(self, path: Sequence[str]) -> Any:
        value: Any = self.record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def held_out(self) -> str:
        """The hash of its held-out records; empty if the file does not give it."""
        return str(self._at(("data", "held_out_sha256")) or "")

    @property
    def lowest(self) -> float:
        """The lowest held-out loss after the first step."""
        return self.number("loss", "lowest", "loss")

    @property
    def last(self) -> float:
        """The held-out loss at the end."""
        return self.curves.held_out[-1][1] if self.curves.held_out else math.nan

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        """What runs of one group have in common: all settings that affect results, except `OWN`."""
        chosen = self.settings.keys() - {*OWN, *WITHOUT_EFFECT}
        return tuple((name, repr(self.settings[name])) for name in sorted(chosen))

    def value(self, metric: Metric | None) -> float:
        """Return a metric's value; for None the lowest held-out loss."""
        return self.lowest if metric is None else self.scores.get(metric, {}).get("value", math.nan)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders, and the evaluations among ``paths`` or inside a run; a file stands for its folder.

    Raises:
        UserError: a folder that is neither or is named twice, or there is no run.
    """
    folders = [path.parent if path.is_file() else path for path in paths]
    known = [folder.resolve() for folder in folders]
    for place, folder in enumerate(folders):
        if known[place] in known[:place]:
            raise UserError(f"{folder}: is named twice")
        if not any((folder / name).is_file() for name in (RECORD, RESULTS)):
            raise UserError(
                f"{paths[place]}: no {RECORD} of a run and no {RESULTS} of an evaluation there; "
                "name run folders"
            )
    given = [folder for folder in folders if (folder / RECORD).is_file()]
    if not given:
        raise UserError(f"{folders[0]}: is an evaluation; name at least one run folder too")
    evaluations = [folder / RESULTS for folder in folders if (folder / RESULTS).is_file()]
    runs = [_read(folder, name) for folder, name in zip(given, _names(given), strict=True)]
    measured = [list(_scores(run, evaluations)) for run in runs]
    only = len({metric.records for of_run in measured for metric, _ in of_run if metric.records}) < 2
    names = _names_of_records([metric for of_run in measured for metric, _ in of_run])
    for run, of_run in zip(runs, measured, strict=True):
        for metric, score in of_run:
            source = "" if only or not metric.records else names[metric.records]
            run.scores[Metric(metric.name, metric.title, metric.records, source)] = score
    return runs


def _names_of_records(metrics: Sequence[Metric]) -> dict[str, str]:
    """Return a name for each set of records by its hash: the file's, with the hash's start if needed."""
    names = {metric.records: Path(metric.source).name for metric in metrics}
    return {
        records: name if list(names.values()).count(name) == 1 else f"{name} {records[:6]}"
        for records, name in names.items()
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths, of equal length, that distinguish the folders."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: Path, name: str) -> Run:
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise UserError(f"{folder / RECORD}: not a run record: it holds no configuration")
    return Run(name, folder, record, dotted(record["config"]), history(folder / ADAPTER))


def _scores(run: Run, evaluations: Sequence[Path]) -> list[tuple[Metric, dict[str, float]]]:
    """Return the scores of the run's adapters; those of the final adapter come last."""
    paths = dict.fromkeys([*sorted(run.folder.glob(f"*/{RESULTS}")), *evaluations])
    found = [one for path in paths for one in _results(run, path)]
    found.sort(key=lambda one: one[0] == ADAPTER)
    return [(metric, score) for _, metric, score in found]


def _results(run: Run, path: Path) -> Iterator[tuple[str, Metric, dict[str, float]]]:
    """Yield the file names of the run's adapters in an evaluation, with their scores."""
    found = read_results(path)
    data, titles = found.get("data", {}), found.get("metrics", {})
    records, source = str(data.get("sha256", "")), str(data.get("source", "records"))
    home = run.folder.resolve()
    for model in found["models"]:
        if not any(place.parent == home for place in places_of(model.get("adapter"), path, home)):
            continue
        file, own = Path(model["adapter"]).name, model.get("name")
        for name, score in found.get("scores", {}).get(own, {}).items():
            if isinstance(score, dict) and isinstance(score.get("value"), int | float):
                kept = {key: float(score[key]) for key in ("value", "low", "high") if key in score}
                yield file, Metric(name, title_of(name, titles), records, source), kept
        for title, by_model in beside_records(found):
            if own in by_model:
                yield file, Metric(title, title), _with_ends(*by_model[own])


def _with_ends(value: float, stderr: float | None) -> dict[str, float]:
    """Return a value with its 95 % interval, if its standard error is known."""
    if not stderr:
        return {"value": value}
    half = NORMAL_95 * stderr
    return {"value": value, "low": value - half, "high": value + half}
