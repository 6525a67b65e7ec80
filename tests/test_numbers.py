"""NaN losses are skipped, counted and named; runs that do not learn are warned about once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from finetune_runs import Stopper, arguments
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm_runs import Run, spoil_loss, two_ranks

from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.generation import lane
from lit_adapter.model.attention import PackedRow
from lit_adapter.text.load import load_tokenizer
from lit_adapter.training import module
from lit_adapter.training.checkpoint import read_checkpoint
from lit_adapter.training.finetune import finetune
from lit_adapter.training.notices import Notices

EVERYWHERE = 0
"""The token that every record starts with."""


BAD = 5
"""The record that alone holds a tilde."""


@pytest.fixture
def one_bad(tiny_records: Path, tmp_path: Path) -> Path:
    """The tiny records, a tilde in the answer of one."""
    records = json.loads(tiny_records.read_text())
    records[BAD]["output"] += " ~"
    path = tmp_path / "one_bad.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def tilde(base: Path) -> int:
    return load_tokenizer(base).encode("~")[-1]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give rows that hold a token a loss of NaN."""
    sound = module.row_loss

    def spoil(token: int) -> None:
        def row_loss(model: torch.nn.Module, row: PackedRow, **options: bool) -> torch.Tensor:
            return sound(model, row, **options) * (float("nan") if (row.ids == token).any() else 1.0)

        monkeypatch.setattr(module, "row_loss", row_loss)

    return spoil


