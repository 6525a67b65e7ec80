"""TensorBoard's curves over several starts of one run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_adapter.training.curves import Curves


def test_starts_within_a_second_are_read_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process number with one digit more sorts before: 10000 before 9999."""
    for pid, first in ((9999, 1), (10000, 3), (10001, 6)):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        curves = Curves(tmp_path, None if first == 1 else first, say=print)
        for step in range(first, first + 4):
            curves.log_metrics({"train/loss": float(pid)}, step)
        curves.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    drawn = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert drawn == [
        *((s, 9999.0) for s in (1, 2)),
        *((s, 10000.0) for s in (3, 4, 5)),
        *((s, 10001.0) for s in range(6, 10)),
    ]
