"""What is refused before a run starts, with settings that work; and --dry-run."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetune_runs import Stopper
from test_memory import packed

from lit_adapter.config import Config, OptimConfig, TrainerConfig
from lit_adapter.errors import UserError
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.training import base, preflight
from lit_adapter.training.dry_run import Stopwatch, duration, forecast
from lit_adapter.training.finetune import finetune
from lit_adapter.training.memory import Sizes
from lit_adapter.training.preflight import (
    check_disk,
    check_memory,
    enough_memory,
    remedies,
    run_bytes,
    with_layers,
    with_whole_layers,
)

ROW, LONGEST = packed(60), packed(1)
MODEL = LlamaConfig(vocab_size=1000, n_layer=6, n_head=8, n_kv_head=2, n_embd=256, head_dim=32, n_hidden=700)


def needs(precision: str = "32-true") -> Sizes:
    return Sizes(MODEL, AdapterConfig(), ROW, LONGEST, precision)


def with_setting(needed: Sizes, setting: str) -> Sizes:
    """The sizes of a run that follows an advice."""
    for part in setting.split(" with "):
        name, value = part.split()
        if name == "optim.row_tokens":
            needed = replace(needed, tokens=int(value))
        elif name == "adapter.layers":
            needed = with_layers(needed, int(value))
        elif name == "trainer.recompute":
            needed = replace(needed, recompute=value == "true")
        else:
            needed = replace(needed, precision=value)
    return needed


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6, 0.5, 0.4])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_the_advice_fits_and_is_no_smaller_than_it_must_be(precision: str, share: float) -> None:
    needed = needs(precision)
    free = int(needed.memory.total * share)
    advice = remedies(needed, free)
    assert advice
    for setting in advice:
        assert with_setting(needed, setting).memory.total <= free
        more = re.sub(r"\d+", lambda found: str(int(found[0]) + 1), setting.replace("bf16", "bf"))
        if setting.startswith(("optim", "adapter")) and "with" not in setting:
            assert with_setting(needed, more).memory.total > free


def test_memory_is_said_or_refused() -> None:
    needed = needs()
    total = needed.memory.total
    assert "are free" in check_memory(needed, total)
    assert "free" not in check_memory(needed, None)
    assert check_memory(needed, total, 3).endswith(" are free for each of 3 processes")
    with pytest.raises(UserError, match=r"but .* are free for each of 2 processes; optim.row_tokens"):
        check_memory(needed, total - 1, 2)
    with pytest.raises(
        UserError, match=r"memory: about .* optim.row_tokens \d+ or adapter.layers \d+ would fit"
    ):
        check_memory(needed, int(total * 0.8))
    with pytest.raises(UserError, match=r"a smaller base, or a device with more memory, would fit"):
        check_memory(needed, 1000)


LLAMA_70B = LlamaConfig(
    vocab_size=128_256, n_layer=80, n_head=64, n_kv_head=8, n_embd=8192, head_dim=128, n_hidden=28_672
)


@pytest.mark.parametrize(
    ("free", "gpus", "advice"),
    [
        (80, 8, ["trainer.strategy fsdp2 with trainer.devices 4"]),
        (141, 8, ["trainer.strategy fsdp2 with trainer.devices 2"]),
        (50, 8, ["trainer.strategy fsdp2 with trainer.devices 8 with trainer.num_nodes 2"]),
        (50, 4, ["trainer.strategy fsdp2 with trainer.devices 4 with trainer.num_nodes 4"]),
        (50, 3, ["trainer.strategy fsdp2 with trainer.devices 3 with trainer.num_nodes 4"]),
        (80, 1, []),
        (4, 8, []),
    ],
)
def test_a_base_too_large_for_a_gpu_is_to_be_cut(free: int, gpus: int, advice: list[str]) -> None:
    """141 GB of weights in bf16, on GPUs of 80, 141 and 50 GB, and on one too small for three layers."""
    needed = Sizes(LLAMA_70B, AdapterConfig(), ROW, LONGEST, "bf16-true", device="cuda", shardable_over=gpus)
    assert remedies(needed, free * 10**9) == advice
    for setting in advice:
        shards = 1
        for part in setting.split(" with ")[1:]:
            shards *= int(part.split()[1])
        assert replace(needed, shards=shards).memory.total <= free * 10**9
        assert replace(needed, shards=shards // 2).memory.total > free * 10**9


def test_as_many_layers_stay_whole_as_memory_allows() -> None:
    """Of a 70B base on eight GPUs; one layer more would not leave a tenth of the memory free."""
    needed = Sizes(LLAMA_70B, AdapterConfig(), ROW, LONGEST, "bf16-true", device="cuda", shards=8)
    options = TrainerConfig(strategy="fsdp2")
    for free in (65, 80, 141):
        found = with_whole_layers(needed, options, free * 10**9)
        assert found.whole_layers > 0
        assert found.memory.total <= 0.9 * free * 10**9
        assert replace(found, whole_layers=found.whole_layers + 1).memory.total > 0.9 * free * 10**9
    assert with_whole_layers(needed, options, 55 * 10**9) == needed
    assert with_whole_layers(needed, options, 400 * 10**9).whole_layers == 80
    assert with_whole_layers(needed, options, None) == needed
    assert with_whole_layers(replace(needed, device="cpu"), options, 10**12).whole_layers == 0
    for alone in (replace(needed, shards=1), replace(needed, tensor_parallel=8)):
        assert with_whole_layers(alone, replace(options, whole_layers=3), 10**12) == alone


def test_whole_layers_that_are_too_many_are_named() -> None:
    needed = Sizes(LLAMA_70B, AdapterConfig(), ROW, LONGEST, "bf16-true", device="cuda", shards=8)
    more = with_whole_layers(needed, TrainerConfig(strategy="fsdp2", whole_layers=40), 80 * 10**9)
    assert more.whole_layers == 40
    with pytest.raises(UserError, match=r"but 80\.0 GB are free; trainer\.whole_layers 0 .*would fit"):
        check_memory(more, 80 * 10**9)


def test_a_base_is_cut_over_a_multiple_of_the_devices_that_share_heads() -> None:
    model = replace(LLAMA_70B, n_head=60, n_kv_head=6, n_hidden=28_674)
    needed = Sizes(model, AdapterConfig(), ROW, LONGEST, "bf16-true", device="cuda")
    for shares, devices in ((1, 2), (2, 4), (3, None)):
        layout = replace(needed, shards=shares, tensor_parallel=shares, shardable_over=8)
        advice = [line for line in remedies(layout, layout.memory.total * 4 // 5) if "fsdp2" in line]
        assert advice == ([f"trainer.strategy fsdp2 with trainer.devices {devices}"] if devices else [])


@pytest.mark.parametrize("layout", ["ddp 2 1", "fsdp2 2 1", "fsdp2 2 2"])
def test_memory_is_that_of_the_rows_of_one_process(
    tiny: Callable[..., Config], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that share a step have shorter rows each; tensor-parallel ones have the same row."""
    strategy, devices, parallel = layout.split()
    found: list[int] = []

    def noted(*given: Any) -> Sizes:
        found.append(len(preflight.sizes(*given).row.ids))
        raise StopIteration("planned")

    monkeypatch.setattr("lit_adapter.training.plan.sizes", noted)
    step = ("--optim.row_tokens", "16384", "--optim.batch_size", "40")
    several = ("--trainer.strategy", strategy, "--trainer.devices", devices)
    for options in ((), (*several, "--trainer.tensor_parallel", parallel)):
        with pytest.raises(StopIteration, match="planned"):
            finetune(tiny(*step, *options), say=Stopper(), dry_run=True)
    whole, shared = found
    if parallel == "2":
        assert shared == whole
    else:
        assert 0.4 * whole < shared < 0.7 * whole  # half of the records, and the preamble again


