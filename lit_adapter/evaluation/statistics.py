"""How certain a mean over records is, and whether two models differ by more than chance.

Intervals are bootstrap percentiles over records. Two models that answered the same records are compared by a
randomisation test: if they were equally good, exchanging their scores on any record would change nothing, so
the observed difference is compared with those after random exchanges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
EXCHANGES = 10_000
LEVEL = 0.95
SIGNIFICANT = 0.05
TOGETHER = 2**22
"""Numbers drawn at a time."""
FEWEST = 6
"""Fewest records with which p can be below `SIGNIFICANT`: if all differ in one direction, p is 2 / 2**6."""
POWER = 2.8
"""Standard errors that a true difference must have to be found at 5 % in four of five cases: 1.96 + 0.84."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float
    records: int


@dataclass(frozen=True)
class Comparison:
    """A model against another on the same records; positive: its value is higher."""

    difference: float
    low: float
    high: float
    p_value: float
    detectable: float | None
    """The smallest true difference that this many records would show in four of five cases; None if they are
    too few to show any."""

    @property
    def is_noise(self) -> bool:
        """Whether the difference may be due to chance alone."""
        return self.p_value > SIGNIFICANT


def estimate(values: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> Estimate:
    """Return the mean of ``values [records]``, or with weights ``sum(values) / sum(weights)``.

    The latter is a loss: nats and targets of every record.
    """
    weights = np.ones(len(values)) if weights is None else weights
    value = float(values.sum() / weights.sum())
    if (values == values[0]).all() and value in (0.0, 1.0):  # every resample is the same
        return Estimate(value, *_wilson(value, len(values)), len(values))
    low, high = _interval(lambda chosen: values[chosen].sum(-1) / weights[chosen].sum(-1), len(values))
    return Estimate(value, low, high, len(values))


def _wilson(share: float, n_records: int) -> tuple[float, float]:
    """Return Wilson's interval of a share that is 0 or 1."""
    beyond = 1.96**2 / (n_records + 1.96**2)
    return (0.0, beyond) if share == 0 else (1 - beyond, 1.0)


def estimate_of(statistic: Callable[[NDArray[np.int64]], float], n_records: int) -> Estimate:
    """Return a statistic of a whole set, a function of the chosen records' indices, with its interval."""

    def each(chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.array([statistic(rows) for rows in chosen])

    low, high = _interval(each, n_records, resamples=RESAMPLES // 2)
    return Estimate(statistic(np.arange(n_records)), low, high, n_records)


def compare(
    values: NDArray[np.float64], other: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> Comparison:
    """Compare two models' values on the same records; ``weights`` as in `estimate`, the same for both."""
    weights = np.ones(len(values)) if weights is None else weights
    apart = values - other
    sign = -1.0 if apart.sum() < 0 else 1.0
    size = estimate(sign * apart, weights)
    # If all scores are equal, either model may be the better one.
    low, high = sorted((sign * size.low, sign * size.high)) if apart.any() else (-size.high, size.high)
    spread = float(np.sqrt(len(apart)) * apart.std(ddof=1) / weights.sum()) if len(apart) > 1 else 0.0
    least = FEWEST / float(weights.sum())  # if all are alike so far
    detectable = max(POWER * spread, least) if len(apart) >= FEWEST else None
    return Comparison(sign * size.value, low, high, _p_value(apart), detectable)


def _interval(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], n_records: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    generator = np.random.default_rng(0)
    at_once = max(1, TOGETHER // max(n_records, 1))
    parts = [
        statistic(generator.integers(n_records, size=(min(at_once, resamples - start), n_records)))
        for start in range(0, resamples, at_once)
    ]
    low, high = np.quantile(np.concatenate(parts), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _p_value(apart: NDArray[np.float64]) -> float:
    """Return the share of exchanges whose difference is at least the observed one, which counts as one."""
    apart = apart[apart != 0]  # an exchange of equal scores changes nothing
    if len(apart) == 0:
        return 1.0
    observed = abs(apart.sum()) - 1e-9 * np.abs(apart).sum()
    if 2 ** len(apart) <= EXCHANGES:
        signs = 1 - 2 * ((np.arange(2 ** len(apart))[:, None] >> np.arange(len(apart))) & 1)
        return float((np.abs(signs @ apart) >= observed).mean())
    generator = np.random.default_rng(0)
    at_once, reached = max(1, TOGETHER // len(apart)), 0
    for start in range(0, EXCHANGES, at_once):
        signs = 1 - 2 * generator.integers(2, size=(min(at_once, EXCHANGES - start), len(apart)))
        reached += int((np.abs(signs @ apart) >= observed).sum())
    return (reached + 1) / (EXCHANGES + 1)
