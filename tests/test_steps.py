from __future__ import annotations

import numpy as np
import pytest
import torch
from random_records import HEADS, encoded

from lit_adapter.data.mixing import EpochOrder
from lit_adapter.data.packing import (
    SHORTEST_PREAMBLE,
    Packer,
    TrainingSteps,
    ValidationSteps,
    shared_preambles,
)
from lit_adapter.errors import UserError
from lit_adapter.model.attention import PackedRow


def visible(row: PackedRow) -> list[tuple[int, ...]]:
    """The tokens that each position sees, in order, by the rule in words."""
    seen = []
    for q in range(len(row.ids)):
        keys = [k for k in range(q + 1) if row.segment[k] in (row.segment[q], row.preamble[q])]
        assert row.position[keys].tolist() == list(range(len(keys)))
        seen.append(tuple(row.ids[keys].tolist()))
    return seen


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_every_target_is_predicted_from_exactly_its_own_past(mask_prompt: bool) -> None:
    data = encoded(6, 10, cut=True)
    packer = Packer(data, shared_preambles(data), mask_prompt=mask_prompt, row_tokens=500)
    row = packer.row(list(range(10)))
    seen = visible(row)
    found = sorted(
        (*seen[place], target)
        for place, target in zip(row.target_index.tolist(), row.target_id.tolist(), strict=True)
    )
    wanted = []
    for index in range(10):
        ids = tuple(data.record(index).tolist())
        first = int(data.n_prompt[index]) if mask_prompt else 1
        wanted += [ids[: n + 1] for n in range(first, len(ids))]
    assert found == sorted(wanted)
    assert row.target_index.tolist() == sorted(row.target_index.tolist())


def test_shared_preambles_are_the_longest_common_starts() -> None:
    heads = shared_preambles(encoded(3, 40))
    assert {variant: head.tolist() for variant, head in heads.items()} == {
        0: HEADS[0].tolist(),
        1: HEADS[1].tolist(),
    }


@pytest.mark.parametrize("share", [True, False], ids=["shared-heads", "whole-records"])
def test_every_token_of_a_row_is_read_by_a_target(share: bool) -> None:
    """A record's last token is predicted and never read, so it is left out of the row."""
    data = encoded(6, 40, cut=True)
    packer = Packer(data, shared_preambles(data) if share else {}, mask_prompt=True, row_tokens=2000)
    row = packer.row(list(range(40)))
    heads = sum(map(len, packer.preambles.values()))
    assert len(row.ids) == packer.row_length(list(range(40)))
    assert len(row.ids) == heads + int((data.length - 1 - packer.n_preamble).sum())
    place = row.target_index[:, None]
    reads = (row.segment == row.segment[place]) | (row.segment == row.preamble[place])
    assert (reads & (torch.arange(len(row.ids)) <= place)).any(dim=0).all()


def test_a_record_of_its_shared_head_and_one_token_adds_nothing_to_a_row() -> None:
    data = encoded(0, 30, longest=2)
    packer = Packer(data, shared_preambles(data), mask_prompt=True, row_tokens=500)
    bare = np.flatnonzero(packer.n_own == 0).tolist()
    assert len({int(data.variant[record]) for record in bare}) == 2
    row = packer.row(bare)
    assert row.ids.tolist() == [*HEADS[0], *HEADS[1]]
    assert sorted(row.target_id.tolist()) == sorted(int(data.record(record)[-1]) for record in bare)
    assert set(row.target_index.tolist()) == {len(HEADS[0]) - 1, len(row.ids) - 1}
    row = packer.row(list(range(30)))
    assert row.segment.unique().tolist() == list(range(int(row.segment.max()) + 1))


def test_short_common_starts_are_not_shared() -> None:
    data = encoded(2, 8)
    short = SHORTEST_PREAMBLE - 1
    for index in range(8):  # the records of a variant differ right after the third token
        data.record(index)[short] = index
    assert shared_preambles(data) == {}


@pytest.mark.parametrize("n_processes", [1, 2, 3, 5])
def test_assign_covers_each_record_once_and_keeps_to_the_limit(n_processes: int) -> None:
    for seed in range(30):
        data = encoded(seed, 1 + seed, cut=True, longest=3 + seed)
        limit = int(data.length.max()) + seed
        packer = Packer(data, shared_preambles(data), mask_prompt=True, row_tokens=limit)
        rows = packer.assign(np.arange(len(data)), n_processes)
        assert sorted(r for row in rows for r in row) == list(range(len(data)))
        assert len(rows) % n_processes == 0
        for row in filter(None, rows):
            assert len(packer.row(row).ids) == packer.row_length(row) <= limit


def test_rows_shorter_than_a_record_are_refused() -> None:
    data = encoded(1)
    longest = int(data.length.max()) - 1
    Packer(data, {}, mask_prompt=True, row_tokens=longest)
    with pytest.raises(
        UserError, match=rf"row_tokens is {longest - 1}, but the longest record takes {longest} tokens"
    ):
        Packer(data, {}, mask_prompt=True, row_tokens=longest - 1)


def steps_of(seed: int = 0, batch_size: int = 4, **kwargs: int) -> TrainingSteps:
    packer = Packer(encoded(8, 19), {}, mask_prompt=True, row_tokens=200)
    order = EpochOrder(len(packer.encoded), seed)
    return TrainingSteps(packer, batch_size=batch_size, order=order, **kwargs)


def test_an_epoch_is_a_permutation_and_each_epoch_another() -> None:
    steps = steps_of()
    assert steps.steps_per_epoch == 4
    epochs = [np.concatenate([steps.records(4 * epoch + s) for s in range(4)]) for epoch in range(3)]
    for order in epochs:
        assert len(set(order.tolist())) == 16
        assert set(order.tolist()) <= set(range(19))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


def test_order_is_decided_by_seed_and_step_alone() -> None:
    one, same, other = steps_of(seed=5), steps_of(seed=5, rank=1, n_processes=2), steps_of(seed=6)
    for step in (7, 0, 3):  # asked in any order
        assert np.array_equal(one.records(step), same.records(step))
    assert any(not np.array_equal(one.records(step), other.records(step)) for step in range(4))


def test_processes_share_a_step_without_overlap() -> None:
    whole = steps_of()[2]
    parts = [steps_of(rank=rank, n_processes=2)[2] for rank in range(2)]
    assert sorted(r for p in parts for row in p.records for r in row) == sorted(whole.records[0])
    assert {p.n_targets for p in parts} == {whole.n_targets}
    assert {p.step for p in parts} == {2}


def test_fewer_records_than_a_batch_are_refused() -> None:
    with pytest.raises(UserError, match=r"batch_size is 20, but there are only 19 training records"):
        steps_of(batch_size=20)


def test_validation_takes_every_record_once_in_order() -> None:
    packer = Packer(encoded(8, 19), {}, mask_prompt=True, row_tokens=200)
    steps = ValidationSteps(packer, batch_size=8)
    assert len(steps) == 3
    batches = list(steps)
    assert [sorted(r for row in b.records for r in row) for b in batches] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 19)),
    ]
    assert sum(batch.n_targets for batch in batches) == packer.n_targets(np.arange(19))
