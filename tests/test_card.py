"""Model cards with an evaluation: the Hub's metadata, a table, and plots beside the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from generation_fixtures import save_random_adapter
from hub_stand_in import Hub
from huggingface_hub import EvalResult, ModelCard
from local_tasks import write_tasks
from test_adapter_hub import push

from lit_adapter.cli.push import main as push_main
from lit_adapter.errors import UserError
from lit_adapter.evaluation.card import evaluated
from lit_adapter.evaluation.evaluate import evaluate
from lit_adapter.evaluation.settings import Evaluation
from lit_adapter.weights.adapter_hub import push_adapter


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    return save_random_adapter(tiny_base, tmp_path / "adapter.safetensors")


def evaluated_run(adapter: Path) -> None:
    """Put an evaluation and the record of a run beside an adapter."""
    score = {"value": 0.9, "low": 0.85, "high": 0.94, "records": 100}
    loss = {"value": 1.25, "low": 1.2, "high": 1.3, "records": 100}
    found = {
        "models": [{"name": "base", "adapter": None}, {"name": "mine", "adapter": str(adapter)}],
        "data": {"source": "/home/me/held.json", "records": 100},
        "metrics": {"exact": "exact match"},
        "scores": {
            "base": {"exact": {**score, "value": 0.1, "low": 0.05, "high": 0.2}},
            "mine": {"exact": score, "loss": loss},
        },
    }
    (adapter.parent / "eval").mkdir()
    (adapter.parent / "eval" / "results.json").write_text(json.dumps(found))
    points = [{"step": 0, "loss": 3.0}, {"step": 10, "loss": 1.25}]
    (adapter.parent / "run.json").write_text(json.dumps({"loss": {"held_out": points}}))


def test_the_card_holds_the_evaluation_as_metadata_table_and_plots(adapter: Path) -> None:
    """The Hub's own reader finds the metrics."""
    evaluated_run(adapter)
    told = evaluated(adapter)
    text = str(push_adapter(adapter, "me/x", evaluated=told, dry_run=True)[1])
    results = {one.metric_type: one for one in ModelCard(text).data.eval_results}
    assert results["exact"].metric_value == 0.9
    assert results["exact"].metric_name == "exact match"
    assert results["loss"].dataset_name == "held.json"
    assert "| exact match | 10.0% (5.0 to 20.0) | 90.0% (85.0 to 94.0) |" in text
    assert "/home/me" not in text
    assert set(told.files) == {"loss.svg", "scores.svg"}
    for name, content in told.files.items():
        assert f"]({name})" in text
        drawn = ElementTree.fromstring(content)
        assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
        assert b"var(" not in content
    assert b"held out" in told.files["loss.svg"]


def measured(adapter: Path, folder: str, **found: Any) -> None:
    """Put an evaluation of an adapter, beside base and another adapter, into its run folder."""
    names = {"base": None, "mine": str(adapter), "other": "elsewhere/adapter.safetensors"}
    models = [{"name": name, "adapter": path} for name, path in names.items()]
    (adapter.parent / folder).mkdir()
    (adapter.parent / folder / "results.json").write_text(json.dumps({"models": models, **found}))


def results_of(adapter: Path, folder: Path | None = None) -> tuple[dict[tuple[str, str], EvalResult], str]:
    """What the Hub's own reader finds on the card by data set and metric's name, and the card."""
    told = evaluated(adapter, folder)
    text = str(push_adapter(adapter, "me/x", evaluated=told, dry_run=True)[1])
    found = ModelCard(text).data.eval_results or []
    by_metric = {(one.dataset_name, str(one.metric_name)): one for one in found}
    assert len(by_metric) == len(found)
    return by_metric, text


def on_tasks(value: float, **run: Any) -> dict[str, Any]:
    """Results of two tasks; the second has not been finished by the adapter."""
    other = {"other": {"value": 0.77, "stderr": 0.01}, "base": {"value": 0.25, "stderr": 0.02}}
    mine = {"mine": {"value": value, "stderr": None}}
    match = {"exact_match (flexible-extract)": {**other, **mine}}
    return {"tasks": {"arc|easy": {"acc": {**other, **mine}, **match}, "piqa": {"acc": other}}, "run": run}


def test_the_card_holds_tasks_and_plain_text_beside_the_records(adapter: Path) -> None:
    """From several evaluations, what each has measured of this adapter, and of a task what has no limit."""
    evaluated_run(adapter)
    measured(adapter, "later", **on_tasks(0.5, limit=40, few_shot=5, chat_template=True))
    measured(adapter, "latest", **on_tasks(0.6))
    plain = {
        "base": {"tokens": 1200, "perplexity": 9.25, "bits_per_byte": 1.5},
        "mine": {"tokens": 1200, "perplexity": 8.125, "bits_per_byte": 1.25},
    }
    about = {"source": "~/books/plain.txt", "sha256": "0" * 64}
    measured(adapter, "text", plain=plain, plain_text=about)
    results, text = results_of(adapter)
    assert {name for name, _ in results} == {"held.json", "arc|easy", "plain.txt"}
    task = results["arc|easy", "acc"]
    assert (task.task_type, task.metric_type, task.metric_value) == ("text-generation", "acc", 0.6)
    assert results["arc|easy", "exact_match (flexible-extract)"].metric_type == "exact_match"
    assert results["plain.txt", "perplexity"].metric_value == 8.125
    assert results["plain.txt", "bits per byte"].metric_type == "bits_per_byte"
    assert "| arc\\|easy, acc | 0.25 ± 0.02 | 0.6 |" in text
    assert "On 1,200 tokens of the plain text `plain.txt`." in text
    assert "| bits per byte | 1.5 | 1.25 |" in text
    assert "0.77" not in text
    assert text.count("## Evaluation") == 1
    assert "books" not in text

    results, text = results_of(adapter, adapter.parent / "later")
    assert {name for name, _ in results} == {"arc|easy"}
    arguments = {"limit": 40, "num_few_shot": 5, "chat_template": True}
    assert results["arc|easy", "acc"].dataset_args == arguments
    assert "the first 40 questions of each, 5 examples before each question, in the base's chat" in text


