"""Records kept on disk are those that were read, and are read again only if a file has changed."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from lit_adapter.config import Columns
from lit_adapter.data import store
from lit_adapter.data.records import Records, read_records, split
from lit_adapter.data.store import Source, stored_records
from lit_adapter.errors import UserError

ROWS = [
    {"instruction": "one", "input": "\U0001f468 \n", "output": "a"},
    {"instruction": "two", "output": " "},
    {"instruction": "three", "output": "\0 </s> {input}"},
    {"instruction": "one", "input": "\U0001f468 \n", "output": "a"},
]


@pytest.fixture
def files(tmp_path: Path) -> list[Source]:
    """Two files of different formats."""
    paths = [tmp_path / "a.jsonl", tmp_path / "b.json"]
    paths[0].write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    paths[1].write_text(json.dumps(ROWS[::-1], indent=1))
    return [Source(path, path.name) for path in paths]


def stored(files: list[Source], cache: Path | None, **more: Any) -> Records:
    return stored_records(files, "both", Columns(), cache=cache, **more)


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "records_of", lambda *_: pytest.fail("a file was read again"))


def test_stored_records_are_those_of_the_files(
    files: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [row for file in files for row in read_records(file.path)]
    whole = Records(tuple(expected), "both")
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        found = stored(files, cache)
        assert list(found) == expected
        assert [row.origin for row in found] == [f"{Path(row.file).name}:{row.line}" for row in expected]
        assert (found.n_empty_output, found.sha256, found.n_duplicate) == (2, whole.sha256, 4)
        assert (found[-1], found[1:3]) == (expected[-1], expected[1:3])
        with pytest.raises(IndexError):
            found[6]
        if cache:
            forbid_reading(monkeypatch)


def test_a_file_that_has_changed_is_read_again(files: list[Source], tmp_path: Path) -> None:
    """Even if neither its size nor its times tell."""
    before = stored(files, tmp_path / "cache")
    path = files[0].path
    status = path.stat()
    path.write_text(path.read_text().replace("one", "eno"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = stored(files, tmp_path / "cache")
    assert (before[0].instruction, after[0].instruction) == ("one", "eno")


def test_a_file_that_changes_while_it_is_read_is_refused(
    files: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(path: Path, *arguments: Any, **options: Any) -> Any:
        with path.open("a") as file:
            file.write("\n")
        return records_of(path, *arguments, **options)

    records_of = store.records_of
    monkeypatch.setattr(store, "records_of", changing)
    with pytest.raises(UserError, match=r"^a\.jsonl: has changed while it was read; start again$"):
        stored(files, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*")) == []


def test_a_fault_leaves_no_part_of_a_cache(files: list[Source], tmp_path: Path) -> None:
    with files[0].path.open("a") as file:
        file.write("[")
    with pytest.raises(UserError, match=r"^a\.jsonl:5:"):
        stored(files, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*")) == []


def test_a_damaged_store_is_read_again_with_a_line(files: list[Source], tmp_path: Path) -> None:
    expected = list(stored(files, tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "texts").write_bytes(b"x" + (folder / "texts").read_bytes()[1:])
    said: list[str] = []
    assert list(stored(files, tmp_path / "cache", say=said.append)) == expected
    assert said == [f"{folder}: damaged cache of records, or of another version; it is made again"]


@pytest.mark.parametrize("seed", [0, 1337, 2**63])
def test_the_split_is_that_of_pythons_own_random_numbers(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"instruction": str(n), "output": "x"}) + "\n" for n in range(700)))
    draw = random.Random(seed).random
    keys = [draw() for _ in range(700)]
    chosen = sorted(sorted(range(700), key=keys.__getitem__)[:70])
    records = stored([Source(path, "many")], tmp_path / "cache")
    train, val = split(records, val_size=0.1, seed=seed)
    assert [int(row.instruction) for row in val] == chosen
    assert sorted(int(row.instruction) for side in (train, val) for row in side) == list(range(700))
