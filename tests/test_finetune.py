"""Runs of finetune() in this process, on a tiny base: what is written, resumed, refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from finetune_runs import Stopper, config_fields
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_adapter import device
from lit_adapter.cli.finetune import parse_finetune
from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.training.checkpoint import DurableCheckpointIO, read_checkpoint
from lit_adapter.training.finetune import finetune
from lit_adapter.training.module import LitAdapter
from lit_adapter.weights.adapter_file import read_adapter
from lit_adapter.weights.convert import convert

STEPS = 15  # 40 training records, 8 a step, three epochs of five steps


def stopped_and_resumed(config: Config, stop_at: int) -> bytes:
    stopper = Stopper(f"step {stop_at}/")
    assert finetune(config, say=stopper) == 143
    assert not (Path(config.out) / "adapter.safetensors").exists()
    resumed = Stopper()
    assert finetune(config, resume="last", say=resumed) == 0
    assert any(f"step {stop_at}" in line and "resuming" in line for line in resumed.lines)
    return (Path(config.out) / "adapter.safetensors").read_bytes()


def test_a_resumed_run_has_the_form_of_adamw_that_its_device_takes(
    tiny: Callable[..., Config], adamw_forms: set[tuple[str, bool | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("--optim.max_steps", "4")
    with monkeypatch.context() as as_on_a_gpu:
        as_on_a_gpu.setattr(LitAdapter, "_fused", True)
        assert finetune(config, say=Stopper("step 3/")) == 143
    assert adamw_forms == {("cpu", True)}
    adamw_forms.clear()
    assert finetune(config, resume="last", say=Stopper()) == 0
    assert adamw_forms == {("cpu", None)}


def test_resume_is_exact_to_the_byte(tiny: Callable[..., Config]) -> None:
    """Stopped inside an epoch and on its last step; tests/test_resume.py tries the other places."""
    options = ["--adapter.dropout", "0.1", "--trainer.save_every", "100", "--optim.epochs", "2"]
    assert finetune(tiny(*options, out="whole"), say=Stopper()) == 0
    whole = (Path(tiny(out="whole").out) / "adapter.safetensors").read_bytes()
    for stop_at in (5, 8):
        assert stopped_and_resumed(tiny(*options, out=f"stopped-{stop_at}"), stop_at) == whole


@pytest.mark.slow
@pytest.mark.parametrize("val_every", ["5", pytest.param("7", marks=pytest.mark.slow)])
def test_a_run_killed_before_its_last_write_ends_in_the_same_bytes(
    tiny: Callable[..., Config], val_every: str
) -> None:
    """Its last checkpoint is there, its adapter file is not."""
    config = tiny("--trainer.val_every", val_every)
    finetune(config, say=Stopper())
    adapter = Path(config.out) / "adapter.safetensors"
    whole = adapter.read_bytes()
    adapter.unlink()
    finetune(config, resume="last", say=Stopper())
    assert adapter.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_low_precision_learns_as_fp32_does(tiny: Callable[..., Config], precision: str) -> None:
    """The adapter stays in fp32, and the held-out loss ends where fp32's does, to the precision of bf16."""
    for name in ("32-true", precision):
        finetune(tiny("--trainer.precision", name, out=name), say=Stopper())
    losses = []
    for name in ("32-true", precision):
        info, state = read_adapter(Path(tiny(out=name).out) / "adapter.safetensors")
        losses.append(info.training["val_loss"])
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


