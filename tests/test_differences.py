"""What a refused resume says: files and numbers that the user knows, and no hashes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lit_adapter.config import Config, DataConfig
from lit_adapter.text.template import Template
from lit_adapter.training.differences import differences
from lit_adapter.training.run_identity import RunIdentity, run_identity

TEMPLATE = Template("custom", "Question: {instruction} Answer:").to_dict()
DATA = {"records": "a1", "n_records": 40, "val_records": "b1", "n_val_records": 8, "file": "c1", "n_file": 48}
NEW = ("n_val_records", "file", "n_file")
"""What checkpoints did not always hold."""


def run(config: Config, facts: dict[str, Any], **data: Any) -> RunIdentity:
    told = {f"data.{key}": value for key, value in (DATA | data).items() if value != "unknown"}
    return run_identity(config, 5, **({"base": "d1", "tokenizer": "e1", "template": TEMPLATE} | facts | told))


def said(config: Config | None = None, facts: dict[str, Any] | None = None, **data: Any) -> list[str]:
    config = config or Config(data=DataConfig(train="my.json"))
    return differences(run(Config(), {}), run(config, facts or {}, **data), config)


def said_of_stream(**data: Any) -> list[str]:
    before: dict[str, Any] = {"streamed": "3 files, a1b2", "file_contents": "c3d4"}
    config = Config(data=DataConfig(train="logs"))
    sides = [
        run_identity(config, 5, **{f"data.{key}": value for key, value in side.items()})
        for side in (before, before | data)
    ]
    return differences(*sides, config)


def test_of_a_stream_its_files_are_named_without_their_checksums() -> None:
    changed = "data.train logs: its files have changed (3 files then, 1 file now)"
    assert said_of_stream(streamed="1 file, e5f6", file_contents="0718") == [changed]
    assert said_of_stream(file_contents="0718") == ["data.train logs: the content of its files has changed"]
    assert said_of_stream() == []


VAL = Config(data=DataConfig(train="my.json", val="held.json"))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (said(), []),
        (
            said(file="c2", n_file=50, records="a2", n_records=42, val_records="b2"),
            ["data.train my.json: its records have changed (48 records then, 50 now)"],
        ),
        (
            said(VAL, file="c2", n_file=1, records="a2", n_records=1),
            ["data.train my.json: its records have changed (48 records then, 1 now)"],
        ),
        (
            said(VAL, val_records="b2", n_val_records=9),
            ["data.val held.json: other records are held out (8 records then, 9 now)"],
        ),
        (
            said(VAL, file="c2", val_records="b2"),
            [
                "data.train my.json: its records have changed (48 records then, 48 now)",
                "data.val held.json: other records are held out (8 records then, 8 now)",
            ],
        ),
        (
            said(records="a2", n_records=44, val_records="b2", n_val_records=4),
            ["data.val, data.val_size: other records are held out (8 records then, 4 now)"],
        ),
        (
            said(VAL, records="a2", n_records=48),  # the same ones, which were a part of the file
            ["data.val held.json: other records are held out (8 records then, 8 now)"],
        ),
        (said(n_records=39), ["data.train my.json: 40 records then, 39 now fit data.max_length"]),
        (
            said(replace(Config(), seed=4), records="a2", val_records="b2"),
            ["seed was 1337, now 4"],
        ),
        (
            said(facts={"template": TEMPLATE | {"text": "Question: {instruction} Reply:"}}),
            ["data.template: its text from character 25 on was 'Answer:', now 'Reply:'"],
        ),
        (
            said(facts={"template": TEMPLATE | {"end": "<|end|>"}}),
            ["data.template: its end was 'None', now '<|end|>'"],
        ),
        (
            said(facts={"base": "d2"}),
            ["base checkpoints/smollm2-135m: its weights are not those with which the run began"],
        ),
        (
            said(Config(base="checkpoints/other"), {"tokenizer": "e2"}),
            [
                "base checkpoints/other: its tokenizer is not that of checkpoints/smollm2-135m "
                "with which the run began"
            ],
        ),
        (said(facts={"base.eos_id": 7}), []),  # the checkpoint does not tell
    ],
)
def test_what_a_refusal_says(lines: list[str], expected: list[str]) -> None:
    assert lines == expected


def test_a_setting_without_a_value_is_unset() -> None:
    weighted = Config(data=DataConfig(train=["my.json", "b.json"], weights=[3, 1]))
    assert said(weighted) == ["data.weights was unset, now [3, 1]"]


def test_a_checkpoint_that_does_not_know_the_file_is_compared_by_what_it_knows() -> None:
    config = Config(data=DataConfig(train="my.json"))
    saved = run(Config(), {}, **dict.fromkeys(NEW, "unknown"))
    assert differences(saved, run(config, {}), config) == []
    assert differences(saved, run(config, {}, records="a2", n_records=42), config) == [
        "data.train my.json: other records are trained on (40 records then, 42 now), or other ones held out"
    ]
    held_out = differences(saved, run(VAL, {}, val_records="b2", n_val_records=3), VAL)
    assert held_out == ["data.val held.json: other records are held out (3 records now)"]
