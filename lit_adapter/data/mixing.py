"""The order of the records: an epoch's is a function of (seed, epoch), with and without weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class EpochOrder:
    """The records of every epoch.

    Without weights an epoch is a permutation of all records. With weights it has as many places, and every
    source gets its share of them. A source fills its places with its own records; each is used once before
    any is used again, across the ends of epochs. Records at the end of an epoch that fill no step
    (`TrainingSteps`) count as taken: they are skipped in this round.

    With weights ``sizes`` holds the number of records of each source, and ``counts`` that of an epoch's
    places that are its ``[sources]``.

    Args:
        n_records: of all sources.
        seed: of the permutations.
        source: the source of each record ``[records]``; with ``weights``.
        weights: share of each source; None for no weights.
    """

    def __init__(
        self,
        n_records: int,
        seed: int,
        source: NDArray[np.int64] | None = None,
        weights: list[float] | None = None,
    ) -> None:
        self.n_records, self.seed = n_records, seed
        self._members: list[NDArray[np.int64]] = []
        if weights is not None and source is not None:
            self._members = [np.flatnonzero(source == number) for number in range(len(weights))]
            self.sizes = np.array([*map(len, self._members)])
            self.counts = shares(np.where(self.sizes, weights, 0), n_records)

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the records of an epoch, in order ``[records]``."""
        permutation = np.random.default_rng((self.seed, number)).permutation(self.n_records)
        if not self._members:
            return permutation
        chosen = [self._of_source(source, number) for source in range(len(self._members))]
        return np.concatenate(chosen)[permutation]

    def _of_source(self, source: int, epoch: int) -> NDArray[np.int64]:
        """Return the records that a source has in an epoch: a part of its permutations, end to end."""
        members, count = self._members[source], int(self.counts[source])
        if not count:
            return members[:0]
        start = epoch * count
        passes = range(start // len(members), (start + count - 1) // len(members) + 1)
        orders = [np.random.default_rng((self.seed, source, one)).permutation(len(members)) for one in passes]
        first = start - passes[0] * len(members)
        return members[np.concatenate(orders)[first : first + count]]


def shares(weights: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Divide ``total`` by weights into whole numbers; the rest goes to the largest remainders."""
    parts = np.asarray(weights, np.float64) / np.max(weights)  # whose sum cannot overflow
    exact = parts / parts.sum() * total
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts
