"""Probabilities of given answers, against plain sums over the logits of whole texts."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_fixtures import CHOICES, json_lines, save_random_adapter, script

from lit_adapter.errors import UserError
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.answering import choose
from lit_adapter.generation.choosing import ScoredChoice
from lit_adapter.generation.prompt_file import BATCHES_PER_GROUP
from lit_adapter.model.config import AdapterConfig

V2 = AdapterConfig(version="v2", layers=3, prompt_length=3, head=True)
ANSWERS = ["red", "red and blue", " no", "Grün \U0001f468"]
TASKS = [("Name it.", "red blue"), ("Say.", ""), ("Name the colour of this sentence.", "blue " * 20)]


def summed(model: AdaptedLlama, task: tuple[str, str], answer: str) -> float:
    """The log-likelihood of an answer as training encodes it, from the logits of the whole text."""
    prompt = model.template.encode_prompt(model.tokenizer, *task)
    ids, _ = model.template.encode_example(model.tokenizer, *task, answer)
    assert ids[: len(prompt)] == prompt
    assert ids[-1] == model.template.end_id(model.tokenizer)
    logits = model.logits(torch.tensor([ids]))[0].double()
    share = logits - logits.logsumexp(-1, keepdim=True)
    return sum(share[place - 1, ids[place]].item() for place in range(len(prompt), len(ids)))


def check(model: AdaptedLlama, task: tuple[str, str], found: Sequence[ScoredChoice]) -> None:
    wanted = {answer: summed(model, task, answer) for answer in ANSWERS}
    assert [choice.text for choice in found] == sorted(ANSWERS, key=lambda answer: -wanted[answer])
    total = sum(math.exp(value - max(wanted.values())) for value in wanted.values())
    for choice in found:
        assert choice.log_likelihood == pytest.approx(wanted[choice.text], abs=2e-4)
        probability = math.exp(wanted[choice.text] - max(wanted.values())) / total
        assert choice.probability == pytest.approx(probability, abs=1e-4)
    assert sum(choice.probability for choice in found) == pytest.approx(1)


@pytest.mark.parametrize("form", ["base", "v1", "v2"])
def test_choices_have_the_likelihood_of_whole_texts(
    form: str, model: AdaptedLlama, tiny_base: Path, tmp_path: Path
) -> None:
    if form == "base":
        model = model.base
    if form == "v2":
        model = model.with_adapter(save_random_adapter(tiny_base, tmp_path / "v2.safetensors", config=V2))
    for task in TASKS:
        check(model, task, model.choose(*task, choices=ANSWERS))


def test_tasks_are_scored_together_as_alone(model: AdaptedLlama) -> None:
    finished: list[int] = []
    together = model.choose_batch(TASKS, choices=ANSWERS, batch_size=2, finished=finished.append)
    for task, found in zip(TASKS, together, strict=True):
        check(model, task, found)
    assert finished == [0, 1, 2]


def test_a_prompt_is_computed_once_for_all_choices(model: AdaptedLlama) -> None:
    lengths: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, ids, out: lengths.append(ids[0].numel()))
    try:
        model.choose(*TASKS[0], choices=ANSWERS)
    finally:
        hook.remove()
    n_prompt = len(model.template.encode_prompt(model.tokenizer, *TASKS[0]))
    n_answers = sum(len(model.tokenizer.encode(answer, continuation=True)) for answer in ANSWERS)
    assert lengths == [n_prompt + n_answers]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], "choices holds 0; expected two or more answers"),
        (["a"], "choices holds 1; expected two or more answers"),
        (["a", "b", "a"], "choices holds 'a' twice; keep one"),
        (["a", " "], "choices holds an empty answer"),
        ("ab", "choices is a single text; expected a list of texts"),
        (["a", 1], r"choices\[1\] is 1; expected text"),
        (["a", "word " * 900], r"the \d+ of choice 'word .* exceed the base's context of 1024; shorten one"),
    ],
)
def test_choices_without_a_choice_are_refused(model: AdaptedLlama, choices: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.choose("x", choices=choices)


def test_choices_of_one_prompt_on_the_command_line(
    tiny_base: Path, adapter: Path, model: AdaptedLlama
) -> None:
    common = ("--adapter", adapter, "--base", tiny_base, *CHOICES)
    found = script(*common, "--prompt", "Name it.", "--choices", 'red, blue ,"no, none"').splitlines()
    assert found[0].split() == ["probability", "log-likelihood", "answer"]
    wanted = model.choose("Name it.", choices=["red", "blue", "no, none"])
    for line, choice in zip(found[1:], wanted, strict=True):
        probability, log_likelihood, text = line.split(maxsplit=2)
        assert float(probability) == pytest.approx(choice.probability, abs=1e-4)
        assert float(log_likelihood) == pytest.approx(choice.log_likelihood, abs=2e-3)
        assert text == choice.text


def test_a_choice_cannot_command_a_terminal(
    model: AdaptedLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    choose(model, ("Name it.", ""), ["red\x1b[2J", "blue"], out)
    assert "red\\x1b[2J" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_no_header_stands_above_an_error(model: AdaptedLlama) -> None:
    out = io.StringIO()
    with pytest.raises(UserError, match="exceed the base's context"):
        choose(model, ("Name it.", ""), ["red", "word " * 900], out)
    assert out.getvalue() == ""


def test_choices_of_a_file(tiny_base: Path, adapter: Path, model: AdaptedLlama, tmp_path: Path) -> None:
    common = ("--adapter", adapter, "--base", tiny_base, *CHOICES, "--choices", "red,blue")
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    rows = [{"instruction": instruction, "input": input, "id": 1} for instruction, input in TASKS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script(*common, "--batch_size", 2, "--prompts", path, "--output", out)
    for row, found in zip(rows, json_lines(out), strict=True):
        scored = model.choose(row["instruction"], row["input"], choices=["red", "blue"])
        by_text = {choice.text: choice for choice in scored}
        assert {name: found[name] for name in row} == row
        assert found["output"] == scored[0].text
        assert list(found["probabilities"]) == ["red", "blue"]
        for text, choice in by_text.items():
            assert found["probabilities"][text] == pytest.approx(choice.probability, abs=1e-4)
            assert found["log_likelihoods"][text] == pytest.approx(choice.log_likelihood, abs=2e-4)
    with pytest.raises(UserError, match=r"prompts.jsonl:1: .* exceed the base's context of 1024"):
        script(*common, "--choices", f"a,{'b ' * 1000}", "--prompts", path, "--output", tmp_path / "x.jsonl")


def test_a_stopped_file_of_choices_goes_on(
    tiny_base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, partial = (tmp_path / name for name in ("prompts.txt", "out.jsonl", ".out.jsonl.partial"))
    path.write_text("".join(f"Say {number}.\n" for number in range(6)))
    common = ("--adapter", adapter, "--base", tiny_base, *CHOICES, "--batch_size", 1, "--prompts", path)
    script(*common, "--choices", "red,blue", "--output", tmp_path / "whole.jsonl")
    choose_batch = AdaptedLlama.choose_batch

    def interrupted(self: AdaptedLlama, tasks: Sequence[tuple[str, str]], **options: Any) -> Any:
        if len(tasks) < BATCHES_PER_GROUP:
            raise KeyboardInterrupt
        return choose_batch(self, tasks, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AdaptedLlama, "choose_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script(*common, "--choices", "red,blue", "--output", out)
    assert partial.read_bytes().count(b"\n") == 1 + BATCHES_PER_GROUP
    with pytest.raises(UserError, match="an unfinished run with other settings"):
        script(*common, "--choices", "red,green", "--output", out)
    script(*common, "--choices", "red,blue", "--output", out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--choices", "a"), "choices holds 1; expected two or more answers"),
        (("--choices", ""), "choices holds 0; expected two or more answers"),
        (("--choices", "a,,b"), "choices holds an empty answer"),
        (("--choices", "a,b, a"), "choices holds 'a' twice"),
        (("--choices", 'a,"b'), "--choices is .* expected answers as a,b,c"),
        (("--choices", "a,b", "--top_k", 3), "--top_k together with --choices has no meaning"),
        (("--choices", "a,b", "--compare"), "--compare together with --choices has no meaning"),
    ],
)
def test_mistakes_about_choices_are_told_in_one_line(argv: tuple[object, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        script("--adapter", "a", "--prompt", "x", *argv)


@pytest.mark.parametrize("column", ["instruction", "input", "output"])
@pytest.mark.parametrize("name", ["probabilities", "log_likelihoods"])
def test_a_column_that_the_numbers_would_overwrite_is_refused(column: str, name: str, tmp_path: Path) -> None:
    """Before anything is loaded: no file of these exists."""
    files = ("--adapter", tmp_path / "a", "--prompts", tmp_path / "p.jsonl", "--output", tmp_path / "o.jsonl")
    with pytest.raises(UserError, match=rf"^--columns\.{column} is '{name}', which --choices writes"):
        script(*files, "--choices", "a,b", f"--columns.{column}", name)