def test_what_a_run_leaves(tiny: Callable[..., Config]) -> None:
    config = tiny()
    lines = Stopper()
    assert finetune(config, say=lines) == 0
    out = Path(config.out)
    info, state = read_adapter(out / "adapter.safetensors")
    assert info.adapter == replace(config.adapter, norms=True)
    assert info.training["steps"] == STEPS
    assert info.training["data"] == "tiny.json"  # of a path, the name alone goes into the file
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    gates = [tensor for name, tensor in state.items() if name.endswith("gate")]
    assert all(bool(gate.ne(0).all()) for gate in gates)
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step-0000012.ckpt", "step-0000015.ckpt"]
    checkpoint = read_checkpoint(out / "checkpoints" / names[-1])
    assert checkpoint["state_dict"].keys() == state.keys()
    size = (out / "adapter.safetensors").stat().st_size  # with two moments and the loops, never the base
    assert (out / "checkpoints" / names[-1]).stat().st_size < 3 * size + 12_000
    assert read_adapter(out / "best.safetensors")[0].training["val_loss"] <= info.training["val_loss"]
    again = parse_finetune(["--config", str(out / "config.yaml")])[0]
    assert again == config
    assert not (out / ".lock").exists()


@pytest.mark.slow
def test_more_epochs_go_on_where_the_run_ended(tiny: Callable[..., Config]) -> None:
    """With a constant rate, two epochs and then a third are the same three epochs."""
    constant = ["--optim.schedule", "constant", "--optim.warmup", "0", "--trainer.val_every", "5"]
    finetune(tiny(*constant, out="three"), say=Stopper())
    finetune(tiny(*constant, "--optim.epochs", "2", out="two"), say=Stopper())
    lines = Stopper()
    finetune(tiny(*constant, "--optim.epochs", "3", out="two"), resume="last", say=lines)
    assert any("optim.epochs changed from 2.0 to 3.0" in line for line in lines.lines)
    three, two = (load_file(Path(tiny(out=out).out) / "adapter.safetensors") for out in ("three", "two"))
    for name, tensor in three.items():
        assert torch.equal(tensor, two[name]), name


@pytest.mark.slow
def test_a_longer_run_that_is_stopped_at_its_end_does_not_pass_for_finished(
    tiny: Callable[..., Config],
) -> None:
    """The adapter of the shorter run is there, and the longer run's last checkpoint."""
    constant = ["--optim.schedule", "constant", "--optim.warmup", "0"]
    finetune(tiny(*constant, "--optim.epochs", "2"), say=Stopper())
    longer = tiny(*constant, "--optim.epochs", "3")
    assert finetune(longer, resume="last", say=Stopper("step 15/")) == 143
    assert read_adapter(Path(longer.out) / "adapter.safetensors")[0].training["steps"] == STEPS - 5
    assert finetune(longer, resume="last", say=Stopper()) == 0
    assert read_adapter(Path(longer.out) / "adapter.safetensors")[0].training["steps"] == STEPS


