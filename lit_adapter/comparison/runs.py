"""What a run folder tells: configuration, losses, cost, and the results of evaluations of its adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError
from lit_adapter.evaluation.history import History, history
from lit_adapter.files.read import read_json

RECORD, RESULTS = "run.json", "results.json"
OWN = ("out", "seed")
"""Settings in which the runs of a group differ."""
WITHOUT_EFFECT = (
    "data.workers",
    *(f"trainer.{name}" for name in ("log_every", "save_every", "keep_checkpoints", "progress", "logger")),
    *(f"trainer.{name}" for name in ("samples", "sample_tokens")),
)
"""Settings that change no result."""


@dataclass(frozen=True)
class Run:
    """One run; numbers that its files do not tell are NaN."""

    name: str
    folder: Path
    record: dict[str, Any]
    settings: dict[str, Any]
    """The configuration by dotted names."""
    curves: History
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Value and 95 % interval (``low``, ``high``) of every metric, by name."""
    titles: dict[str, str] = field(default_factory=dict)
    """What the metrics are called."""

    def number(self, *path: str) -> float:
        """Return a number of ``run.json``."""
        value: Any = self.record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return float(value) if isinstance(value, int | float) else math.nan

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
        """What runs of one group have in common: all that results depend on, but `OWN`."""
        chosen = self.settings.keys() - {*OWN, *WITHOUT_EFFECT}
        return tuple((name, repr(self.settings[name])) for name in sorted(chosen))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, and the evaluations among ``folders`` or inside a run.

    Raises:
        UserError: a folder that is neither, or named twice, or no run at all.
    """
    known = [folder.resolve() for folder in folders]
    for place, folder in enumerate(folders):
        if known[place] in known[:place]:
            raise UserError(f"{folder}: is named twice")
        if not any((folder / name).is_file() for name in (RECORD, RESULTS)):
            raise UserError(
                f"{folder}: no {RECORD} of a run and no {RESULTS} of an evaluation there; name run folders"
            )
    given = [folder for folder in folders if (folder / RECORD).is_file()]
    if not given:
        raise UserError(f"{folders[0]}: is an evaluation; name at least one run folder too")
    evaluations = [folder / RESULTS for folder in folders if (folder / RESULTS).is_file()]
    names = _names(given)
    return [_read(folder, name, evaluations) for folder, name in zip(given, names, strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths, of one length, that tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: Path, name: str, evaluations: Sequence[Path]) -> Run:
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise UserError(f"{folder / RECORD}: not a run record: it holds no configuration")
    run = Run(name, folder, record, flat(record["config"]), history(folder / "adapter.safetensors"))
    for path in dict.fromkeys([*sorted(folder.glob(f"*/{RESULTS}")), *evaluations]):
        _add_results(run, path)
    return run


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        found |= inner
    return found


def _add_results(run: Run, path: Path) -> None:
    """Take the scores of the model whose adapter lies in the run's folder."""
    found = read_json(path)
    models = found.get("models") if isinstance(found, dict) else None
    if not isinstance(models, list):
        raise UserError(f"{path}: not the results of an evaluation: it holds no list of models")
    for model in models:
        if not isinstance(model, dict) or not _is_of(run, model.get("adapter"), path):
            continue
        scores = found.get("scores", {}).get(model.get("name"), {})
        for metric, score in scores.items():
            if isinstance(score, dict) and isinstance(score.get("value"), int | float):
                run.scores[metric] = {
                    key: float(score[key]) for key in ("value", "low", "high") if key in score
                }
                run.titles[metric] = str(found.get("metrics", {}).get(metric, metric))


def _is_of(run: Run, adapter: object, results: Path) -> bool:
    """Whether an evaluation names an adapter of the run; its path may be relative to several places."""
    if not isinstance(adapter, str):
        return False
    home, given = run.folder.resolve(), Path(adapter).expanduser()
    with suppress(OSError, ValueError):
        places = (given, results.parent / given, *(parent / given for parent in home.parents))
        return any(place.resolve().parent == home for place in places)
    return False
