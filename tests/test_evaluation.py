"""An evaluation on records: its answers, losses and scores, its files, and going on after a stop."""

from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generation_fixtures import json_lines, save_random_adapter

import lit_adapter
from lit_adapter.data.encode import encode_records
from lit_adapter.data.packing import Packer, shared_preambles
from lit_adapter.data.records import read_records
from lit_adapter.errors import UserError
from lit_adapter.evaluation import evaluate as evaluation
from lit_adapter.evaluation.settings import Evaluation
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.model.loss import row_loss

CHOICE: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_size": 3}
HOSTILE = "<script>alert(1)</script> & \x1b[31m \u202e"


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("adapters")
    return tuple(
        save_random_adapter(tiny_base, folder / name / "adapter.safetensors", seed)
        for seed, name in enumerate(("one", "two"))
    )


@pytest.fixture
def data(tmp_path: Path, tiny_base: Path, adapters: tuple[Path, ...]) -> Path:
    """Records of which the first adapter answers some exactly, some in part and some not."""
    model = lit_adapter.load(adapters[0], tiny_base, device="cpu", dtype="float32")
    tasks = ["Say it.", "Repeat.", "Name a colour.", HOSTILE, "Count.", "Go on.", "End it."]
    own = model.generate_batch(tasks, max_new_tokens=9)
    outputs = [own[0], own[1][:4] + "...", "red", own[3], "blue " * 12, HOSTILE, own[6] + " more"]
    rows = [{"instruction": t, "output": o or "x"} for t, o in zip(tasks, outputs, strict=True)]
    path = tmp_path / "held_out.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def evaluate(
    tmp_path: Path, tiny_base: Path, adapters: tuple[Path, ...], data: Path
) -> Callable[..., dict[str, Any]]:
    def run(**more: Any) -> dict[str, Any]:
        given = {"out": tmp_path / "out", "adapters": adapters, "base": tiny_base, "data": data, **CHOICE}
        return evaluation.evaluate(Evaluation(**{**given, "max_new_tokens": 9, **more}), lambda line: None)

    return run


def models(tiny_base: Path, adapters: tuple[Path, ...]) -> dict[str, AdaptedLlama]:
    one, two = (lit_adapter.load(path, tiny_base, device="cpu", dtype="float32") for path in adapters)
    return {"base": one.base, "one": one, "two": two}


def test_answers_and_losses_are_those_of_generation_and_training(
    evaluate: Callable[..., dict[str, Any]],
    tmp_path: Path,
    tiny_base: Path,
    adapters: tuple[Path, ...],
    data: Path,
) -> None:
    found = evaluate()
    rows: list[dict[str, Any]] = json_lines(tmp_path / "out" / "answers.jsonl")[1:]  # type: ignore[assignment]
    records = read_records(data)
    for name, model in models(tiny_base, adapters).items():
        mine = [row for row in rows if row["model"] == name]
        tasks = [(record.instruction, record.input) for record in records]
        assert [row["answer"] for row in mine] == model.generate_batch(tasks, max_new_tokens=9)
        exact = np.mean([row["answer"].strip() == row["reference"].strip() for row in mine])
        assert found["scores"][name]["exact"]["value"] == pytest.approx(exact)
        encoded = encode_records(records, model.tokenizer, model.template, max_length=512)
        packer = Packer(encoded, shared_preambles(encoded), mask_prompt=True, row_tokens=600)
        everything = np.arange(len(encoded))
        total = sum(float(row_loss(model.model, packer.row(row))) for row in packer.assign(everything))
        expected = total / packer.n_targets(everything)
        assert found["scores"][name]["loss"]["value"] == pytest.approx(expected, rel=1e-5)
    assert found["scores"]["one"]["exact"]["value"] > 0