def test_disk_is_said_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(trainer=TrainerConfig(keep_checkpoints=9))
    needed = run_bytes(MODEL, config, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=75_799_355_392))
    said = f"disk: the run writes about {needed / 1e6:.1f} MB into {tmp_path}; 75.8 GB are free"
    assert check_disk(tmp_path, MODEL, config, 100) == said
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(
        UserError, match=r"but .* free; trainer.keep_checkpoints 1 or --out on another disk would do"
    ):
        check_disk(tmp_path, MODEL, config, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r" 0\.0 MB are free; --out on another disk would do"):
        check_disk(tmp_path, MODEL, config, 100)


def test_a_run_writes_about_what_was_said(tiny: Callable[..., Config]) -> None:
    lines = Stopper()
    config = tiny("--optim.max_steps", "10", "--trainer.log_every", "1")
    assert finetune(config, say=lines) == 0
    said = next(line for line in lines.lines if line.startswith("disk:"))
    expected = 1e6 * float(re.findall(r"about ([\d.]+) MB", said)[0]) + 5e4  # it is rounded
    written = sum(path.stat().st_size for path in Path(config.out).rglob("*") if path.is_file())
    headers = 6 * preflight.HEADERS  # their bound hides the rest in so small a run
    assert written <= expected
    assert expected - headers < 2 * written
    assert any(line.startswith("memory: about") for line in lines.lines)


