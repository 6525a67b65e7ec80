"""Conversations, prompts and texts in every form in which people have them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_adapter.config import Columns, DataConfig
from lit_adapter.data.mixing import EpochOrder, shares
from lit_adapter.data.record import Conversation, PlainText, Record, record_of
from lit_adapter.data.records import Records, read_records
from lit_adapter.data.sources import check_sources, has_conversations, load_records
from lit_adapter.errors import UserError

ASKED = {"role": "user", "content": "Hi"}
ANSWERED = {"role": "assistant", "content": "Hello!"}


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def messages(records: Records) -> list[list[tuple[str, str, bool]]]:
    assert all(isinstance(row, Conversation) for row in records)
    return [[(m.role, m.content, m.learned) for m in row.messages] for row in records]


HELLO = [("user", "Hi", True), ("assistant", "Hello!", True)]


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"messages": [ASKED, ANSWERED]}, "messages"),
        ({"messages": [ASKED, ANSWERED], "prompt": "x", "prompt_id": 3}, "messages"),
        ({"messages": json.dumps([ASKED, ANSWERED])}, "messages"),
        ({"messages": [ASKED, {**ANSWERED, "name": None, "tool_calls": None}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, "i"]}, ANSWERED]},
            "messages",
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
            "conversations",
        ),
        (
            {"conversations": [{"from": "User", "value": "Hi"}, {"from": "chatgpt", "value": "Hello!"}]},
            "conversations",
        ),
        ({"conversations": [ASKED, ANSWERED]}, "conversations"),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, "prompt_completion"),
    ],
)
def test_the_same_conversation_in_every_form(tmp_path: Path, record: dict[str, Any], name: str) -> None:
    found = read_records(lines(tmp_path / "x.jsonl", record))
    assert messages(found) == [HELLO]
    assert [known.name for known in found.formats] == [name]
    assert found[0].origin == f"{tmp_path}/x.jsonl:1"
    assert record_of(found[0].texts) == found[0]


def test_prompt_and_completion_and_text(tmp_path: Path) -> None:
    found = read_records(lines(tmp_path / "p.jsonl", {"prompt": "Hi", "completion": "Hello!"}))
    assert found.rows == (Record("Hi", "", "Hello!"),)
    found = read_records(lines(tmp_path / "t.jsonl", {"text": "All of it."}, {"text": " "}))
    assert found.rows == (PlainText("All of it."),)
    assert found.n_empty_output == 1


def test_alpaca_records_keep_their_format_beside_other_columns(tmp_path: Path) -> None:
    row = {"instruction": "a", "input": "", "output": "b", "text": "Below is a b"}
    assert read_records(lines(tmp_path / "a.jsonl", row)).rows == (Record("a", "", "b"),)


def test_columns_with_other_names_decide_the_format(tmp_path: Path) -> None:
    row = {"dialogue": [ASKED, ANSWERED], "functions": [{"name": "f"}], "q": "x", "a": "y", "body": "z"}
    path = lines(tmp_path / "x.jsonl", row)
    talk = read_records(path, columns=Columns(messages="dialogue", tools="functions"))
    assert messages(talk) == [HELLO]
    assert talk[0].tools == [{"name": "f"}]
    assert talk.formats[0].why == "data.columns.messages is given"
    assert read_records(path, columns=Columns(prompt="q", completion="a"))[0] == Record("x", "", "y")
    assert read_records(path, columns=Columns(text="body"))[0] == PlainText("z")
    assert read_records(path, columns=Columns("q", output="a"))[0] == Record("x", "", "y")


def test_calls_results_system_prompts_and_reasoning(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": [2]}'}}
    record = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            ANSWERED,
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": None}}],
    }
    (talk,) = read_records(lines(tmp_path / "m.jsonl", record))
    assert [m.role for m in talk.messages] == ["system", "user", "assistant", "tool", "assistant"]
    asked = talk.messages[2]
    assert asked.content == ""
    assert asked.more["tool_calls"][0]["function"] == {"name": "f", "arguments": {"b": 1, "a": [2]}}
    assert asked.more["reasoning_content"] == "hm"
    assert talk.tools == record["tools"]
    shared = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"b": 1, "a": [2]}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "Hello!"},
        ],
    }
    (other,) = read_records(lines(tmp_path / "c.jsonl", shared))
    assert [(m.role, m.content) for m in other.messages] == [(m.role, m.content) for m in talk.messages]
    assert other.messages[2].more["tool_calls"][0]["function"] == asked.more["tool_calls"][0]["function"]


def test_marks_are_honoured_and_what_has_nothing_to_learn_is_left_out(tmp_path: Path) -> None:
    off, zero, empty = {"train": False}, {"weight": 0}, {"role": "assistant", "content": " "}
    path = lines(
        tmp_path / "m.jsonl",
        {"messages": [ASKED, ANSWERED | off, ASKED, ANSWERED | {"weight": 1, "train": True}]},
        {"messages": [ASKED, ANSWERED | zero]},
        {"messages": [ASKED, empty]},
    )
    found = read_records(path)
    assert [learned for _, _, learned in messages(found)[0]] == [True, False, True, True]
    assert (len(found), found.n_empty_output) == (1, 2)
    answered = read_records(
        lines(tmp_path / "p.jsonl", {"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]})
    )
    assert [learned for _, _, learned in messages(answered)[0]] == [True, False, True, True]


def test_csv_and_parquet_hold_conversations_too(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    with (tmp_path / "m.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["id", "messages"], ["1", json.dumps([ASKED, ANSWERED])]])
    assert messages(read_records(tmp_path / "m.csv")) == [HELLO]
    rows = [
        {"messages": [ASKED, {**ANSWERED, "train": False}, ASKED, ANSWERED]},
        {"messages": [ASKED, ANSWERED]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "m.parquet")
    first, second = messages(read_records(tmp_path / "m.parquet"))
    assert [learned for _, _, learned in first] == [True, False, True, True]
    assert second == HELLO


def test_csv_holds_prompts_and_completions_of_messages(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        cells = [json.dumps([ASKED]), json.dumps([ANSWERED], indent=1)]
        writer.writerows([["prompt", "completion"], cells, ["Say [{'a': 1}]", "[1, 2]"]])
    records = read_records(path)
    assert records.formats[0].why.endswith("'prompt' and 'completion', lists of messages")
    assert messages(Records(records[:1], "x")) == [HELLO]
    assert records[1] == Record("Say [{'a': 1}]", "", "[1, 2]")


def test_formats_that_fit_too_are_named(tmp_path: Path) -> None:
    both = {"instruction": "a", "output": "b", "messages": [ASKED, ANSWERED], "text": "c"}
    path = lines(tmp_path / "b.jsonl", both)
    (known,) = read_records(path).formats
    assert known.name == "alpaca"
    assert known.why == (
        "its records have 'instruction' and 'output'; messages or text could be read too, with data.format"
    )
    chosen = load_records(str(path), Columns(), "messages", cache=None)
    assert messages(chosen) == [HELLO]


def test_folders_patterns_and_lists_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        lines(tmp_path / f"{name}.jsonl", {"prompt": name, "completion": "x"})
    lines(tmp_path / ".hidden.jsonl", {"prompt": "no", "completion": "x"})
    (tmp_path / "notes.md").write_text("no data")
    other = lines(tmp_path / "c.json.jsonl", {"messages": [ASKED, ANSWERED]})
    other.rename(tmp_path / "chat.ndjson")
    for given in (str(tmp_path), f"{tmp_path}/*.*json*"):
        found = load_records(given, Columns(), cache=None)
        assert [row.texts[0] for row in found] == ["a", "b", "conversation"]
        assert [known.name for known in found.formats] == ["prompt_completion", "messages"]
    found = load_records([f"{tmp_path}/[b].jsonl", f"{tmp_path}/a.jsonl"], Columns(), cache=None)
    assert [(row.texts[0], row.source) for row in found] == [("b", 0), ("a", 1)]
    assert has_conversations(DataConfig(train=[f"{tmp_path}/a.jsonl", f"{tmp_path}/chat.ndjson"]))
    assert not has_conversations(DataConfig(train=f"{tmp_path}/a.jsonl"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{0}/*.csv", r"/\*\.csv.*: no file matches this pattern; check folder"),
        ("{0}/empty", r"empty: is a folder without a data file \(\.json, .*name another one"),
        ("{0}/none.jsonl", "none.jsonl: file not found"),
        ("", "data.train is not set"),
    ],
)
def test_a_source_that_is_not_there(tmp_path: Path, given: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        check_sources(DataConfig(train=given.format(tmp_path)))


def test_weights_are_shares_of_every_epoch() -> None:
    source = np.array([0] * 90 + [1] * 10)
    order = EpochOrder(100, seed=3, source=source, weights=[1, 3])
    epochs = [order.epoch(number) for number in range(8)]
    for epoch in epochs:
        assert len(epoch) == 100
        assert (source[epoch] == 1).sum() == 75
    again = EpochOrder(100, seed=3, source=source, weights=[1, 3])
    assert all(np.array_equal(again.epoch(n), epochs[n]) for n in (7, 2))
    # A source goes through all of its records before it repeats one.
    large = np.sort(np.concatenate([epoch[epoch < 90] for epoch in epochs]))
    assert np.bincount(large).max() - np.bincount(large).min() <= 1
    small = np.concatenate([epoch[epoch >= 90] for epoch in epochs])
    assert np.bincount(small - 90).tolist() == [60] * 10
    assert not np.array_equal(source[epochs[0]], source[epochs[1]])
    assert not np.array_equal(EpochOrder(100, 4, source, [1, 3]).epoch(0), epochs[0])


def test_without_weights_the_order_is_as_it_was() -> None:
    expected = np.random.default_rng((7, 2)).permutation(50)
    assert np.array_equal(EpochOrder(50, 7).epoch(2), expected)


def test_shares_add_up() -> None:
    assert shares(np.array([1, 1, 1]), 100).tolist() == [34, 33, 33]
    assert shares(np.array([0, 2.5, 0]), 7).tolist() == [0, 7, 0]


def test_a_weight_of_an_empty_source_goes_to_the_others() -> None:
    order = EpochOrder(10, 0, np.zeros(10, np.int64), [1, 5])
    assert sorted(order.epoch(0).tolist()) == list(range(10))


def test_null_in_arguments_and_tools_is_kept(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    call = {"id": 5, "name": "f", "arguments": {"unit": None}}
    turns = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": 5, "content": "3"},
        ANSWERED,
    ]
    (row,) = read_records(lines(tmp_path / "a.jsonl", {"messages": turns, "tools": [tool]}))
    assert row.tools == [tool]
    (made,) = row.messages[1].more["tool_calls"]
    assert made == {"type": "function", "id": 5, "function": {"name": "f", "arguments": {"unit": None}}}


def test_a_system_prompt_beside_the_messages_comes_first(tmp_path: Path) -> None:
    (row,) = read_records(lines(tmp_path / "a.jsonl", {"system": "Be brief.", "messages": [ASKED, ANSWERED]}))
    assert next((m.role, m.content) for m in row.messages) == ("system", "Be brief.")


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ({"role": "tool", "tool_call_id": ["x"], "content": "3"}, "turn 2: a tool's result without a call"),
        ({**ANSWERED, "more": nested(900)}, "turn 2: 'more' is nested more than 100 deep"),
        ({**ANSWERED, "\ud800": 1}, "turn 2: 'a key' has half of a character"),
    ],
)
def test_what_a_message_cannot_hold(tmp_path: Path, message: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        read_records(lines(tmp_path / "a.jsonl", {"messages": [ASKED, message]}))


def test_tools_are_valid_unicode(tmp_path: Path) -> None:
    record = {"messages": [ASKED, ANSWERED], "tools": [{"\ud800": 1}]}
    with pytest.raises(UserError, match="'tools' has half of a character"):
        read_records(lines(tmp_path / "a.jsonl", record))


def test_weights_may_be_large() -> None:
    assert shares(np.array([1e308, 1e308]), 10).tolist() == [5, 5]


def test_columns_beside_a_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nBroken pipe,urgent\n")
    (known,) = read_records(tmp_path / "a.csv").formats
    assert (known.name, known.why) == ("text", "its records have 'text'; 'label' not used")