@pytest.mark.slow
def test_a_resumed_run_keeps_the_precision_that_auto_had_found(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("--trainer.precision", "auto", "--optim.max_steps", "5")
    monkeypatch.setattr(device, "_bf16_pays", lambda _: True)
    finetune(config, say=Stopper("step 4/"))
    monkeypatch.setattr(device, "_bf16_pays", lambda _: False)
    lines = Stopper()
    assert finetune(config, resume="last", say=lines) == 0
    assert "precision: bf16-true, that of the resumed run" in lines.lines


def test_held_out_records_too_long_to_answer_are_not_sampled(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    held_out = [
        {"instruction": "word " * 1500, "output": "long"},
        {"instruction": "Say it back.", "input": "red", "output": "red"},
    ]
    path = tmp_path / "val.json"
    path.write_text(json.dumps(held_out))
    options = ["--data.val", str(path), "--trainer.samples", "2", "--optim.max_steps", "2"]
    config = tiny(*options)
    assert finetune(config, say=Stopper()) == 0
    curves = EventAccumulator(str(Path(config.out) / "tensorboard")).Reload()
    assert [tag for tag in curves.Tags()["tensors"] if tag.startswith("samples/")] == [
        "samples/0/text_summary"
    ]
    with pytest.raises(UserError, match=r"trainer.sample_tokens is 1024, but the base's context is 1024"):
        finetune(tiny(*options, "--trainer.sample_tokens", "1024", out="other"), say=Stopper())


def test_another_run_is_not_resumed(tiny: Callable[..., Config]) -> None:
    finetune(tiny("--optim.max_steps", "2"), say=Stopper())
    for option, message in (
        (["--seed", "5"], "seed was 1337, now 5"),
        (["--optim.batch_size", "4"], "optim.batch_size was 8, now 4"),
        (["--adapter.gate", "identity"], "adapter.gate was 'token', now 'identity'"),
        (
            ["--data.template", "alpaca-newline"],
            r"data\.template: its kind was 'alpaca', now 'alpaca-newline'$",
        ),
        (["--optim.schedule", "linear"], "optim.schedule was 'cosine', now 'linear'"),
    ):
        with pytest.raises(UserError, match=message):
            finetune(tiny("--optim.max_steps", "4", *option), resume="last", say=Stopper())


def test_a_chat_template_that_shows_the_time_is_kept_on_resume(
    tiny: Callable[..., Config], tiny_base: Path, tmp_path: Path
) -> None:
    """Rendered again it would be another text; another setting is still refused."""
    source = shutil.copytree(tiny_base.parent / "source", tmp_path / "source")
    described = json.loads((source / "tokenizer_config.json").read_text())
    time, answer = (
        "{{ strftime_now('%H:%M:%S.%f') }}",
        "{% if messages[1:] %}{{ messages[1].content }}{% endif %}",
    )
    shown = f"{time} {{{{ messages[0].content }}}}: {answer}"
    (source / "tokenizer_config.json").write_text(json.dumps(described | {"chat_template": shown}))
    base = convert(source, tmp_path / "chat")
    options = ("--base", str(base), "--optim.max_steps", "2", "--trainer.samples", "0")
    chat = tiny(*options, "--data.template", "chat")
    lines = Stopper("step 1/")
    assert finetune(chat, say=lines) == 143
    assert "      template: chat (the base's own chat template)" in lines.lines
    first = read_checkpoint(Path(chat.out) / "checkpoints" / "step-0000001.ckpt")
    with pytest.raises(UserError, match=r"data\.template: its kind was 'chat', now 'alpaca'$"):
        finetune(tiny(*options), resume="last", say=Stopper())
    assert finetune(chat, resume="last", say=Stopper()) == 0
    template = read_adapter(Path(chat.out) / "adapter.safetensors")[0].template
    assert template.to_dict() == first["lit_adapter"]["identity"]["template"]
    assert re.match(r"\d\d:\d\d:\d\d\.\d{6} \{instruction\}: $", template.text)


@pytest.mark.slow
def test_the_command_lines_rate_counts_after_a_resume(tiny: Callable[..., Config]) -> None:
    """A rate of 0 given on resume leaves the adapter as it was, whatever the checkpoint's optimizer says."""
    finetune(tiny("--optim.max_steps", "4"), say=Stopper())
    before = load_file(Path(tiny().out) / "adapter.safetensors")
    lines = Stopper()
    finetune(tiny("--optim.max_steps", "8", "--optim.lr", "0"), resume="last", say=lines)
    assert "resuming with optim.lr changed from 0.02 to 0" in lines.lines
    after = load_file(Path(tiny().out) / "adapter.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tiny: Callable[..., Config]) -> None:
    finetune(tiny("--optim.max_steps", "8"), say=Stopper())
    newest = Path(tiny().out) / "checkpoints" / "step-0000008.ckpt"
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1
    newest.write_bytes(content)
    lines = Stopper()
    finetune(tiny("--optim.max_steps", "9"), resume="last", say=lines)
    assert any("step-0000008.ckpt" in line and "checksum" in line for line in lines.lines)
    assert any("step 4, the newest complete" in line for line in lines.lines)


def test_a_checkpoint_of_sound_bytes_but_wrong_contents_is_named(tiny: Callable[..., Config]) -> None:
    """Its checksum is right; a moment of the optimizer is not a number, or a gate has another shape."""
    config = tiny("--optim.max_steps", "8", "--trainer.keep_checkpoints", "9", "--trainer.save_every", "2")
    finetune(config, say=Stopper())
    folder = Path(config.out) / "checkpoints"
    newest, before = folder / "step-0000008.ckpt", folder / "step-0000006.ckpt"
    checkpoint = read_checkpoint(newest)
    checkpoint["optimizer_states"][0]["state"][0]["exp_avg"][0] = float("nan")
    DurableCheckpointIO().save_checkpoint(checkpoint, newest)
    checkpoint = read_checkpoint(before)
    checkpoint["state_dict"]["layers.3.self_attn.prefix.gate"] = torch.zeros(3)
    DurableCheckpointIO().save_checkpoint(checkpoint, before)
    lines = Stopper()
    finetune(tiny("--optim.max_steps", "9"), resume="last", say=lines)
    said = [line for line in lines.lines if "trying the one before" in line]
    assert f"{newest}: optimizer 0.exp_avg is not fp32, or has NaN or infinite values" in said[0]
    assert f"{before}: layers.3.self_attn.prefix.gate has shape [3]; expected [16]" in said[1]
    assert any("step 4, the newest complete" in line for line in lines.lines)


def test_a_setting_that_a_checkpoint_does_not_know_had_its_default(tiny: Callable[..., Config]) -> None:
    """Written before the settings existed; the one that differs from its default is said, or refused."""
    paper = ("--adapter.gate", "tanh")  # an earlier default
    finetune(tiny(*paper, "--optim.max_steps", "4"), say=Stopper())
    path = Path(tiny().out) / "checkpoints" / "step-0000004.ckpt"
    checkpoint = read_checkpoint(path)
    for key in ("trainer.tensor_parallel", "trainer.samples", "optim.betas"):
        del checkpoint["lit_adapter"]["changeable"][key]
    for key in ("base_precision", "init_from", "adapter.gate"):
        del checkpoint["lit_adapter"]["identity"][key]
    DurableCheckpointIO().save_checkpoint(checkpoint, path)
    with pytest.raises(UserError, match=r"another run: adapter\.gate was 'tanh', now 'identity'$"):
        finetune(tiny("--adapter.gate", "identity"), resume="last", say=Stopper())
    lines = Stopper()
    assert finetune(tiny(*paper, "--optim.max_steps", "5"), resume="last", say=lines) == 0
    changes = [line for line in lines.lines if "changed from" in line]
    assert changes == [
        "resuming with optim.max_steps changed from 4 to 5",
        "resuming with trainer.samples changed from 3 to 1",  # tiny.yaml has 1
    ]


@pytest.mark.slow
def test_an_older_checkpoint_begins_a_branch_of_its_own(tiny: Callable[..., Config]) -> None:
    """The later ones are set aside, so that the branch's own checkpoints are the newest."""
    finetune(tiny("--optim.max_steps", "12"), say=Stopper())
    folder = Path(tiny().out) / "checkpoints"
    older = str(folder / "step-0000008.ckpt")
    stopped, last = Stopper("step 9/"), Stopper()
    options = ["--optim.max_steps", "12", "--optim.lr", "0.001", "--optim.weight_decay", "0.5"]
    (Path(tiny().out) / "adapter.safetensors").unlink()
    assert finetune(tiny(*options), resume=older, say=stopped) == 143
    assert any("step-0000012.ckpt: not part of the run resumed from step 8" in x for x in stopped.lines)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-0000008.ckpt", "step-0000009.ckpt", "step-0000012.aside"]
    best, aside = folder.parent / "best.safetensors", folder.parent / "best.aside"
    assert aside.is_file()  # of step 10 or 12
    assert not best.exists()
    group = read_checkpoint(folder / names[1])["optimizer_states"][0]["param_groups"][0]
    assert group["weight_decay"] == 0.5
    assert finetune(tiny(*options), resume="last", say=last) == 0
    assert any("step 9, the newest complete" in line for line in last.lines)
    assert best.read_bytes() != aside.read_bytes()
    assert read_adapter(best)[0].training["lr"] == 0.001


def test_the_rate_is_said_whichever_setting_it_comes_from(tiny: Callable[..., Config]) -> None:
    """0.01 is the default of small steps, and base_lr 0.64 with 8 records a step is 0.02."""
    options = ["--optim.lr", "null", "--trainer.val_every", "5"]
    said, first = [], Stopper()
    finetune(tiny(*options, "--optim.max_steps", "1"), say=first)
    assert not any("1 steps" in line for line in first.lines)
    assert any(line.startswith("run: 1 step of 8 records, epochs 0.2; lr 0.01") for line in first.lines)
    for steps, name, rate in (("2", "lr", "0.01"), ("3", "base_lr", "0.64")):
        lines = Stopper()
        more = ["--optim.max_steps", steps, f"--optim.{name}", rate]
        finetune(tiny(*options, *more), resume="last", say=lines)
        said.append([line for line in lines.lines if "changed" in line])
    steps = "resuming with optim.max_steps changed from"
    lr = "resuming with optim.lr changed from 0.01 to 0.02"
    assert said == [[f"{steps} 1 to 2"], [lr, f"{steps} 2 to 3"]]


@pytest.mark.slow
def test_a_longer_run_says_what_happens_to_its_schedule(tiny: Callable[..., Config]) -> None:
    finetune(tiny("--optim.max_steps", "2"), say=Stopper())
    lines = Stopper()
    finetune(tiny("--optim.max_steps", "4"), resume="last", say=lines)
    assert any("optim.max_steps changed from 2 to 4" in line for line in lines.lines)
    assert any("the cosine schedule over 4 steps instead of 2" in line for line in lines.lines)


@pytest.mark.parametrize(
    ("setting", "advice"),
    [("optim.max_steps", "set optim.max_steps to 3"), ("optim.epochs", "raise optim.epochs")],
)
@pytest.mark.parametrize("is_complete", [True, False])
def test_a_checkpoint_past_the_end_of_the_run_is_refused(
    tiny: Callable[..., Config], setting: str, advice: str, is_complete: bool
) -> None:
    """Whether or not that run had ended, and before anything is written; its own end is no refusal."""
    whole = tiny("--optim.max_steps", "3" if is_complete else "9")
    assert finetune(whole, say=Stopper("never" if is_complete else "step 3/")) in (0, 143)
    folder = Path(whole.out)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shorter = tiny(f"--{setting}", "2" if setting == "optim.max_steps" else "0.4")
    lines = Stopper()
    message = rf"step-0000003\.ckpt: has 3 steps, more than the 2 of this run; {advice}"
    with pytest.raises(UserError, match=message):
        finetune(shorter, resume="last", say=lines)
    assert not any(line.startswith(("resuming with", "run:", "warning")) for line in lines.lines)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert finetune(tiny("--optim.max_steps", "3"), resume="last", say=Stopper()) == 0


def test_a_second_run_does_not_touch_the_first(tiny: Callable[..., Config]) -> None:
    finetune(tiny("--optim.max_steps", "1"), say=Stopper())
    before = (Path(tiny().out) / "adapter.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds a run already"):
        finetune(tiny(), say=Stopper())
    assert (Path(tiny().out) / "adapter.safetensors").read_bytes() == before


@pytest.mark.slow
def test_curves_go_on_without_repeated_steps(tiny: Callable[..., Config]) -> None:
    """Killed after step 8 with a checkpoint of step 4: steps 5 to 8 are drawn once, by the resumed run."""
    config = tiny("--optim.max_steps", "12")

    def die(line: str) -> None:
        if line.startswith("step 7/"):
            raise KeyboardInterrupt

    with pytest.raises(BaseException):  # noqa: B017, PT011 (however Lightning passes it on)
        finetune(config, say=die)
    finetune(config, resume="last", say=Stopper())
    events = EventAccumulator(str(Path(config.out) / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss/train")] == list(range(1, 13))
    wanted = {
        "progress/tokens_per_s",
        "optim/lr",
        "optim/grad_norm",
        "loss/held_out",
        "perplexity/held_out",
        "prefix/strength",
    }
    assert wanted <= set(events.Tags()["scalars"])
    assert "samples/0/text_summary" in events.Tags()["tensors"]
    assert "prefix/layers_by_heads" in events.Tags()["images"]


def test_nothing_to_resume_is_an_error(tiny: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match="nothing to resume"):
        finetune(tiny(), resume="last", say=Stopper())


def test_batches_too_large_for_the_data_are_refused(tiny: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"optim.batch_size is 64, but there are only 40"):
        finetune(tiny("--optim.batch_size", "64"), say=Stopper())


def another(hint: Any, default: Any) -> Any:
    """A value of a field's type that is not its default."""
    kinds = get_args(hint) or (hint,)
    if get_origin(hint) is Literal:
        return next(kind for kind in kinds if kind != default)
    if hint == tuple[float, float]:
        return (0.5, 0.6)
    if hint == tuple[str, ...]:
        return ("v_proj", "mlp")
    if list[float] in kinds:
        return [0.25]
    if bool in kinds:
        return not default
    if int in kinds:
        return default + 3 if isinstance(default, int) else 12
    return 0.25 if float in kinds else f"another {default}"


@pytest.mark.parametrize(
    "apart",  # what cannot be given with the rest
    [
        (
            "optim.lr",
            "optim.lr_scale_norms",
            "optim.lr_scale_lora",
            *(f"adapter.lora.{f.name}" for f in fields(LoraConfig)),
            *("data.mask_prompt", "data.stream"),
        ),
        (
            *("data.last_answer_only", "data.weights", "data.drop_duplicates"),
            *("optim.base_lr", "optim.lr_scale_v2", "adapter.version", "adapter.head"),
        ),
    ],
    ids=["v2", "norms"],
)
def test_every_config_field_reaches_the_command_line(apart: tuple[str, ...]) -> None:
    def value_in(config: Any, name: str) -> Any:
        for key in name.split("."):
            config = getattr(config, key)
        return config

    values = {name: another(hint, value_in(Config(), name)) for name, hint in config_fields(Config)}
    values = {name: value for name, value in values.items() if name not in apart}
    argv = []
    for name, value in values.items():
        spelling = name if "optim.lr" in apart else name.replace("_", "-")
        argv += [f"--{spelling}", value if isinstance(value, str) else json.dumps(value)]
    config = parse_finetune(argv).config
    assert {name: value_in(config, name) for name in values} == values


def test_what_a_run_changes_of_its_process_is_given_back(tiny: Callable[..., Config]) -> None:
    """Its handlers of signals, and what it does not let Lightning say."""

    def settings() -> list[Any]:
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
        return [*handlers, list(warnings.filters), logging.getLogger("lightning.pytorch").level]

    before = settings()
    finetune(tiny("--optim.max_steps", "1"), say=Stopper())
    assert settings() == before


def test_a_run_gives_every_signal_back(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one that torch's loaders take to hear of their processes' deaths."""
    # They take it once in a process; an earlier test's run may have been that once.
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)

    def own(number: int, frame: Any) -> None:
        """Be whoever had the signals before."""

    def say(line: str) -> None:
        taken.extend(signal.getsignal(number) is not own for number in numbers if line.startswith("step 2/"))

    taken: list[bool] = []
    numbers = (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, own) for number in numbers]
    try:
        options = ("--optim.max_steps", "2", "--data.workers", "1", "--trainer.log_every", "1")
        assert finetune(tiny(*options), say=say) == 0
        assert taken == [True] * 3
        assert [signal.getsignal(number) for number in numbers] == [own] * 3
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