def finite(out: Path) -> bool:
    """Whether every adapter value in a run folder is finite."""
    states = [load_file(path) for path in out.glob("*.safetensors")]
    states += [read_checkpoint(path)["state_dict"] for path in out.glob("checkpoints/*.ckpt")]
    assert states
    return all(bool(tensor.isfinite().all()) for state in states for tensor in state.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_skip_the_same_steps_as_one(tiny_base: Path, one_bad: Path, tmp_path: Path) -> None:
    """One record is bad; only one of the processes computes its row."""
    cache = {"LIT_ADAPTER_CACHE": str(tmp_path / "cache")}
    spoil = partial(spoil_loss, tilde(tiny_base))
    options = ["--data.val", str(one_bad), "--trainer.samples", "0", "--optim.epochs", "2"]
    one = Run(arguments(tiny_base, one_bad, tmp_path / "one", *options), tmp_path / "log", cache, spoil)
    assert one.wait() == 0, one.output
    command = arguments(tiny_base, one_bad, tmp_path / "two", *options)
    both = two_ranks(command, tmp_path / "log", cache, (spoil, spoil))
    for run in both:
        assert run.wait() == 0, run.output
    skipped = re.findall(r"step (\d+) skipped: loss nan", one.output)
    assert len(skipped) == 2  # once an epoch
    assert re.findall(r"step (\d+) skipped: loss nan", both[0].output) == skipped
    assert "2 of 12 steps were skipped" in both[0].output
    for out in (tmp_path / "one", tmp_path / "two"):
        assert finite(out)
        assert not (out / "best.safetensors").exists()  # no held-out loss was finite
    alone, together = (load_file(tmp_path / out / "adapter.safetensors") for out in ("one", "two"))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_samples_with_nan_logits_do_not_end_a_run(
    tiny: Callable[..., Config], tiny_records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps whose loss is none have a rule of their own; in TensorBoard the answer is missing."""
    monkeypatch.setattr(lane, "choose", lambda logits, *_: torch.full((len(logits),), -1))
    config = tiny("--data.val", str(tiny_records), "--trainer.samples", "1", "--optim.max_steps", "2")
    assert finetune(config, say=Stopper()) == 0
    events = EventAccumulator(str(Path(config.out) / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    (tag,) = (tag for tag in events.Tags()["tensors"] if tag.startswith("samples/0"))
    assert b"logits are NaN or infinite" in events.Tensors(tag)[-1].tensor_proto.string_val[0]


@pytest.mark.slow
def test_two_processes_stop_with_one_message(tiny_base: Path, tiny_records: Path, tmp_path: Path) -> None:
    cache = {"LIT_ADAPTER_CACHE": str(tmp_path / "cache")}
    command = arguments(tiny_base, tiny_records, tmp_path / "run", "--trainer.samples", "0")
    spoil = partial(spoil_loss, EVERYWHERE)
    first, second = two_ranks(command, tmp_path / "log", cache, (spoil, spoil))
    assert first.wait() == 2, first.output
    assert [line for line in first.output.splitlines() if "error" in line] == [first.output.splitlines()[-1]]
    assert "skipped 5 steps in a row" in first.output
    second.process.join(30)  # under a launcher it would be ended with the first
    assert finite(tmp_path / "run")


def test_the_run_stops_and_names_the_records(
    tiny: Callable[..., Config], tiny_base: Path, one_bad: Path, poison: Callable[[int], None]
) -> None:
    """Every step holds all the records, one of which is bad."""
    poison(tilde(tiny_base))
    options = ["--data.train", str(one_bad), "--data.val_size", "0", "--optim.batch_size", "48"]
    config = tiny(*options, "--optim.max_steps", "9")
    with pytest.raises(UserError) as caught:
        finetune(config, say=Stopper())
    assert str(caught.value).startswith("step 5: loss nan, gradient norm nan; skipped 5 steps in a row")
    assert f"the loss is not finite in {one_bad}:{BAD + 1} (loss nan); check those records" in str(
        caught.value
    )
    assert finite(Path(config.out))


def test_the_count_of_skipped_steps_survives_a_resume(
    tiny: Callable[..., Config], poison: Callable[[int], None]
) -> None:
    poison(EVERYWHERE)
    assert finetune(tiny(), say=Stopper("step 3/")) == 143
    with pytest.raises(UserError, match=r"step 5: .*5 steps in a row"):
        finetune(tiny(), resume="last", say=Stopper())


@pytest.mark.slow
def test_what_does_not_learn_is_said_once(tiny: Callable[..., Config]) -> None:
    """Updates that no fp32 number feels: the gates stay 0 and the loss stays; also across a resume."""
    options = ["--optim.lr", "1e-30", "--optim.eps", "1e30", "--optim.max_steps", "26"]
    first, second = Stopper("step 21/"), Stopper()
    assert finetune(tiny(*options), say=first) == 143
    assert finetune(tiny(*options), resume="last", say=second) == 0
    said = [line for line in first.lines + second.lines if line.startswith("warning")]
    warnings = [line for line in said if "may be too few" not in line]  # that is said at each start
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: every gate is still 0 after 10 steps")
    assert "raise optim.lr (now 1e-30)" in warnings[0]
    assert re.match(r"warning: the held-out loss is \S+, where it started, after 20 steps", warnings[1])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--optim.lr", "0"], "the learning rate is 0, so nothing will be learned; set optim.lr"),
        (["--optim.warmup", "8"], "the warm-up takes 8 of the run's 12 steps; lower optim.warmup"),
    ],
)
def test_settings_that_keep_a_run_from_learning(
    tiny: Callable[..., Config], options: list[str], text: str
) -> None:
    lines = Stopper()
    finetune(tiny("--optim.max_steps", "12", *options), say=lines)
    warnings = [line for line in lines.lines if line.startswith("warning")]
    assert len(warnings) == 1
    assert text in warnings[0]


def test_a_training_loss_that_stays_is_noticed_without_held_out_records() -> None:
    for fall, count in ((0.0, 1), (0.1, 0)):
        lines: list[str] = []
        notices = Notices(lines.append, lr=1e-3)
        for step in range(1, 201):
            notices.step(3.0 + 0.3 * (-1) ** step - fall * step / 200, 1.0, step)
        notices.end(200)
        assert len(lines) == count
    assert notices.state()["said"] == []


def test_one_shut_layer_is_named() -> None:
    lines: list[str] = []
    notices = Notices(lines.append, lr=1e-3)
    notices.gates({5: True, 6: False, 7: True}, step=10)
    notices.gates({5: True, 6: False, 7: True}, step=20)
    assert len(lines) == 1
    assert "the gates of layers 6 are still 0 after 10 steps" in lines[0]
