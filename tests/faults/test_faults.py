"""The faults of docs/faults.md: one table, with a row at least for each fault that no other test tries.

Every row runs a real script's ``main`` as the script does, a process, or a public Python call, and asks for
the exit status, ONE line that names file, line, key, value or remedy, no traceback, earlier files byte for
byte as before, and no marker of a pickle bomb.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import base_rows
import config_rows
import conversation_rows
import data_rows
import evaluation_rows
import generation_rows
import hostile_rows
import model_rows
import pytest
import run_rows
import stream_rows
import torch
from bench import ROOT, Bench, Row

TABLE: list[Row] = [
    *data_rows.ROWS,
    *model_rows.ROWS,
    *config_rows.ROWS,
    *run_rows.ROWS,
    *generation_rows.ROWS,
    *base_rows.ROWS,
    *hostile_rows.ROWS,
    *evaluation_rows.ROWS,
    *conversation_rows.ROWS,
    *stream_rows.ROWS,
]
PAGE = ROOT / "docs" / "faults.md"
NUMBERED = re.compile(r"^\| (\d+) \| [^|]+ \| [^|]+ \| ([^|]+) \|$", re.MULTILINE)
"""A fault on the page: its number, and what it is tested by."""


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row,
            id=f"{row.fault}-{row.what.replace(' ', '-')}",
            marks=[pytest.mark.slow] if row.slow else [],
        )
        for row in TABLE
    ],
)
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


def test_every_fault_of_the_page_is_tried_where_the_page_says() -> None:
    found = NUMBERED.findall(PAGE.read_text(encoding="utf-8"))
    faults = {int(number): where for number, where in found}
    assert len(faults) == len(found)
    assert list(faults) == sorted(faults)
    assert {row.fault for row in TABLE} == {number for number, where in faults.items() if where == "table"}
    for where in set(faults.values()) - {"table"}:
        assert (ROOT / "tests" / where.strip("`")).is_file(), where


def test_the_bomb_is_live(bench: Bench) -> None:
    """Without the restricted unpickler it would go off."""
    torch.load(bench.bomb("live.pth"), weights_only=False)
    assert bench.marker.exists()
