"""How long a run is and when it validates where the user has not said; also when such a run is resumed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_runs import Stopper
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_adapter.cli.finetune import parse_finetune
from lit_adapter.config import Config, OptimConfig, with_learning_rate
from lit_adapter.training.checkpoint import DurableCheckpointIO, read_checkpoint
from lit_adapter.training.finetune import finetune
from lit_adapter.training.length import (
    chosen_batch_size,
    chosen_epochs,
    few_steps,
    with_length,
    with_val_every,
)
from lit_adapter.training.run_identity import RunIdentity
from lit_adapter.weights.adapter_file import read_adapter

UNSET = ("--optim.epochs", "null", "--optim.batch_size", "null")


@pytest.mark.parametrize(
    ("records", "batch", "epochs"),
    [
        (3, 3, 8),
        (50, 4, 8),
        (100, 4, 4),
        (225, 4, 3),
        (500, 8, 3),
        (1000, 16, 3),
        (2000, 32, 3),
        (52_000, 64, 3),
    ],
)
def test_the_chosen_length_makes_a_hundred_steps_within_its_bounds(
    records: int, batch: int, epochs: float
) -> None:
    assert chosen_batch_size(records) == batch
    assert chosen_epochs(records, batch) == epochs
    steps = epochs * (records // batch)
    assert steps >= 100 or (epochs == 8 and batch <= 4)
    assert batch in (4, 64) or 3 * (records // (2 * batch)) < 100


def test_a_setting_that_is_given_leaves_the_other_to_be_chosen() -> None:
    assert chosen_epochs(225, 32) == 8
    assert chosen_batch_size(1000, epochs=1) == 8
    assert chosen_batch_size(1000, epochs=1, least=16) == 16  # processes
    assert chosen_batch_size(1000, epochs=12) == 64


@pytest.mark.parametrize(
    ("records", "optim", "advice"),
    [
        (
            225,
            {"epochs": 3.0, "batch_size": 32},
            r"^21 steps may .* try optim\.batch_size 4 and optim\.epochs 3$",
        ),
        (20, {}, r"^40 steps .* add records$"),
        (225, {"max_steps": 7}, r"^7 steps .* raise optim\.max_steps$"),
        (225, {}, None),
    ],
)
def test_too_few_steps_are_said_with_what_makes_them_enough(
    records: int, optim: dict[str, Any], advice: str | None
) -> None:
    config, _ = with_length(Config(optim=OptimConfig(**optim)), records, RunIdentity({}, {}, 0))
    batch_size, epochs = config.optim.batch_size, config.optim.epochs
    steps = int(config.optim.max_steps or (epochs or 0) * (records // (batch_size or 1)))
    text = few_steps(config, steps, records)
    assert re.search(advice, text or "") if advice else text is None, text


@pytest.mark.parametrize(
    ("optim", "saved", "lr"),
    [
        ({"batch_size": 8}, None, 0.01),
        ({"batch_size": 16}, None, 0.02),
        ({"batch_size": 8, "lr": 0.02}, None, 0.02),
        ({"batch_size": 8, "base_lr": 0.64}, None, 0.02),
        ({}, None, 0.01),  # steps of 4
        ({"batch_size": 8}, {"optim.lr": None}, 0.02),  # a run of an earlier version goes on
        ({"batch_size": 8}, {"optim.lr": 0.01}, 0.01),
    ],
)
def test_small_steps_take_half_the_default_rate(
    optim: dict[str, Any], saved: dict[str, Any] | None, lr: float
) -> None:
    earlier = RunIdentity({}, saved or {}, 0)
    config, _ = with_length(Config(optim=OptimConfig(**optim)), 225, earlier)
    assert config.optim.peak_lr == lr


def test_the_plan_says_what_it_chose_and_the_run_keeps_it(tiny: Callable[..., Config]) -> None:
    """In its configuration, its adapter file and a resume that leaves them open again."""
    config, lines, resumed = tiny(*UNSET), Stopper("step 2/"), Stopper()
    assert finetune(config, say=lines) == 143
    said = "run: 80 steps of 4 records, epochs 8 (batch_size and epochs chosen for 40 records); lr 0.02"
    assert any(line.startswith(said) for line in lines.lines)
    out = Path(config.out)
    assert yaml.safe_load((out / "config.yaml").read_text())["optim"]["epochs"] == 8.0
    assert yaml.safe_load((out / "config.yaml").read_text())["optim"]["batch_size"] == 4
    assert finetune(config, resume="last", say=resumed, dry_run=True) == 0
    assert any("epochs 8 (batch_size and epochs as in the resumed run); lr" in line for line in resumed.lines)
    assert not any("changed" in line for line in resumed.lines)


@pytest.mark.slow
def test_a_run_of_an_earlier_version_keeps_its_length_to_the_byte(tiny: Callable[..., Config]) -> None:
    """Its checkpoint stores the epochs, and no val_every, which meant a tenth of the run."""
    earlier = ("--optim.epochs", "1", "--trainer.val_every", "1", "--trainer.samples", "0")
    whole, run = tiny(*earlier, out="whole"), tiny(*earlier)
    assert finetune(whole, say=Stopper()) == 0
    assert finetune(run, say=Stopper("step 3/")) == 143
    path = Path(run.out) / "checkpoints" / "step-0000003.ckpt"
    checkpoint = read_checkpoint(path)
    assert checkpoint["lit_adapter"]["changeable"]["optim.epochs"] == 1.0
    checkpoint["lit_adapter"]["changeable"]["trainer.val_every"] = None
    DurableCheckpointIO().save_checkpoint(checkpoint, path)
    lines = Stopper()
    later = tiny(*UNSET, "--trainer.val_every", "null", "--trainer.samples", "0")
    assert finetune(later, resume="last", say=lines) == 0
    assert not any("changed" in line for line in lines.lines)
    for name in ("adapter.safetensors", "best.safetensors"):
        assert (Path(run.out) / name).read_bytes() == (Path(whole.out) / name).read_bytes()
    events = EventAccumulator(str(Path(run.out) / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("loss/held_out")] == list(range(6))


@pytest.mark.slow
def test_steps_given_outright_need_no_epochs(tiny: Callable[..., Config]) -> None:
    """The adapter file has the passes that they make."""
    config, lines = tiny(*UNSET, "--optim.max_steps", "4"), Stopper()
    assert finetune(config, say=lines) == 0
    assert any(
        line.startswith("run: 4 steps of 4 records, epochs 0.4 (batch_size chosen") for line in lines.lines
    )
    info = read_adapter(Path(config.out) / "adapter.safetensors")[0]
    assert info.training["epochs"] == pytest.approx(4 / 10)
    longer = Stopper()
    assert finetune(tiny(*UNSET), resume="last", say=longer, dry_run=True) == 0
    changes = [line for line in longer.lines if "changed from" in line]
    assert changes == ["resuming with optim.max_steps changed from 4 to unset"]  # epochs follow
    said = "epochs 8 (batch_size as in the resumed run, epochs chosen for 40 records); lr"
    assert any(said in line for line in longer.lines)


def test_epochs_that_the_user_sets_on_resume_are_listed(tiny: Callable[..., Config]) -> None:
    assert finetune(tiny(*UNSET, "--optim.max_steps", "4"), say=Stopper("step 1/")) == 143
    lines = Stopper()
    config = tiny(*UNSET, "--optim.epochs", "2", "--optim.batch_size", "4")
    assert finetune(config, resume="last", say=lines, dry_run=True) == 0
    assert [line for line in lines.lines if "changed from" in line] == [
        "resuming with optim.epochs changed from unset to 2.0",
        "resuming with optim.max_steps changed from 4 to unset",
    ]


def test_max_steps_decides_the_epochs_of_a_run_that_also_sets_them(tiny: Callable[..., Config]) -> None:
    """Plan, adapter file and run.json have the same number: 2 steps of 8 of the 40 records."""
    config, lines = tiny("--optim.epochs", "3", "--optim.max_steps", "2", "--trainer.samples", "0"), Stopper()
    assert finetune(config, say=lines) == 0
    assert any(line.startswith("run: 2 steps of 8 records, epochs 0.4; lr") for line in lines.lines)
    out = Path(config.out)
    assert read_adapter(out / "adapter.safetensors")[0].training["epochs"] == 0.4
    assert json.loads((out / "run.json").read_text())["epochs"] == 0.4


@pytest.mark.parametrize(
    ("steps", "saved", "every"),
    [
        (15, None, 10),
        (105, None, 10),
        (3000, None, 300),
        (15, RunIdentity({}, {"trainer.val_every": 1}, 15), 1),  # the same run goes on
        (30, RunIdentity({}, {"trainer.val_every": 1}, 15), 10),  # a longer one is planned anew
    ],
)
def test_validations_are_a_tenth_of_the_run_apart_and_ten_steps_at_least(
    steps: int, saved: RunIdentity | None, every: int
) -> None:
    config = with_val_every(Config(), steps, saved or RunIdentity({}, {}, 0))
    assert config.trainer.val_every == every


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        (["--adapter.lora.rank", "1"], 6e-3),
        (["--adapter.lora.rank", "3", "--adapter.lora.on", "q_proj", "v_proj"], 6e-3),
        (["--adapter.lora.rank", "2"], 4.5e-3),
        (["--adapter.lora.rank", "8", "--adapter.lora.on", "all"], 2.3e-3),
        (["--adapter.lora.rank", "8", "--optim.lr_scale_lora", "0.3"], 6e-3),
        (["--adapter.lora.rank", "8", "--optim.lr", "1e-2", "--adapter.lora.on", "attention"], 1.5e-3),
    ],
)
def test_loras_own_rate_falls_with_its_ranks(options: list[str], rate: float) -> None:
    """As in docs/learning.md; what is given stays as it is."""
    optim = with_learning_rate(parse_finetune(options).config).optim
    assert optim.peak_lr * optim.lr_scale_lora == pytest.approx(rate, rel=0.02)  # type: ignore[operator]
