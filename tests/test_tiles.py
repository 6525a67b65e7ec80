"""The plan of the CUDA kernels: what a query sees and which tiles are visited, against the rule in words."""

from __future__ import annotations

import itertools

import pytest
import torch
from random_records import encoded

from lit_adapter.data.packing import Packer, shared_preambles
from lit_adapter.model import tiles
from lit_adapter.model.attention import PackedRow
from lit_adapter.model.tiles import TilePlan, plan_tiles


def row_of(seed: int, n_records: int, longest: int, *, mask_prompt: bool = True) -> PackedRow:
    data = encoded(seed, n_records, cut=bool(seed % 2), longest=longest)
    packer = Packer(data, shared_preambles(data), mask_prompt=mask_prompt, row_tokens=100_000)
    return packer.row(list(range(n_records)))


def visible(row: PackedRow, q: int, window: int | None = None) -> set[int]:
    """The positions that position ``q`` sees, in a window that counts positions of the text."""
    segment = row.segment.numpy()[: q + 1]
    near = row.position.numpy()[: q + 1] > int(row.position[q]) - (window or 10**6)
    own = (segment == segment[q]) | (segment == int(row.preamble[q]))
    return set((own & near).nonzero()[0].tolist())


def planned(plan: TilePlan, n: int) -> set[int]:
    own = range(int(plan.first[n]), int(plan.place[n]) + 1)
    return {*own, *range(int(plan.preamble_start[n]), int(plan.preamble_end[n]))}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 9, 30])
def test_a_query_sees_what_the_rule_lets_it_see(seed: int, targets: bool, window: int | None) -> None:
    row = row_of(seed, 9, 40, mask_prompt=seed != 2)
    places = row.target_index if targets else torch.arange(len(row.ids))
    plan = plan_tiles(row, row.target_index if targets else None, torch.device("cpu"), window)
    assert plan.place.tolist() == places.tolist()
    for n, place in enumerate(places.tolist()):
        assert planned(plan, n) == visible(row, place, window)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize("window", [None, 12])
def test_exactly_the_tiles_that_hold_something_are_visited(
    seed: int, targets: bool, window: int | None
) -> None:
    row = row_of(seed, 14, 90)
    plan = plan_tiles(row, row.target_index if targets else None, torch.device("cpu"), window)
    by_query = {
        (m, int(key))
        for m, (start, end) in enumerate(itertools.pairwise(plan.key_from.tolist()))
        for key in plan.key_tile[start:end]
    }
    assert by_query == met(row, plan, tiles.QUERY_TILE, tiles.KEY_TILE, window)
    parts = list(itertools.pairwise(plan.part_from.tolist()))
    by_key = [
        (int(query), int(key))
        for key, (start, end) in zip(plan.part_tile, parts, strict=True)
        for query in plan.query_tile[start:end]
    ]
    assert set(by_key) == met(row, plan, tiles.VISITING_TILE, tiles.OWNED_KEYS, window)
    assert len(by_key) == len(set(by_key))


def met(row: PackedRow, plan: TilePlan, size: int, key_size: int, window: int | None) -> set[tuple[int, int]]:
    """Which tiles of ``size`` queries see something in which tiles of ``key_size`` keys."""
    return {
        (n // size, k // key_size)
        for n, place in enumerate(plan.place.tolist())
        for k in visible(row, place, window)
    }


def test_a_head_that_many_records_continue_is_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "VISITS", 2)
    plan = plan_tiles(row_of(0, 60, 60), None, torch.device("cpu"))
    count = torch.bincount(plan.part_tile.long())
    assert count.max() > 2
    assert plan.sum_tile.tolist() == (count > 1).nonzero().flatten().tolist()
    slots = [int(slot) for slot in plan.part_slot if slot >= 0]
    assert slots == list(range(int(plan.sum_from[-1]))) == list(range(plan.n_slots))
    for tile, (start, end) in zip(plan.sum_tile, itertools.pairwise(plan.sum_from.tolist()), strict=True):
        assert plan.part_slot[plan.part_tile == tile].tolist() == list(range(start, end))


def test_a_row_without_targets_has_an_empty_plan() -> None:
    row = row_of(0, 3, 5)
    row.target_index = row.target_index[:0]
    plan = plan_tiles(row, row.target_index, torch.device("cpu"))
    assert plan.n_queries == 0
    assert plan.part_from.tolist() == [0] * (plan.n_parts + 1)
