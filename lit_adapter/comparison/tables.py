"""The tables of a comparison, as plain cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lit_adapter.comparison.groups import Group, differing, in_a_cell
from lit_adapter.comparison.runs import Run
from lit_adapter.errors import UserError, nearest
from lit_adapter.evaluation.tables import Table, is_share, shown, title_of, with_interval

HELD_OUT = "held-out"
UNKNOWN = "-"
ENDS = {"finished": "", "diverged": " (diverged)", "stopped": " (stopped)", "failed": " (failed)"}


def metrics_of(runs: Sequence[Run]) -> dict[str, str]:
    """Return the metrics that any run was evaluated by, with their titles."""
    return {metric: title for run in runs for metric, title in run.titles.items()}


def ordered(runs: Sequence[Run], by: str) -> list[Run]:
    """Return runs from the best to the worst by a metric, or by their lowest held-out loss.

    Raises:
        UserError: no run was evaluated by that metric.
    """
    known = metrics_of(runs)
    if by != HELD_OUT and by not in known:
        hint = nearest(by, [HELD_OUT, *known]) or f"; expected {', '.join([HELD_OUT, *known])}"
        raise UserError(f"--by {by}: no run was evaluated by it{hint}")

    def key(run: Run) -> tuple[bool, float]:
        value = run.lowest if by == HELD_OUT else run.scores.get(by, {}).get("value", math.nan)
        return math.isnan(value), -value if is_share(by) else value

    return sorted(runs, key=key)


def settings_table(runs: Sequence[Run]) -> Table | None:
    """Return what differs in the configurations; None if nothing does."""
    names = differing(runs)
    rows = [[run.name, *(in_a_cell(run.settings.get(name)) for name in names)] for run in runs]
    return Table("Settings that differ", ["run", *names], rows) if names else None


def results_table(runs: Sequence[Run]) -> Table:
    """Return losses and scores."""
    metrics = metrics_of(runs)
    header = ["run", "steps", "train loss", "held-out: lowest", "at the end"]
    header += [title_of(metric, metrics) for metric in metrics]
    rows = []
    for run in runs:
        status = str(run.record.get("status"))
        cells = [run.name + ENDS.get(status, f" ({status})"), _count(run.number("steps", "done"))]
        cells += [_loss(run.number("loss", "train")), _loss(run.lowest), _loss(run.last)]
        cells += [
            with_interval(metric, {"low": math.nan, "high": math.nan, **run.scores[metric]})
            if metric in run.scores
            else UNKNOWN
            for metric in metrics
        ]
        rows.append(cells)
    intervals = "; in brackets: 95 % intervals" if metrics else ""
    return Table(f"Results (best first{intervals})", header, rows)


def cost_table(runs: Sequence[Run]) -> Table:
    """Return time, tokens and memory."""
    header = ["run", "parameters", "time", "tokens", "tokens/s", "peak memory", "device"]
    rows = [
        [
            run.name,
            _count(run.number("adapter", "parameters")),
            duration(run.number("time", "seconds")),
            _count(run.number("time", "tokens")),
            _count(run.number("time", "tokens_per_s")),
            _memory(run.number("memory", "peak_bytes")),
            _device(run),
        ]
        for run in runs
    ]
    return Table("Cost", header, rows)


def _device(run: Run) -> str:
    device = run.record.get("device")
    if not isinstance(device, dict):
        return UNKNOWN
    processes = device.get("processes", 1)
    many = f"{processes} x " if processes != 1 else ""
    return f"{many}{device.get('name', UNKNOWN)}, {device.get('precision', UNKNOWN)}"


def groups_table(groups: Sequence[Group]) -> Table:
    """Return mean and standard deviation over the seeds of each setting."""
    runs = [run for group in groups for run in group.runs]
    metrics = metrics_of(runs)
    header = ["setting", "runs", "held-out: lowest", "at the end"]
    header += [title_of(metric, metrics) for metric in metrics] + ["time"]
    rows = []
    for group in groups:
        cells = [group.name, str(len(group.runs))]
        for measure in (lambda run: run.lowest, lambda run: run.last):
            mean, deviation = group.spread(measure)
            cells.append(_with_spread(_loss(mean), _loss(deviation)))
        for metric in metrics:

            def value(run: Run, metric: str = metric) -> float:
                return run.scores.get(metric, {}).get("value", math.nan)

            mean, deviation = group.spread(value)
            cells.append(_with_spread(*(_shown(metric, number) for number in (mean, deviation))))
        cells.append(duration(group.spread(lambda run: run.number("time", "seconds"))[0]))
        rows.append(cells)
    return Table("Groups over seeds (mean \u00b1 standard deviation)", header, rows)


def _shown(metric: str, value: float) -> str:
    return UNKNOWN if math.isnan(value) else shown(metric, value)


def _with_spread(mean: str, deviation: str) -> str:
    return mean if deviation == UNKNOWN else f"{mean} \u00b1 {deviation}"


def _loss(value: float) -> str:
    return UNKNOWN if math.isnan(value) else f"{value:.4f}"


def _count(value: float) -> str:
    return UNKNOWN if math.isnan(value) else f"{value:,.0f}"


def _memory(value: float) -> str:
    return UNKNOWN if math.isnan(value) else f"{value / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Return a time as people read it."""
    if math.isnan(seconds):
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
