"""Classification: accuracy by label, macro F1 and the confusion matrix of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_adapter.evaluation.metrics import label_of

OTHER = "(other)"
"""The column of answers that are not a label."""


@dataclass(frozen=True)
class Confusion:
    """How often each reference (row) was answered by each label (column)."""

    labels: tuple[str, ...]
    """The labels of the references, in the order of their frequency."""
    counts: NDArray[np.int64]
    """``[labels, labels + 1]``; the last column counts answers that are not a label."""


def coded(answers: Sequence[str], references: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the labels, the most frequent first, and each record's reference and answer ``[records, 2]``.

    An answer that is not a label gets the number after the last label's.
    """
    wanted = list(map(label_of, references))
    names = sorted(set(wanted), key=lambda name: (-wanted.count(name), name))
    number = {name: place for place, name in enumerate(names)}
    given = [number.get(label_of(answer), len(names)) for answer in answers]
    shown = [next(r.strip() for r, w in zip(references, wanted, strict=True) if w == name) for name in names]
    return shown, np.array([[number[name] for name in wanted], given], np.int64).T


def confusion(answers: Sequence[str], references: Sequence[str]) -> Confusion:
    """Count answers by reference."""
    names, codes = coded(answers, references)
    counts = np.zeros((len(names), len(names) + 1), np.int64)
    np.add.at(counts, (codes[:, 0], codes[:, 1]), 1)
    return Confusion(tuple(names), counts)


def macro_f1(codes: NDArray[np.int64]) -> float:
    """Return the mean of the F1 of all labels that occur among the references.

    F1 of a label is ``2 tp / (2 tp + fp + fn)``.
    """
    wanted, given = codes.T
    size = int(codes.max()) + 1
    right = np.bincount(wanted[wanted == given], minlength=size)
    total = np.bincount(wanted, minlength=size) + np.bincount(given, minlength=size)
    present = np.bincount(wanted, minlength=size) > 0
    return float((2 * right[present] / total[present]).mean())
