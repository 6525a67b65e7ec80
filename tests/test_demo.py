"""The demo data: learnable from the request alone, and nothing shared between its two sides."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from lit_adapter.data.demo import INSTRUCTION, KINDS, generate, write
from lit_adapter.data.records import overlap, read_records
from lit_adapter.errors import UserError


def commands(records: list[dict[str, str]]) -> list[dict[str, object]]:
    return [json.loads(record["output"]) for record in records]


def slot_values(records: list[dict[str, str]]) -> set[str]:
    return {
        str(value).lower()
        for command in commands(records)
        for slot, value in command.items()
        if slot != "action"
    }


def test_no_slot_value_is_shared_whatever_the_seeds() -> None:
    train = slot_values(generate(0)[0]) | slot_values(generate(1, 4000, 1)[0])
    held_out = slot_values(generate(0)[1]) | slot_values(generate(7, 1, 1000)[1])
    assert len(train) > 2000
    assert len(held_out) > 250
    assert not train & held_out


def test_no_held_out_word_is_ever_trained_on_but_small_ones() -> None:
    train, held_out = generate(3)
    words = [set(re.findall(r"[\w:-]+", " ".join(slot_values(side)))) for side in (train, held_out)]
    small = {"the", "your", "my", "our", "is", "was", "not"}
    assert words[0] & words[1] == small
    requests = set(re.findall(r"[\w:-]+", " ".join(record["input"] for record in train).lower()))
    assert requests & (words[1] - small) == set()


def test_counts_kinds_and_variety() -> None:
    train, held_out = generate(0)
    assert len(train) >= 1200
    assert len(held_out) >= 200
    for side in (train, held_out):
        assert len({record["input"] for record in side}) == len(side)
        assert {record["instruction"] for record in side} == {INSTRUCTION}
        per_kind = Counter(command["action"] for command in commands(side))
        assert set(per_kind) == {kind.action for kind in KINDS}
        assert max(per_kind.values()) - min(per_kind.values()) <= 1
    words = Counter(re.findall(r"[A-Za-z-]+", " ".join(slot_values(train))))
    assert len(words) > 1000
    assert all(8 <= len(kind.orders + kind.statements) <= 15 for kind in KINDS)


def test_every_value_can_be_copied_from_the_request() -> None:
    for side in generate(0):
        for record, command in zip(side, commands(side), strict=True):
            slots = {slot: value for slot, value in command.items() if slot != "action"}
            assert len(slots) == 2
            for value in slots.values():
                assert re.search(rf"(?<![\w:-]){re.escape(str(value))}(?![\w:-])", record["input"]), record
            assert "{" not in record["input"]
            assert record["output"] == json.dumps(command, separators=(",", ":"))
            assert len(record["input"]) < 100
            assert len(record["output"]) < 110


def test_files_hold_the_records_byte_for_byte(tmp_path: Path) -> None:
    first, again = write(tmp_path / "a", 5, 60, 20), write(tmp_path / "b", 5, 60, 20)
    other = write(tmp_path / "c", 6, 60, 20)
    assert [p.name for p in first] == ["train.json", "val.json"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    assert first[0].read_bytes() != other[0].read_bytes()
    train, val = (read_records(path) for path in first)
    assert (len(train), len(val), overlap(train, val), train.n_duplicate) == (60, 20, 0, 0)
    assert [row.output for row in val] == [record["output"] for record in generate(5, 60, 20)[1]]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["train.json", "val.json"]


def test_the_data_of_a_seed_never_changes() -> None:
    train, held_out = generate(0)
    assert train[0]["input"] == "Hello. Somebody has to tell Jenny that the useful bonnet was upstairs."
    assert held_out[0]["output"] == '{"action":"play_music","title":"Quiet Country","artist":"Daphne Grant"}'


@pytest.mark.parametrize(("n_train", "n_val"), [(0, 5), (5, -1)])
def test_counts_below_one_are_refused(n_train: int, n_val: int) -> None:
    with pytest.raises(UserError, match="expected at least 1"):
        generate(0, n_train, n_val)