def test_no_examples_before_a_question_are_told_too(adapter: Path) -> None:
    measured(adapter, "bare", **on_tasks(0.5, limit=None, few_shot=0, chat_template=False))
    results, text = results_of(adapter)
    assert results["arc|easy", "acc"].dataset_args == {"num_few_shot": 0}
    assert "0 examples before each question" in text


def test_what_a_card_could_not_tell_apart_or_is_of_an_earlier_state_is_left_out(adapter: Path) -> None:
    """A second file of the same name, with other scores; and an evaluation before the adapter changed."""
    for folder, source, value in (("a", "held.json", 0.5), ("b", "~/other/held.json", 0.25)):
        score = {"value": value, "low": 0.0, "high": 1.0}
        scores = {"base": {"exact": score}, "mine": {"exact": score}}
        measured(adapter, folder, scores=scores, data={"source": source, "records": 8})
    results, text = results_of(adapter)
    assert [(name, one.metric_value) for (name, _), one in results.items()] == [("held.json", 0.5)]
    assert "50.0%" in evaluated(adapter).files["scores.svg"].decode()
    assert "25" not in text.partition("## Evaluation")[2]

    path = adapter.parent / "a" / "results.json"
    found = json.loads(path.read_text())
    found["models"][1]["sha256"] = "0" * 64
    path.write_text(json.dumps(found))
    assert [one.metric_value for one in results_of(adapter)[0].values()] == [0.25]
    with pytest.raises(UserError, match="or an earlier state of it"):
        evaluated(adapter, path.parent)


def test_a_card_shows_what_an_evaluation_of_tasks_and_text_has_written(
    tiny_base: Path, tmp_path: Path
) -> None:
    adapter = save_random_adapter(tiny_base, tmp_path / "run" / "adapter.safetensors")
    tasks, plain = write_tasks(tmp_path), tmp_path / "plain.txt"
    plain.write_text("red green blue " * 9)
    settings = Evaluation(
        out=tmp_path / "run" / "evaluation",
        adapters=(adapter,),
        base=tiny_base,
        tasks=(str(tasks["choice"]),),
        plain=plain,
        limit=4,
        device="cpu",
        dtype="float32",
    )
    written = evaluate(settings, lambda line: None)
    results, _ = results_of(adapter)
    wanted = {
        ("choice", metric): by_model["run"]["value"]
        for metric, by_model in written["tasks"]["choice"].items()
    }
    wanted["plain.txt", "perplexity"] = written["plain"]["run"]["perplexity"]
    wanted["plain.txt", "bits per byte"] = written["plain"]["run"]["bits_per_byte"]
    assert {key: one.metric_value for key, one in results.items()} == wanted
    assert len(wanted) > 3


def test_an_adapter_that_was_not_evaluated_has_a_card_without_scores(adapter: Path) -> None:
    told = evaluated(adapter)
    assert (told.results, told.section, told.files) == ([], "", {})
    evaluated_run(adapter)
    other = adapter.with_name("other.safetensors")
    other.write_bytes(adapter.read_bytes())
    assert evaluated(other).results == []
    with pytest.raises(UserError, match=r"results.json: evaluates other adapters than .*other.safetensors"):
        evaluated(other, adapter.parent / "eval")
    results = adapter.parent / "eval" / "results.json"
    results.write_text('{"models": [], "tasks": {}}')
    assert evaluated(adapter).results == []
    with pytest.raises(UserError, match=r"results.json: not the results of an evaluation on records"):
        evaluated(adapter, results.parent)
    results.write_text("[]")
    with pytest.raises(UserError, match=r"results.json: not the results of an evaluation"):
        evaluated(adapter)


def test_plots_are_pushed_with_the_card_that_shows_them(
    tmp_path: Path, hub: type[Hub], adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated_run(adapter)
    assert push_main([str(adapter), "me/x", "--dry-run"]) == 0
    assert "loss.svg" in capsys.readouterr().out
    with pytest.raises(UserError, match="--card and --results are both given"):
        push_main([str(adapter), "me/x", "--card", "a", "--results", "b"])
    assert push(tmp_path, hub, adapter, "me/x").returncode == 0
    kept = {path.name: path.read_bytes() for path in hub.repositories["me/x"].iterdir()}
    assert {"README.md", "adapter.safetensors", "loss.svg", "scores.svg"} == kept.keys()
    assert kept["loss.svg"] == evaluated(adapter).files["loss.svg"]
