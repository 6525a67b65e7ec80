"""Model cards with an evaluation: the Hub's metadata, a table, and plots beside the card."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from generation_fixtures import save_random_adapter
from hub_stand_in import Hub
from huggingface_hub import ModelCard
from test_adapter_hub import push

from lit_adapter.cli.push import main as push_main
from lit_adapter.errors import UserError
from lit_adapter.evaluation.card import evaluated
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