def test_what_cannot_fit_is_refused_before_the_base_is_loaded(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "free_bytes", lambda _: 1_000_000)
    monkeypatch.setattr(base, "load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    with pytest.raises(UserError, match=r"memory: about .* MB on the cpu .* but 1.0 MB are free; "):
        finetune(tiny(), say=Stopper())
    assert not Path(tiny().out).exists()


def test_a_record_that_gives_no_number_is_named(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "row_loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(UserError, match=r"tiny.json:\d+: the loss on this record is nan under .* 32"):
        finetune(tiny(), say=Stopper())


def test_an_allocation_that_fails_is_one_line() -> None:
    with pytest.raises(UserError, match=r"out of memory .*; try .* or .*"), enough_memory(needs()):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="size"), enough_memory(needs()):
        torch.ones(2) @ torch.ones(3)


def test_the_second_worker_that_dies_does_not_break_the_first_one_s_line() -> None:
    def as_torch_does(number: int, frame: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 2) is killed by signal: Killed.")

    def die_one_after_the_other() -> None:
        try:
            with enough_memory(needs()):
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        finally:
            signal.raise_signal(signal.SIGCHLD)

    earlier = signal.signal(signal.SIGCHLD, as_torch_does)
    try:
        with pytest.raises(UserError, match=r"a loader process was killed.*\(pid 1\)"):
            die_one_after_the_other()
    finally:
        signal.signal(signal.SIGCHLD, earlier)


def test_dry_run_says_the_plan_and_leaves_nothing(tiny: Callable[..., Config]) -> None:
    lines = Stopper()
    assert finetune(tiny(), say=lines, dry_run=True) == 0
    said = "\n".join(lines.lines)
    for part in (
        r"^data: .* 40 training records, [\d,]+ tokens",
        r"^memory: about .* free",
        r"^disk: .* free",
        r"^model: .* [\d,]+ frozen parameters; adapter: [\d,]+ trained",
        r"^run: 15 steps of 8 records, epochs 3; lr 0.02 .*cosine, warm-up 1 step;",
        r"^time: about \d+ s for 15 steps and 4 validations \(3 steps took",
        r"^dry run: no run was started",
    ):
        assert re.search(part, said, re.MULTILINE), part
    assert not Path(tiny().out).exists()
    # After 0, 4, 8 and 12 steps, and after the last.
    assert finetune(tiny("--trainer.val_every", "4"), say=lines, dry_run=True) == 0
    assert any("for 15 steps and 5 validations" in line for line in lines.lines)


def test_dry_run_of_a_resume_looks_at_the_checkpoint_and_leaves_it(tiny: Callable[..., Config]) -> None:
    assert finetune(tiny(), say=Stopper("step 4/")) == 143
    folder = Path(tiny().out)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    lines = Stopper()
    assert finetune(tiny(), resume="last", say=lines, dry_run=True) == 0
    assert any("for 11 steps and 3 validations" in line for line in lines.lines)
    with pytest.raises(UserError, match="seed was"):
        finetune(tiny("--seed", "3"), resume="last", say=lines, dry_run=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_signal_ends_a_dry_run_with_its_status(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stopwatch, "on_train_batch_end", lambda *_: signal.raise_signal(signal.SIGTERM))
    lines = Stopper()
    assert finetune(tiny(), say=lines, dry_run=True) == 143
    assert lines.lines[-1] == "dry run: stopped by a signal; no run was started"
    assert not Path(tiny().out).exists()


def test_the_forecast_is_tokens_times_measured_seconds() -> None:
    watch = Stopwatch(SimpleNamespace())
    watch.steps = [(9.0, 100), (2.0, 100), (4.0, 200)]
    watch.sample_seconds = 1.5
    length = torch.tensor([10.0, 30.0]).numpy()
    data = SimpleNamespace(
        step_tokens=100.0,
        val_encoded=SimpleNamespace(length=length),
    )
    line = forecast(watch, data, steps=40, validations=10, forward_share=0.5)
    # (40 * 100 + 200) * 0.02 + 10 * 1.5
    assert line.startswith("time: about 99 s for 40 steps and 10 validations")
    assert line.endswith(" tokens/s; the sample answers of one took 1.5 s)")
    assert [duration(s) for s in (7.4, 600, 9000)] == ["7 s", "10 min", "2.5 h"]


def test_a_dry_run_times_the_samples_of_a_validation(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are answered once, as a validation would."""
    asked = []

    def slow(self: AdaptedLlama, pairs: list[Any], **options: Any) -> list[str]:
        asked.append((len(pairs), options["max_new_tokens"]))
        time.sleep(0.3)
        return ["x"] * len(pairs)

    monkeypatch.setattr(AdaptedLlama, "continue_batch", slow)
    options = ("--trainer.samples", "2", "--trainer.sample_tokens", "5", "--optim.max_steps", "4")
    for more, end in (
        ((), r"; the sample answers of one took (\S+) s\)"),
        (("--trainer.samples", "0"), r"tokens/s\)"),
    ):
        lines = Stopper()
        assert finetune(tiny(*options, *more), say=lines, dry_run=True) == 0
        found = re.search(f"{end}$", next(line for line in lines.lines if line.startswith("time:")))
        assert found
        assert all(0.3 <= float(seconds) < 300 for seconds in found.groups())
    assert asked == [(2, 5)]


def test_dry_run_is_an_option_of_the_script() -> None:
    from lit_adapter.cli.finetune import parse_finetune

    assert parse_finetune(["--dry-run"]).dry_run
    assert not parse_finetune([]).dry_run
    assert OptimConfig() == parse_finetune([]).config.optim
