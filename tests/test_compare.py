"""Runs side by side: read from their files, ordered, grouped over seeds, drawn."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from lit_adapter.cli.compare import main as compare_main
from lit_adapter.comparison.compare import compare
from lit_adapter.comparison.runs import read_runs
from lit_adapter.comparison.tables import metric_named, ordered
from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.training.finetune import finetune


def written(folder: Path, seed: int, lr: float, losses: list[float], **more: Any) -> Path:
    """A run folder with the files that a comparison reads."""
    folder.mkdir(parents=True)
    points = [{"step": 10 * place, "loss": loss} for place, loss in enumerate(losses)]
    lowest = min(points[1:], key=lambda point: point["loss"])
    record = {
        "format": 1,
        "status": "finished",
        "steps": {"planned": 20, "done": 20, "skipped": 0},
        "loss": {"train": losses[-1] / 2, "held_out": points, "lowest": lowest},
        "time": {"seconds": 90.0 * seed, "tokens": 1234, "tokens_per_s": 56.0},
        "memory": {"peak_bytes": 1_500_000_000},
        "adapter": {"parameters": 173_070},
        "device": {"type": "cpu", "name": "A CPU", "processes": 1, "precision": "32-true"},
        "config": {"out": str(folder), "seed": seed, "optim": {"lr": lr}, "trainer": {"samples": seed}},
    }
    (folder / "run.json").write_text(json.dumps(record | more))
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for step, loss in enumerate(losses):
            writer.add_scalar("loss/train", loss + 0.5, 10 * step)
    return folder


def cells(table: Any) -> dict[str, dict[str, str]]:
    """A table's rows by their first cell, by column."""
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    given = [
        ("a1", 1, 0.1, [3.0, 1.4, 1.2]),
        ("a2", 2, 0.1, [3.0, 1.0, 1.1]),
        ("b1", 1, 0.2, [3.0, 0.9, 2.0]),
    ]
    return [written(tmp_path / name, *rest) for name, *rest in given]


def test_runs_are_ordered_and_grouped_over_seeds(runs: list[Path]) -> None:
    """What changes no result, such as the number of samples, keeps no run out of its group."""
    results, grouped, settings, cost = compare(runs)[0]
    assert [row[0] for row in results.rows] == ["b1", "a2", "a1"]
    assert cells(results)["b1"] == {
        "run": "b1",
        "steps": "20",
        "train loss": "1.0000",
        "held-out: lowest": "0.9000",
        "at the end": "2.0000",
    }
    deviation = statistics.stdev([1.2, 1.0])
    assert cells(grouped)["optim.lr 0.1"]["held-out: lowest"] == f"1.1000 ± {deviation:.4f}"
    assert cells(grouped)["optim.lr 0.2"] == {
        "setting": "optim.lr 0.2",
        "runs": "1",
        "held-out: lowest": "0.9000",
        "at the end": "2.0000",
        "time": "2 min",
    }
    assert settings.header == ["run", "seed", "optim.lr", "trainer.samples"]
    assert cells(cost)["a2"]["peak memory"] == "1.50 GB"
    assert cells(cost)["a2"]["device"] == "A CPU, 32-true"


def test_results_of_evaluations_are_found_and_order_the_runs(runs: list[Path], tmp_path: Path) -> None:
    """Inside a run and in a folder of their own; each names the adapter by its path."""
    for place, (run, folder) in enumerate(
        zip(runs, (runs[0] / "eval", tmp_path / "e", tmp_path / "f"), strict=True)
    ):
        folder.mkdir()
        score = {"value": 0.5 + place / 10, "low": 0.4, "high": 0.9, "records": 100}
        adapter = run / "best.safetensors"  # as it was named then, perhaps from another working directory
        named = str(adapter.relative_to(tmp_path.parent)) if place == 1 else str(adapter)
        models = [{"name": "base", "adapter": None}, {"name": "x", "adapter": named}]
        found = {"models": models, "scores": {"x": {"exact": score}}, "metrics": {"exact": "exact match"}}
        (folder / "results.json").write_text(json.dumps(found))
    (results, grouped, *_), _ = compare([*runs, tmp_path / "e", tmp_path / "f"], by="exact")
    assert [row[0] for row in results.rows] == ["b1", "a2", "a1"]
    assert cells(results)["a2"]["exact match"] == "60.0% (40.0 to 90.0)"
    assert (
        cells(grouped)["optim.lr 0.1"]["exact match"] == f"55.0% ± {100 * statistics.stdev([0.5, 0.6]):.1f}%"
    )
    with pytest.raises(UserError, match="--by exakt: no run was evaluated by it; did you mean 'exact'"):
        compare([*runs, tmp_path / "e"], by="exakt")