@pytest.mark.parametrize(("bf16_pays", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_without_a_precision_the_one_that_multiplies_faster_is_taken(
    evaluate: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, bf16_pays: bool, expected: str
) -> None:
    monkeypatch.setattr("lit_adapter.device._bf16_pays", lambda device: bf16_pays)
    assert evaluate(dtype=None, limit=2, max_new_tokens=2)["run"]["precision"] == expected


def test_an_answer_that_cannot_be_right_ends_and_scores_the_same(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(metrics=("exact",))
    answers = [row["answer"] for row in json_lines(tmp_path / "out" / "answers.jsonl")[1:]]
    monkeypatch.setattr("lit_adapter.evaluation.on_records.SHOWN", 1)
    early = evaluate(metrics=("exact",), stop_early=True, out=tmp_path / "early")
    cut = [row["answer"] for row in json_lines(tmp_path / "early" / "answers.jsonl")[1:]]
    assert all(long.startswith(short) for short, long in zip(cut, answers, strict=True))
    assert sum(map(len, cut)) < sum(map(len, answers)) / 2
    for name, scores in whole["scores"].items():
        assert early["scores"][name]["exact"] == scores["exact"]


def test_a_stopped_evaluation_goes_on_and_ends_the_same(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate()
    path = tmp_path / "out" / "answers.jsonl"
    complete, lines = path.read_bytes(), path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines[:-4] if b'"model": "two"' not in line]
    path.write_bytes(b"".join(kept) + lines[-1][: len(lines[-1]) // 2])  # killed while it wrote a line
    answered: list[int] = []
    continue_batch = AdaptedLlama.continue_batch

    def watched(self: AdaptedLlama, prompts: Any, **named: Any) -> list[str]:
        answered.append(len(prompts))
        return continue_batch(self, prompts, **named)

    monkeypatch.setattr(AdaptedLlama, "continue_batch", watched)
    evaluate()
    assert path.read_bytes() == complete
    assert sum(answered) <= 10  # the second adapter's seven, and what the lost lines held
    answered.clear()
    evaluate()
    assert (path.read_bytes(), answered) == (complete, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 8}, r"answers\.jsonl: answers of another run \(other max_new_tokens\); choose"),
        ({"limit": 3}, r"\(other data\)"),
        ({"adapters": 1}, r"\(other adapters or templates\)"),
    ],
)
def test_answers_of_another_run_are_refused(
    evaluate: Callable[..., dict[str, Any]],
    adapters: tuple[Path, ...],
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    evaluate()
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    change = {**change, **({"adapters": adapters[:1]} if "adapters" in change else {})}
    with pytest.raises(UserError, match=message):
        evaluate(**change)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    evaluate(**change, overwrite=True)


def test_a_refused_evaluation_leaves_no_folder(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="'exakt' is unknown"):
        evaluate(metrics=("exakt",), out=tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


class _Links(html.parser.HTMLParser):
    """Collects what a page would load, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_and_runs_nothing_of_the_data(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    evaluate()
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = _Links()
    page.feed(text)
    assert (page.loaded, page.tags & {"script", "link", "img", "iframe"}) == ([], set())
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search("[\x1b\u202e]", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; \\x1b[31m" in text
    assert {"svg", "table", "h2"} <= page.tags
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "## Scores, with 95 % intervals" in markdown
    assert not re.search("[\x1b\u202e]", markdown)


def test_conversations_are_asked_for_their_last_answers(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path, tiny_base: Path, adapters: tuple[Path, ...]
) -> None:
    data = tmp_path / "chats.jsonl"
    chats = [["Say it.", "red", "And?", "green blue"], ["Count.", "blue"]]
    rows = [
        {"messages": [{"role": ("user", "assistant")[n % 2], "content": said} for n, said in enumerate(chat)]}
        for chat in chats
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(data=data)
    answers: list[dict[str, Any]] = json_lines(tmp_path / "out" / "answers.jsonl")[1:]  # type: ignore[assignment]
    records = read_records(data)
    for name, model in models(tiny_base, adapters).items():
        mine = [row for row in answers if row["model"] == name]
        before = [row["messages"][:-1] for row in rows]
        assert [row["answer"] for row in mine] == model.chat_batch(before, max_new_tokens=9)
        assert [row["reference"] for row in mine] == ["green blue", "blue"]
        encoded = encode_records(
            records, model.tokenizer, model.template, max_length=512, last_answer_only=True
        )
        packer = Packer(encoded, shared_preambles(encoded), mask_prompt=True, row_tokens=600)
        everything = np.arange(2)
        total = sum(float(row_loss(model.model, packer.row(row))) for row in packer.assign(everything))
        expected = total / packer.n_targets(everything)
        assert found["scores"][name]["loss"]["value"] == pytest.approx(expected, rel=1e-5)


def test_plain_text_is_compared_before_and_after(
    evaluate: Callable[..., dict[str, Any]],
    tmp_path: Path,
    tiny_base: Path,
    adapters: tuple[Path, ...],
) -> None:
    import torch

    plain = tmp_path / "plain.txt"
    plain.write_text("red green blue\n" * 230)
    found = evaluate(data=None, plain=plain, max_new_tokens=None)
    for name, model in models(tiny_base, adapters).items():
        ids, length = model.tokenizer.encode(plain.read_text()), 1024
        total = 0.0
        for start in range(0, len(ids), length):
            end = min(start + length, len(ids))
            seen = [model.tokenizer.bos_id, *ids][max(0, end - length) : end]
            share = model.logits(torch.tensor([seen]))[0].double().log_softmax(-1)
            new = ids[start:end]
            total -= float(share[-len(new) :].gather(1, torch.tensor(new)[:, None]).sum())
        assert found["plain"][name]["tokens"] == len(ids) > length
        assert found["plain"][name]["perplexity"] == pytest.approx(np.exp(total / len(ids)), rel=1e-5)
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_a_plain_text_is_measured_once_by_each_model(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a stop, by the models that have not; a text or precision that has changed, by all again."""
    plain, measured = tmp_path / "plain.txt", []
    plain.write_text("red green blue\n" * 20)
    only: dict[str, Any] = {"data": None, "plain": plain, "max_new_tokens": None}
    plain_text = evaluation.plain_text

    def stopped(model: AdaptedLlama, text: str, title: str) -> Any:
        measured.append(title)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return plain_text(model, text, title)

    monkeypatch.setattr(evaluation, "plain_text", stopped)
    with pytest.raises(KeyboardInterrupt, match="what is finished is kept; the same command continues"):
        evaluate(**only)
    found = evaluate(**only)
    assert measured == ["base", "one", "one", "two"]
    path = tmp_path / "out" / "plain.jsonl"
    complete = path.read_bytes()
    path.write_bytes(complete[:-20])  # killed while it wrote the last line
    again = evaluate(**only)
    assert measured[4:] == ["two"]
    assert (again["plain"], path.read_bytes()) == (found["plain"], complete)
    plain.write_text("red green blue\n" * 19 + "red green red\n")
    assert evaluate(**only)["plain"] != found["plain"]
    assert evaluate(**only, dtype="bfloat16")["plain"] != found["plain"]
    assert measured[5:] == ["base", "one", "two"] * 2
    plain.write_text("red green blue\n" * 20)
    assert evaluate(**only, out=tmp_path / "fresh")["plain"] == found["plain"]
    path.write_text("somebody's own text\n")
    with pytest.raises(UserError, match=r"plain\.jsonl: answers of another run \(no identity"):
        evaluate(**only)
    assert path.read_text() == "somebody's own text\n"
