"""The ninety-three faults: one table, one row at least for each fault that concerns what exists.

Every row runs a real script's ``main`` as the script does, a process, or a public Python call, and asks for
the exit status, ONE line that names file, line, key, value or remedy, no traceback, earlier files byte for
byte as before, and no marker of a pickle bomb.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import config_rows
import data_rows
import generation_rows
import model_rows
import pytest
import run_rows
import torch
from bench import Bench, Row

TABLE: list[Row] = [
    *data_rows.ROWS,
    *model_rows.ROWS,
    *config_rows.ROWS,
    *run_rows.ROWS,
    *generation_rows.ROWS,
]
ELSEWHERE = {
    63: "signals: test_signals",
    64: "a second signal: test_signals",
    65: "SIGINT: test_signals",
    66: "random kills: test_kills",
    67: "kills inside a save: test_files",
    68: "a process that dies: test_signals",
    76: "where a save falls: test_resume",
}
"""Faults that need kills, signals or several processes, and the tests that try them."""
NO_SERVING = range(90, 94)
"""Of a server, which does not exist."""


@pytest.mark.parametrize("row", TABLE, ids=[f"{row.fault}-{row.what.replace(' ', '-')}" for row in TABLE])
def test_fault(row: Row, bench: Bench, record_property: Callable[[str, object], None]) -> None:
    record_property("fault", row.fault)
    outcome = row.tried(bench)
    before, after = bench.before, bench.snapshot()
    assert outcome.status == row.status, outcome
    assert "Traceback" not in outcome.err
    assert not bench.marker.exists()
    if row.status == 2:
        lines = outcome.err.splitlines()
        assert len(lines) == 1, outcome.err
        assert lines[0].startswith("error: ")
        assert re.search(row.message, lines[0]), lines[0]
    else:
        assert re.search(row.message, outcome.out), outcome.out
    assert {path: after.get(path) for path in before} == before
    if not row.writes:
        assert after.keys() == before.keys()
    assert not [path for path in after if path.name.endswith(".tmp")]


def test_every_fault_has_its_row() -> None:
    tried = {row.fault for row in TABLE}
    assert not tried & set(ELSEWHERE)
    assert tried | set(ELSEWHERE) | set(NO_SERVING) == set(range(1, 94))


def test_the_bomb_is_live(bench: Bench) -> None:
    """Without the restricted unpickler it would go off."""
    torch.load(bench.bomb("live.pth"), weights_only=False)
    assert bench.marker.exists()
