"""What a run says of its data before it trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lit_adapter.config import DataConfig
from lit_adapter.data import encode
from lit_adapter.data.module import AlpacaDataModule
from lit_adapter.data.summary import describe
from lit_adapter.errors import UserError
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template

LONG = "no end " * 300
"""Longer than data.max_length, as a prompt and as an answer."""
TITLE = "example (in [[ ]]: not learned; in {{ }}: control tokens)"


def write(path: Path, *records: tuple[str, str]) -> str:
    lines = [json.dumps({"instruction": task, "output": answer}) + "\n" for task, answer in records]
    path.write_text("".join(lines))
    return str(path)


def plain(name: str, count: int) -> list[tuple[str, str]]:
    return [(f"{name} {number}", "red") for number in range(count)]


def module(
    base: Path, config: DataConfig, row_tokens: int = 1000, template: str = "alpaca"
) -> AlpacaDataModule:
    tokenizer = load_tokenizer(base)
    template = resolve_template(template, tokenizer)
    return AlpacaDataModule(
        config, tokenizer=tokenizer, template=template, tokenizer_key="", batch_size=2, row_tokens=row_tokens
    ).read()


def notes(base: Path, config: DataConfig) -> list[str]:
    """Return the lines between the counts and the example."""
    data = module(base, config)
    lines = [line.strip() for line in describe(data, color=False)]
    return [line for line in lines[: lines.index(TITLE)] if "%)" in line]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_ADAPTER_CACHE", str(tmp_path / "cache"))


def test_empty_outputs_are_counted_where_records_are_split_off(tiny_base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", *plain("task", 18), ("a", ""), ("b", " \n"))
    assert notes(tiny_base, DataConfig(train=path)) == ["2 (10.0%) of all records left out: empty output"]


def test_every_share_is_of_what_it_counts(tiny_base: Path, tmp_path: Path) -> None:
    train = [*plain("task", 4), *plain("task", 2), ("a", ""), ("too long", LONG), (LONG, "cut")]
    val = [*plain("task", 1), *plain("held", 5), ("b", ""), ("too long", LONG), ("also", LONG)]
    config = DataConfig(
        train=write(tmp_path / "train.jsonl", *train), val=write(tmp_path / "val.jsonl", *val)
    )
    assert notes(tiny_base, config) == [
        "2 (11.1%) of all records left out: empty output",
        "1 (12.5%) of the training records left out: answer longer than data.max_length 512",
        "1 (12.5%) of the training records lost the start of their prompt to data.max_length",
        "1 (14.3%) of the training records are skipped in each epoch, different ones each time: "
        "7 is not a multiple of optim.batch_size 2",
        "2 (25.0%) of the training records repeat an earlier one, see data.drop_duplicates",
        "2 (25.0%) of the held-out records left out: answer longer than data.max_length 512",
        "2 (25.0%) of the held-out records are in the training set too",
    ]


def test_records_held_out_too_hint_at_the_setting_that_leaves_them_out(
    tiny_base: Path, tmp_path: Path
) -> None:
    train, val = write(tmp_path / "a.jsonl", *plain("x", 4)), write(tmp_path / "b.jsonl", *plain("x", 2))
    assert notes(tiny_base, DataConfig(train=train, val=val)) == [
        "2 (100.0%) of the held-out records are in the training set too, see data.drop_duplicates"
    ]


def test_weights_say_what_an_epoch_has_of_each_source(tiny_base: Path, tmp_path: Path) -> None:
    talks = tmp_path / "chats"
    talks.mkdir()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for name in "ab":
        (talks / f"{name}.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 11)
    other, unused = (write(tmp_path / f"{name}.jsonl", *plain(name, 21)) for name in ("x", "y"))
    chats = f"{talks}/*.jsonl"
    config = DataConfig(train=[chats, other, unused], weights=[3, 1, 0], val_size=0)
    data = module(tiny_base, config)
    said = [line.strip() for line in describe(data, color=False)]
    assert (
        f"weights: {chats}: 48 of an epoch's 64 records, from 22; {other}: 16, from 21; "
        f"{unused}: not trained on (weight 0)"
    ) in said
    assert f"format of {chats}: messages; its records have 'messages'" in said
    assert f"format of {other}, {unused}: alpaca; its records have 'instruction' and 'output'" in said
    assert not [line for line in said if "skipped" in line]
    order = data.epoch_order().epoch(0)
    assert ((order < 22).sum(), ((order >= 22) & (order < 43)).sum(), (order >= 43).sum()) == (48, 16, 0)
    again = module(tiny_base, config)
    assert [line.strip() for line in describe(again, color=False)] == said  # from the cache


def test_weights_say_what_fills_no_step_and_which_source_is_empty(tiny_base: Path, tmp_path: Path) -> None:
    path, long = (
        write(tmp_path / "x.jsonl", *plain("x", 7)),
        write(tmp_path / "y.jsonl", ("too long", LONG)),
    )
    data = module(tiny_base, DataConfig(train=[path, long], weights=[1, 1], val_size=0))
    said = [line.strip() for line in describe(data, color=False)]
    assert (
        f"weights: {path}: 7 of an epoch's 7 records, from 7; {long}: has no record; "
        "1 of the 7, at random, are skipped: not a multiple of optim.batch_size 2"
    ) in said
    assert not [line for line in said if "skipped in each epoch" in line]


def test_one_source_needs_no_name_beside_its_format(tiny_base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *plain("x", 7))
    said = describe(module(tiny_base, DataConfig(train=[path], val_size=0)), color=False)
    assert "      format: alpaca; its records have 'instruction' and 'output'" in said


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("alpaca", "alpaca"),
        ("alpaca-chat", "alpaca-chat"),
        ("Task: {instruction}\nAnswer:", r"custom ('Task: {instruction}\nAnswer:')"),
        ("FILE.jinja", "jinja ('FILE.jinja')"),
    ],
)
def test_the_template_is_named(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, shown: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE.jinja").write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    path = write(tmp_path / "x.jsonl", *plain("x", 7))
    said = describe(
        module(tiny_base, DataConfig(train=path, val_size=0, template=setting), template=setting), color=False
    )
    assert [line.strip() for line in said if "template:" in line] == [f"template: {shown}"]


def test_duplicates_can_be_left_out(tiny_base: Path, tmp_path: Path) -> None:
    train = [*plain("task", 4), *plain("task", 2), *plain("held", 2), *plain("held", 1)]
    config = DataConfig(
        train=write(tmp_path / "train.jsonl", *train),
        val=write(tmp_path / "val.jsonl", *plain("held", 5)),
        drop_duplicates=True,
    )
    assert notes(tiny_base, config) == [
        "3 (33.3%) of the training records left out: they repeat an earlier one",
        "2 (22.2%) of the training records left out: they are held out too",
    ]
    data, kept = module(tiny_base, config), module(tiny_base, replace(config, drop_duplicates=False))
    assert [row.instruction for row in data.train_records] == [f"task {n}" for n in range(4)]
    assert len(data.train_encoded) == 4
    assert [data.origin(n).rpartition(":")[2] for n in range(4)] == ["1", "2", "3", "4"]
    assert len(kept.train_encoded) == 9
    assert data.identity()["records"] != kept.identity()["records"]


def test_without_duplicates_there_must_be_a_record_left(tiny_base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "both.jsonl", *plain("task", 4))
    with pytest.raises(UserError, match=r"data\.drop_duplicates leaves no training record of .*both\.jsonl"):
        module(tiny_base, DataConfig(train=path, val=path, drop_duplicates=True))


def test_another_split_encodes_nothing_again(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "data.jsonl", *plain("task", 40))
    module(tiny_base, DataConfig(train=path))
    monkeypatch.setattr(encode, "_encode_chunk", lambda *_: pytest.fail("encoded again"))
    sides = [module(tiny_base, DataConfig(train=path, val_size=size)) for size in (4, 7)]
    assert [len(side.val_records or ()) for side in sides] == [4, 7]


@pytest.mark.parametrize(("row_tokens", "n_shares"), [(200, 1), (1000, 1), (1000, 2)])
def test_packing_says_what_it_leaves_to_compute(
    tiny_base: Path, tmp_path: Path, row_tokens: int, n_shares: int
) -> None:
    """Of all processes together: each of them computes the preamble for its own rows."""
    path = write(tmp_path / "data.jsonl", *((f"task {n}", "red " * (3 * n % 17)) for n in range(1, 19)))
    data = module(tiny_base, DataConfig(train=path), row_tokens)
    shares = [data.training_steps(rank, n_shares) for rank in range(n_shares)]
    batches = [[steps[n] for n in range(steps.steps_per_epoch)] for steps in shares]
    computed = sum(len(row.ids) for own in batches for batch in own for row in batch.rows)
    head = len(data.train_packer.preambles[1])
    length = data.train_encoded.length
    share, shared = computed / sum(batch.n_tokens for batch in batches[0]), head * len(length) / length.sum()
    [line] = [line for line in describe(data, color=False, n_shares=n_shares) if "packed" in line]
    assert line.strip() == (
        f"packed without padding; the preamble, {shared:.0%} of the tokens, is computed once per row: "
        f"{share:.0%} of a step's tokens are computed"
    )


TYPED = "<|im_start|>user\n{instruction}</s>\n"
"""Of its control tokens the tiny base has the last one."""


def test_the_example_marks_control_tokens_apart_from_text_like_them(tiny_base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", *[("Say <s>\u00e4</s>.", "red</s>")] * 2)
    data = module(tiny_base, DataConfig(train=path, val_size=0), template=TYPED)
    assert data.train_encoded.record(0).tolist().count(1) == 2  # the template's and the one at the end
    lines = describe(data, color=False)
    assert "\n".join(lines[lines.index(TITLE) + 1 :]) == (
        "  | [[{{<s>}}<|im_start|>user\n  | Say <s>\u00e4</s>.{{</s>}}\n  | ]]red</s>{{</s>}}"
    )
    shown = describe(data, color=True)
    assert "reverse: control tokens" in shown[-2]
    assert shown[-1] == (
        "  | \x1b[2m\x1b[7m<s>\x1b[27m<|im_start|>user\n  | Say <s>\u00e4</s>.\x1b[7m</s>\x1b[27m\n"
        "  | \x1b[0mred</s>\x1b[7m</s>\x1b[27m"
    )


def warnings(base: Path, path: str, template: str) -> list[str]:
    data = module(base, DataConfig(train=path, val_size=0), template=template)
    return [line.strip() for line in describe(data, color=False) if "warning" in line]


def test_text_that_looks_like_control_tokens_is_named(tiny_base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", ("a</s>", "b</s>"), ("<s>a", "b</s>"), ("a", "<|eot_id|>"))
    assert warnings(tiny_base, path, TYPED) == [
        "warning: the template's <|im_start|> is plain text: no control token of this base",
        "warning: </s> in 2 records, <s> in 1 record: plain text, not the control token; "
        "write control tokens into data.template",
    ]
    assert warnings(tiny_base, write(tmp_path / "plain.jsonl", *plain("task", 4)), "{instruction}</s>") == []