def test_losses_on_other_records_are_not_ranked_together(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the seed chooses the held-out records; a setting's mean over the same sets can be compared."""
    for run in (*runs, written(runs[0].parent / "b2", 2, 0.2, [3.0, 1.3, 1.3])):
        record = json.loads((run / "run.json").read_text())
        record["data"] = {"held_out_sha256": f"hash {record['config']['seed']}"}
        (run / "run.json").write_text(json.dumps(record))
    (results, grouped, *_), notes = compare([*runs, runs[0].parent / "b2"])
    assert [row[0] for row in results.rows] == ["b1", "a1", "a2", "b2"]
    assert [row[3] for row in results.rows] == ["1", "1", "2", "2"]
    assert [(row[0], row[2]) for row in grouped.rows] == [("optim.lr 0.2", "1, 2"), ("optim.lr 0.1", "1, 2")]
    assert notes[0].startswith("the runs have 2 different sets of held-out records")
    assert compare_main([*map(str, runs)]) == 0
    assert "note: the runs have 2 different sets" in capsys.readouterr().out


def test_tasks_and_plain_text_of_evaluations_are_compared(runs: list[Path], tmp_path: Path) -> None:
    for place, run in enumerate(runs[:2]):
        score = {"value": 0.5 + 0.1 * place, "stderr": 0.05}
        perplexity = {"value": 30.0 - place, "stderr": None}
        found = {
            "models": [{"name": "x", "adapter": str(run / "adapter.safetensors")}],
            "tasks": {
                "arc": {"acc": {"x": score, "base": score}},
                "text": {"word_perplexity": {"x": perplexity}},
            },
            "plain": {"x": {"tokens": 9, "perplexity": 20.0 + place, "bits_per_byte": 1.0}},
        }
        (run / "evaluation").mkdir()
        (run / "evaluation" / "results.json").write_text(json.dumps(found))
    read = read_runs(runs[:2])
    first = {metric.title: score for metric, score in read[0].scores.items()}
    assert first["arc, acc"] == pytest.approx({"value": 0.5, "low": 0.402, "high": 0.598})
    assert first["text, word_perplexity"] == {"value": 30.0}
    assert first["plain text, perplexity"] == {"value": 20.0}
    for name, best in (("arc, acc", 1), ("text, word_perplexity", 1), ("plain text, perplexity", 0)):
        assert ordered(read, metric_named(read, name))[0] is read[best]


def test_scores_on_several_sets_of_records_have_columns_of_their_own(
    runs: list[Path], tmp_path: Path
) -> None:
    for place, (run, data) in enumerate(
        zip([*runs[:2], runs[0]], ("x.json", "x.json", "y.json"), strict=True)
    ):
        folder = tmp_path / f"evaluation-{place}"
        folder.mkdir()
        score = {"value": 0.5 + place / 10, "low": 0.4, "high": 0.9, "records": 100}
        found = {
            "models": [{"name": "x", "adapter": str(run / "adapter.safetensors")}],
            "scores": {"x": {"exact": score}},
            "metrics": {"exact": "exact match"},
            "data": {"sha256": f"hash of {data}", "source": f"~/{data}"},
        }
        (folder / "results.json").write_text(json.dumps(found))
    given = [*runs, *(tmp_path / f"evaluation-{place}" / "results.json" for place in range(3))]
    (results, *_), _ = compare(given, by="exact on x.json")
    assert [row[0] for row in results.rows] == ["a2", "a1", "b1"]
    assert cells(results)["a1"]["exact match on x.json"] == "50.0% (40.0 to 90.0)"
    assert cells(results)["a1"]["exact match on y.json"] == "70.0% (40.0 to 90.0)"
    assert cells(results)["a2"]["exact match on y.json"] == "-"
    several = "--by exact: runs were evaluated on several sets; expected exact on x.json or exact on y.json"
    with pytest.raises(UserError, match=several):
        compare(given, by="exact")


def test_the_score_of_the_adapter_at_the_end_stands_before_that_of_the_best(
    runs: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "e").mkdir()
    models = [{"name": n, "adapter": str(runs[0] / f"{n}.safetensors")} for n in ("adapter", "best")]
    scores = {"adapter": {"own:f": {"value": 3.0}}, "best": {"own:f": {"value": 4.0}}}
    (tmp_path / "e" / "results.json").write_text(json.dumps({"models": models, "scores": scores}))
    (results, *_), _ = compare([runs[0], tmp_path / "e"], by="own:f")
    assert cells(results)["a1"]["own:f"] == "3"


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else_and_draws_every_run_once_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eighteen runs are told apart by colour and dashes."""
    runs = [written(tmp_path / f"<r{n}>", n, 0.1, [3.0, 2.0 + n / 50, 1.0]) for n in range(1, 19)]
    html = tmp_path / "page.html"
    assert compare_main([*map(str, runs), "--html", str(html)]) == 0
    assert f"wrote {html}" in capsys.readouterr().out
    text = html.read_text()
    assert "<r1>" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    lines = [of for tag, of in Page(text).tags if tag == "polyline"]
    assert len(lines) == 2 * 18
    assert len({(line["stroke"], line["stroke-dasharray"]) for line in lines}) == 18


def test_a_real_run_is_read(tiny: Callable[..., Config]) -> None:
    config = tiny("--optim.max_steps", "2", "--trainer.samples", "0", "--trainer.log_every", "1", out="run")
    assert finetune(config, say=lambda line: None) == 0
    (results, cost), notes = compare([Path(config.out, "adapter.safetensors")])
    assert notes == []
    assert cells(results)["run"]["steps"] == "2"
    assert float(cells(results)["run"]["held-out: lowest"]) > 0
    assert float(cells(cost)["run"]["peak memory"].split()[0]) > 0.05


def test_what_a_record_lacks_is_unknown(runs: list[Path]) -> None:
    record = json.loads((runs[0] / "run.json").read_text())
    (runs[0] / "run.json").write_text(
        json.dumps({"config": record["config"], "status": "running", "loss": None})
    )
    (results, *_), _ = compare(runs)
    assert results.rows[-1] == ["a1 (running)", "-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"run\.json:1:2: not valid JSON"),
        ("[]", r"run\.json: not a run record: it holds no configuration"),
        ('{"config": 1}', r"run\.json: not a run record: it holds no configuration"),
    ],
)
def test_a_damaged_record_is_named(runs: list[Path], text: str, message: str) -> None:
    (runs[1] / "run.json").write_text(text)
    with pytest.raises(UserError, match=message):
        compare(runs)


def test_folders_that_are_no_runs_are_named(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"empty: no run.json of a run and no results.json of an evaluation there"
    ):
        compare([*runs, tmp_path / "empty"])
    with pytest.raises(UserError, match="a1: is named twice"):
        compare([runs[0], tmp_path / "x" / ".." / "a1"])
    (tmp_path / "empty" / "results.json").write_text('{"models": 3}')
    with pytest.raises(UserError, match="empty: is an evaluation; name at least one run folder too"):
        compare([tmp_path / "empty"])
    with pytest.raises(UserError, match=r"results.json: not the results of an evaluation"):
        compare([*runs, tmp_path / "empty"])
