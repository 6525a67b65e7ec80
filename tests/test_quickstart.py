"""The quickstart without its download: a run that was stopped goes on, and is scored at its end."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from finetune_runs import TINY, Stopper
from generation_fixtures import save_random_adapter

from lit_adapter import quickstart
from lit_adapter.cli.finetune import parse_finetune
from lit_adapter.data import demo
from lit_adapter.files.read import read_json
from lit_adapter.files.write import write_json
from lit_adapter.training import finetune as training
from lit_adapter.weights import download

Quickstart = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Quickstart:
    """The quickstart's exit status and lines; it is stopped when a line starts with ``stop``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "download", lambda name, base: base)
    monkeypatch.setattr(demo, "write", partial(demo.write, n_train=16, n_val=8))
    data = ["--data.train", "out/demo-data/train.json", "--data.val", "out/demo-data/val.json"]
    words = ["--config", TINY, "--base", tiny_base, "--out", "out/quick", *data]
    config = parse_finetune([*map(str, words), "--optim.epochs", "1", "--trainer.samples", "0"]).config
    finetune = training.finetune

    def started(seed: int = 0, stop: str = "never") -> tuple[int, list[str]]:
        said = Stopper(stop)
        monkeypatch.setattr(quickstart, "say", said)

        def report(adapter: Path, *unused: object) -> None:
            said(f"scored {adapter}")
            adapter.with_name("report.html").touch()

        monkeypatch.setattr(quickstart, "report", report)
        monkeypatch.setattr(training, "finetune", partial(finetune, say=said))
        return quickstart.quickstart(config, seed), said.lines

    return started


def test_the_same_command_continues_a_run_that_was_stopped(run: Quickstart) -> None:
    status, lines = run(stop="step 1/")
    assert status == 143
    assert lines[-1].endswith("step-0000001.ckpt; the same command continues, and scores the adapter")
    assert not any("--resume" in line for line in lines)
    status, lines = run()
    assert (status, lines[-1]) == (0, "scored out/quick/adapter.safetensors")
    assert "out/quick holds a run that was stopped; continuing it" in lines
    assert any(line.startswith("resuming from out/quick/checkpoints/step-0000001.ckpt") for line in lines)
    Path("out/quick/report.html").unlink()  # as if it had been stopped while it was scored
    status, lines = run()
    assert (status, lines[-1]) == (0, "scored out/quick/adapter.safetensors")
    assert lines[-2] == "out/quick: already complete, 2 steps; nothing to do"
    assert sorted(path.name for path in Path("out").iterdir()) == ["demo-data", "quick"]


def test_the_report_says_where_it_is_and_how_to_go_on(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_random_adapter(tiny_base, tmp_path / "adapter.safetensors")
    held_out = tmp_path / "val.json"
    rows = [
        {"instruction": "Say it.", "input": word, "output": f'{{"a":"{word}"}}'} for word in ("red", "blue")
    ]
    write_json(held_out, rows)
    quickstart.report(adapter, tiny_base, held_out, 0.0)
    shown = capsys.readouterr().out
    assert re.search(r"exact match\W+0\.0%\W+0\.0%", shown)
    assert shown.count("request   ") == 2
    assert f"Report: {tmp_path / 'report.html'}" in shown
    assert f"scripts/generate.py --adapter {adapter} --prompt" in shown
    assert f"scripts/chat.py --adapter {adapter} --system" in shown
    found = read_json(tmp_path / "results.json")["scores"]
    assert found["base"]["json_exact"]["value"] == 0.0
    assert "Evaluation of" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_complete_run_and_one_of_other_data_are_left_alone(run: Quickstart) -> None:
    assert run()[1][-1] == "scored out/quick/adapter.safetensors"
    before = Path("out/quick/adapter.safetensors").read_bytes()
    assert run(stop="step 1/")[0] == 143
    assert Path("out/quick/adapter.safetensors").read_bytes() == before
    assert not Path("out/quick-2/adapter.safetensors").exists()
    status, lines = run(seed=1)
    assert status == 0
    assert any("quick-2/" in line and "cannot resume another run" in line for line in lines)
    assert lines[-1] == "scored out/quick-3/adapter.safetensors"
    assert not Path("out/quick-2/adapter.safetensors").exists()
