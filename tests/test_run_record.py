"""run.json: what it says of whole, stopped, resumed, failed and diverged runs; and a run's last lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_runs import Stopper

from lit_adapter.cli.finetune import parse_finetune
from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.training import module
from lit_adapter.training.finetune import finetune
from lit_adapter.training.notices import Notices
from lit_adapter.weights.adapter_file import read_adapter

SHORT = ("--optim.max_steps", "3", "--trainer.val_every", "1", "--trainer.samples", "0")


def record(config: Config) -> dict[str, Any]:
    path = Path(config.out) / "run.json"
    return dict(json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")))


@pytest.mark.slow
def test_a_whole_and_a_stopped_run_say_the_same(tiny: Callable[..., Config], tiny_records: Path) -> None:
    """Also the tokens and the held-out losses; the stopped run's time goes on where it stopped."""
    whole, stopped = tiny(*SHORT, out="whole"), tiny(*SHORT, out="stopped")
    assert finetune(whole, say=Stopper()) == 0
    assert finetune(stopped, say=Stopper("step 2/")) == 143
    early = record(stopped)
    assert (early["status"], early["steps"]) == ("stopped", {"planned": 3, "done": 2, "skipped": 0})
    assert [point["step"] for point in early["loss"]["held_out"]] == [0, 1]
    assert finetune(stopped, resume="last", say=Stopper()) == 0
    one, two = record(whole), record(stopped)
    for key in ("format", "status", "steps", "epochs", "loss", "data", "base", "adapter", "device"):
        assert one[key] == two[key], key
    assert (one["format"], one["status"], two["time"]["starts"]) == (1, "finished", 2)
    assert one["time"]["tokens"] == two["time"]["tokens"]
    assert two["time"]["seconds"] > early["time"]["seconds"] >= early["time"]["step_seconds"] > 0
    assert two["time"]["step_seconds"] > early["time"]["step_seconds"]
    info, state = read_adapter(Path(whole.out) / "adapter.safetensors")
    assert one["loss"]["train"] == info.training["train_loss"]
    assert one["loss"]["held_out"][-1] == {"step": 3, "loss": info.training["val_loss"]}
    best = read_adapter(Path(whole.out) / "best.safetensors")[0].training
    assert one["loss"]["lowest"] == {"step": best["steps"], "loss": best["val_loss"]}
    assert one["adapter"]["parameters"] == sum(tensor.numel() for tensor in state.values())
    assert one["data"]["train_records"] + one["data"]["held_out_records"] == 48
    assert one["epochs"] == pytest.approx(3 / 5)
    path = Path(whole.out) / "config.json"  # a configuration is JSON too
    path.write_text(json.dumps(one["config"]))
    assert parse_finetune(["--config", str(path)]).config == whole


