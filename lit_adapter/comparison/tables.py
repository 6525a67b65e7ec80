"""The tables of a comparison, as plain cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from lit_adapter.comparison.groups import Group, differing, in_a_cell
from lit_adapter.comparison.runs import Metric, Run
from lit_adapter.errors import UserError, nearest
from lit_adapter.evaluation.tables import Table, shown, with_interval

HELD_OUT = "held-out"
UNKNOWN = "-"
LOSSES = ("held-out: lowest", "at the end")
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "bits per byte")
"""The ends of the names of such metrics."""
ENDS = {"finished": "", "diverged": " (diverged)", "stopped": " (stopped)", "failed": " (failed)"}


def metrics_of(runs: Sequence[Run]) -> list[Metric]:
    """Return the metrics by which any run was evaluated."""
    return list(dict.fromkeys(metric for run in runs for metric in run.scores))


def metric_named(runs: Sequence[Run], name: str) -> Metric | None:
    """Return the metric by which runs are sorted; None for their lowest held-out loss.

    Raises:
        UserError: no run was evaluated by it, or runs were evaluated on several sets of records.
    """
    if name == HELD_OUT:
        return None
    known = {metric.name + metric.on: metric for metric in metrics_of(runs)}
    if name in known:
        return known[name]
    several = [other for other, metric in known.items() if metric.name == name]
    if several:
        raise UserError(f"--by {name}: runs were evaluated on several sets; expected {' or '.join(several)}")
    hint = nearest(name, [HELD_OUT, *known]) or f"; expected {', '.join([HELD_OUT, *known])}"
    raise UserError(f"--by {name}: no run was evaluated by it{hint}")


def held_out_sets(runs: Sequence[Run]) -> dict[str, int]:
    """Return a number for each set of held-out records; empty if all runs had the same."""
    found = dict.fromkeys(run.held_out for run in runs if not math.isnan(run.lowest))
    return {records: number for number, records in enumerate(found, 1)} if len(found) > 1 else {}


def ordered(runs: Sequence[Run], by: Metric | None) -> list[Run]:
    """Return runs from the best to the worst; held-out losses are compared on the same records only."""
    sets = held_out_sets(runs) if by is None else {}

    def key(run: Run) -> tuple[int, bool, float]:
        return sets.get(run.held_out, len(sets) + 1), *rank(by, run.value(by))

    return sorted(runs, key=key)


def rank(by: Metric | None, value: float) -> tuple[bool, float]:
    """Return a sort key that puts values from the best to the worst, unknown ones last."""
    lower = by is None or by.name.endswith(LOWER_IS_BETTER)
    return math.isnan(value), value if lower else -value


def settings_table(runs: Sequence[Run]) -> Table | None:
    """Return the settings that differ; None if there are none."""
    names = differing(runs)
    rows = [[run.name, *(in_a_cell(run.settings.get(name)) for name in names)] for run in runs]
    return Table("Settings that differ", ["run", *names], rows) if names else None


def results_table(runs: Sequence[Run]) -> Table:
    """Return losses and scores."""
    metrics, sets = metrics_of(runs), held_out_sets(runs)
    header = ["run", "steps", "train loss", *(["held-out set"] if sets else []), *LOSSES]
    header += [metric.title + metric.on for metric in metrics]
    rows = []
    for run in runs:
        status = str(run.record.get("status"))
        cells = [run.name + ENDS.get(status, f" ({status})"), _count(run.number("steps", "done"))]
        cells += [
            _loss(run.number("loss", "train")),
            *([str(sets.get(run.held_out, UNKNOWN))] if sets else []),
        ]
        cells += [_loss(run.lowest), _loss(run.last), *(_score(run, metric) for metric in metrics)]
        rows.append(cells)
    intervals = "; in brackets: 95 % intervals" if metrics else ""
    return Table(f"Results (best first{intervals})", header, rows)


def _score(run: Run, metric: Metric) -> str:
    score = run.scores.get(metric)
    if score is None:
        return UNKNOWN
    return with_interval(metric.name, score) if "low" in score else shown(metric.name, score["value"])


def notes(runs: Sequence[Run]) -> list[str]:
    """Return notes that readers of the results need."""
    n_sets = len(held_out_sets(runs))
    several = (
        f"the runs have {n_sets} different sets of held-out records: compare losses within one set only "
        "(--data.val gives all runs the same; without it the seed chooses the records)"
    )
    return [several] if n_sets else []


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


def groups_table(groups: Sequence[Group], by: Metric | None) -> Table:
    """Return mean and standard deviation over the seeds of each setting, the best mean first."""
    groups = sorted(groups, key=lambda group: rank(by, group.spread(lambda run: run.value(by))[0]))
    runs = [run for group in groups for run in group.runs]
    metrics, sets = metrics_of(runs), held_out_sets(runs)
    header = ["setting", "runs", *(["held-out sets"] if sets else []), *LOSSES]
    header += [metric.title + metric.on for metric in metrics] + ["time"]
    rows = []
    for group in groups:
        cells = [group.name, str(len(group.runs))]
        if sets:
            numbers = sorted({sets[run.held_out] for run in group.runs if run.held_out in sets})
            cells.append(", ".join(map(str, numbers)))
        for measure in (lambda run: run.lowest, lambda run: run.last):
            mean, deviation = group.spread(measure)
            cells.append(_with_spread(_loss(mean), _loss(deviation)))
        for metric in metrics:
            mean_and_deviation = group.spread(partial(Run.value, metric=metric))
            cells.append(_with_spread(*(_shown(metric, number) for number in mean_and_deviation)))
        cells.append(duration(group.spread(lambda run: run.number("time", "seconds"))[0]))
        rows.append(cells)
    return Table("Groups over seeds (mean \u00b1 standard deviation)", header, rows)


def _shown(metric: Metric, value: float) -> str:
    return UNKNOWN if math.isnan(value) else shown(metric.name, value)


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