def test_a_run_that_goes_on_says_so_and_one_that_fails_too(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run leaves what it said last; without a loss there is no number in the file."""
    config, seen = tiny(*SHORT, "--optim.max_bad_steps", "2"), []
    nan = np.float32("nan")
    sound = module.row_loss
    monkeypatch.setattr(module, "row_loss", lambda *args, **options: sound(*args, **options) * nan)

    def say(line: str) -> None:
        if line.startswith("step 1/"):
            seen.append(record(config)["status"])

    with pytest.raises(UserError, match="skipped 2 steps in a row"):
        finetune(config, say=say)
    failed = record(config)
    assert [*seen, failed["status"]] == ["running", "failed"]
    assert failed["steps"] == {"planned": 3, "done": 2, "skipped": 2}
    assert failed["loss"] == {
        "train": None,
        "held_out": [{"step": n, "loss": None} for n in (0, 1)],
        "lowest": None,
    }


def test_a_refused_resume_leaves_the_record(tiny: Callable[..., Config]) -> None:
    config = tiny(*SHORT)
    assert finetune(config, say=Stopper("step 1/")) == 143
    before = record(config)
    with pytest.raises(UserError, match="seed was"):
        finetune(tiny(*SHORT, "--seed", "3"), resume="last", say=Stopper())
    assert record(config) == before


def test_the_last_lines_say_which_file_to_use(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file where the last step has the lowest loss, else two; a warning if it diverged."""
    losses = {
        "one": [3.0, 2.0, 1.0, 0.5],
        "two": [3.0, 1.0, 2.0, 2.5],
        "even": [3.0, 1.001, 2.0, 1.004],
        "diverged": [3.0, 2.0, 4.0, 5.0],
        "worse": [3.0, 6.0, 5.0, 4.0],
    }
    ends, statuses = {}, {}
    for name, curve in losses.items():
        left = iter(curve)

        def measured(self: Any, left: Any = left) -> None:
            self.validated_step, self.val_loss = self.trainer.global_step, next(left)

        monkeypatch.setattr(module.LitAdapter, "on_validation_epoch_end", measured)
        lines, config = Stopper(), tiny(*SHORT, out=name)
        assert finetune(config, say=lines) == 0
        ends[name] = lines.lines[next(n for n, x in enumerate(lines.lines) if x.startswith("wrote")) :]
        statuses[name] = record(config)["status"]
    assert statuses == dict.fromkeys(("one", "two", "even"), "finished") | dict.fromkeys(
        ("diverged", "worse"), "diverged"
    )
    assert ends["worse"][0].endswith("in all; held-out loss 4.0000")
    assert len(ends["one"]) == 1
    assert ends["one"][0].endswith(
        "; held-out loss 0.5000, the lowest of the run: best.safetensors is the same"
    )
    assert ends["two"][0].endswith("in all; held-out loss 2.5000")
    best = "use best.safetensors (step 1, held-out loss 1.0000, the lowest) for free text; for labels"
    assert ends["two"][1].startswith(best)
    assert "adapter.safetensors is usually as good" in ends["two"][1]
    assert ends["even"][1] == (
        "use adapter.safetensors or best.safetensors (step 1, held-out loss 1.0010, the lowest): "
        "to two decimals their held-out losses are the same"
    )
    assert "the held-out loss ended at 5.0000, above the 3.0000 it began with" in ends["diverged"][1]
    assert ends["diverged"][1].startswith("warning: the run diverged: ")
    assert ends["diverged"][1].endswith(
        "; best.safetensors (step 1, held-out loss 2.0000, the lowest) is better"
    )
    assert [len(end) for end in ends.values()] == [1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("training", "held_out", "skipped", "says"),
    [
        ([3.0, 9.0], [3.0, 9.0], 0, r"held-out loss ended at 9.*lower optim\.lr \(now 0\.02\)$"),
        ([3.0, 0.1], [3.0, 3.2], 0, r"the training loss fell: lower optim\.epochs, or add records$"),
        ([3.0, 1.0], [3.0, float("nan")], 0, r"ended at nan, above"),
        ([3.0, 9.0], [], 0, r"training loss ended at 9\.0000, above the 3\.0000"),
        ([3.0, 2.9], [3.0, 2.0], 21, r"21 of 40 steps were skipped .*lower optim\.lr"),
        ([3.0, 2.9], [3.0, 2.0], 20, None),
        ([3.0, 3.1], [], 0, None),
        ([3.0, 3.0], [3.0, 3.0001], 0, None),
    ],
)
def test_a_run_that_ends_worse_than_it_began_is_recognised(
    training: list[float], held_out: list[float], skipped: int, says: str | None
) -> None:
    notices = Notices(lambda line: None, lr=0.02)
    for step in range(1, 41):
        notices.step(training[step > 20], 1.0, step)
    if held_out:
        notices.held_out(held_out[0], 0)
    text = notices.divergence(held_out[-1] if held_out else float("nan"), skipped, 40)
    assert (text is None) if says is None else re.search(says, text or ""), text
