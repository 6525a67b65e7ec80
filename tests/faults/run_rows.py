"""Faults 59 to 79: disks, folders, checkpoints and numbers while a run is going on.

Kills, signals and several processes have tests of their own, which docs/faults.md names.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import Bench, Outcome, Row
from safetensors.torch import load_file, save_file

from lit_adapter.model.loss import row_loss
from lit_adapter.training.callbacks import Checkpoints
from lit_adapter.training.checkpoint import DurableCheckpointIO, read_checkpoint


def resumed(change: Callable[[Path], object], *options: object) -> Callable[[Bench], Outcome]:
    """Change a finished run of six steps, then resume it for three more."""

    def tried(bench: Bench) -> Outcome:
        change(bench.copy_finished_run())
        common = ["--trainer.save_every", 2, "--trainer.samples", 0]
        more = [] if "--optim.max_steps" in options else ["--optim.max_steps", 9]
        resume = [] if "--resume" in options else ["--resume", "last"]
        outcome = bench.finetune(*common, *more, *resume, *options)
        if outcome.status == 0:
            bench.before = {}  # a run that goes on replaces its files
        return outcome

    return tried


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*.ckpt"))[-1]


def with_newest(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda run: change(newest(run))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def damage_all(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        truncate(path)


def dangling(run: Path) -> None:
    (run / "checkpoints" / "step-0000099.ckpt").symlink_to("nowhere.ckpt")


def older_by_time(run: Path) -> None:
    """The clock went backwards: the older checkpoint looks newer."""
    for number, path in enumerate(sorted((run / "checkpoints").iterdir(), reverse=True)):
        os.utime(path, (10**9 + number, 10**9 + number))


def foreign(run: Path) -> None:
    """An adapter file in a checkpoint's place."""
    shutil.copy(run / "adapter.safetensors", newest(run))


def without(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def file_size_limit(bench: Bench) -> Outcome:
    """No file may grow beyond 12 kB, as on a disk that is full: the first save fails."""
    run = bench.copy_finished_run()
    options = ["--optim.max_steps", 9, "--trainer.save_every", 1, "--trainer.samples", 0, "--resume", "last"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        outcome = bench.finetune(*options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    usable = [read_checkpoint(path)["global_step"] for path in sorted((run / "checkpoints").iterdir())]
    assert usable == [4, 6]
    for name in ("config.yaml", "run.json"):  # those of the resumed run, which did begin
        bench.before.pop(run / name)
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    return outcome


def temporary_folder_gone(bench: Bench) -> Outcome:
    """Nothing of a run needs the system's temporary folder."""
    bench.monkeypatch.setenv("TMPDIR", str(bench.folder / "nowhere"))
    return resumed(lambda run: None, "--optim.max_steps", 7)(bench)


def folder_gone(change: Callable[[Path], object]) -> Callable[[Bench], Outcome]:
    """The run folder goes while the run is going on; the run can be continued beside the old place."""

    def tried(bench: Bench) -> Outcome:
        save = Checkpoints.on_train_batch_end

        def on_train_batch_end(self: Checkpoints, trainer: Any, *rest: Any) -> None:
            if trainer.global_step == 2:
                change(bench.out)
                there = bench.snapshot()
                bench.before.update(there)  # what is moved, or put in its place, is left alone
            save(self, trainer, *rest)

        options = ["--optim.max_steps", 4, "--trainer.save_every", 2, "--trainer.samples", 0]
        with bench.monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "on_train_batch_end", on_train_batch_end)
            outcome = bench.finetune(*options)
        assert not bench.out.exists() or not any(bench.out.iterdir())
        before = bench.before
        rescued = bench.out.with_name("run.rescued")
        again = bench.finetune(*options, "--out", rescued, "--resume", "last")
        assert again.status == 0, again.err
        assert "resuming from" in again.out
        assert "step 2, the newest complete" in again.out
        bench.before = before
        return outcome

    return tried


def moved_and_replaced(run: Path) -> None:
    run.rename(run.with_name("elsewhere"))
    run.mkdir()


def killed_worker(bench: Bench) -> Outcome:
    """A loader worker dies, as the kernel's out-of-memory killer does it."""
    bench.monkeypatch.setattr("lit_adapter.data.module.follow_parent", os._exit)
    return bench.finetune("--data.workers", 1, "--optim.max_steps", 2)


def not_finite(bench: Bench) -> Outcome:
    """A checkpoint that holds NaN is not written."""
    state = {"state_dict": {"layers.0.self_attn.prefix.gate": torch.tensor([torch.nan])}}
    return bench.call(DurableCheckpointIO().save_checkpoint, state, bench.folder / "step-0000001.ckpt")


def rate_too_high(bench: Bench) -> Outcome:
    options = [
        "--optim.lr",
        "1e20",
        "--optim.warmup",
        0,
        "--optim.clip",
        "null",
        "--adapter.gate",
        "identity",
    ]
    return bench.finetune(*options, "--trainer.samples", 0, "--data.val_size", 0)


def spike(bench: Bench) -> Outcome:
    """The loss jumps in the middle of a run: a line says so and the run goes on."""
    calls = iter(range(1000))

    def jumping(*args: object, **kwargs: object) -> torch.Tensor:
        return row_loss(*args, **kwargs) * (1000 if next(calls) > 10 else 1)

    bench.monkeypatch.setattr("lit_adapter.training.module.row_loss", jumping)
    return bench.finetune("--trainer.samples", 0, "--data.val_size", 0)


def other_base(bench: Bench) -> Outcome:
    """A base with other weights and another tokenizer than the run had."""

    def change(source: Path) -> None:
        state = load_file(source / "model.safetensors")
        state["model.norm.weight"] += 1
        save_file(state, source / "model.safetensors")
        edit(source / "tokenizer_config.json", add_bos_token=False)

    return resumed(lambda run: None, "--base", bench.new_base(change))(bench)


def other_numbers(bench: Bench) -> Outcome:
    """The same weights under another configuration, and another context, which no number depends on."""
    values = {"rms_norm_eps": 0.5, "max_position_embeddings": 4096}
    base = bench.new_base(lambda source: edit(source / "config.json", **values))
    return resumed(lambda run: None, "--base", base)(bench)


def other_stop_ids(source: Path) -> None:
    edit(source / "generation_config.json", eos_token_id=[1, 7])


def more_records(bench: Bench) -> Outcome:
    records = json.loads(bench.records.read_text())
    path = bench.file("more.json", [*records, {"instruction": "Say it", "output": "It"}])
    return resumed(lambda run: None, "--data.train", path)(bench)


def moved(bench: Bench) -> Outcome:
    """The folder of a run goes elsewhere; its configuration still names the old place."""
    run = bench.copy_finished_run()
    config = run.rename(run.with_name("moved")) / "config.yaml"
    config.write_text(config.read_text().replace(str(bench.finished), str(run)))
    return bench.finetune("--config", config, "--resume", "last")


def other_held_out_records(bench: Bench) -> Outcome:
    """Held-out records in a file, where they were a part of the training records."""
    path = bench.file("val.json", [{"instruction": "Say it", "output": "It"}])
    return resumed(lambda run: None, "--data.val", path)(bench)


def devices_that_do_not_divide(bench: Bench) -> Outcome:
    """More devices are allowed on a resume, and said: a step's records are dealt out anew."""
    return resumed(lambda run: None, "--trainer.devices", "1", "--data.workers", 1)(bench)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


READ_ONLY = "/proc/run"
GONE = (
    r"/run: the run folder was moved or deleted while the run went on; step 2 is saved in .*/run\.rescued: "
    r"go on with --out .*/run\.rescued --resume last$"
)
AGAIN = r"trying the one before[\s\S]*resuming from .*step-0000004\.ckpt: step 4, the newest complete"

ROWS = [
    Row(
        59,
        "full disk",
        file_size_limit,
        r"step-0000007\.ckpt: cannot write: File too large \(needs [\d,]+ bytes, [\d,]+ bytes free\)",
        2,
        True,
    ),
    Row(60, "no temporary folder", temporary_folder_gone, r"wrote .*adapter\.safetensors", 0, True),
    Row(
        61,
        "read-only folder",
        lambda b: b.finetune("--out", READ_ONLY),
        r"/proc/run.*: cannot write: .*; choose a",
    ),
    Row(62, "folder deleted", folder_gone(shutil.rmtree), GONE, 2, True),
    Row(62, "folder moved and replaced", folder_gone(moved_and_replaced), GONE, 2, True, slow=True),
    Row(69, "worker killed", killed_worker, r"a loader process was killed.*data.workers", 2, True, slow=True),
    Row(70, "truncated checkpoint", resumed(with_newest(truncate)), AGAIN, 0, True),
    Row(70, "empty checkpoint", resumed(with_newest(lambda p: p.write_bytes(b""))), AGAIN, 0, True),
    Row(
        70,
        "text for a checkpoint",
        resumed(with_newest(lambda p: p.write_text("x" * 900))),
        AGAIN,
        0,
        True,
        slow=True,
    ),
    Row(70, "foreign checkpoint", resumed(foreign), AGAIN, 0, True, slow=True),
    Row(
        70,
        "no usable checkpoint",
        resumed(damage_all),
        r"none of its 2 checkpoints is usable; start again",
        2,
    ),
    Row(70, "named and damaged", lambda b: _named(b), r"step-0000006\.ckpt: not a usable checkpoint"),
    Row(
        70, "by URL", lambda b: b.finetune("--resume", "https://x/y.ckpt"), r"no such run folder|a URL; give"
    ),
    Row(
        71, "no run folder", lambda b: b.finetune("--resume", "last"), r"run: no such run folder, nothing to"
    ),
    Row(
        71, "no checkpoint", resumed(without), r"run: cannot resume: it holds no checkpoint; start again with"
    ),
    Row(
        72,
        "dangling link",
        resumed(dangling),
        r"no such checkpoint[\s\S]*step-0000006\.ckpt: step 6",
        0,
        True,
    ),
    Row(
        73,
        "other rate",
        resumed(lambda run: None, "--optim.lr", 0.01),
        r"optim.lr changed from 0.02 to 0.01",
        0,
        True,
    ),
    Row(
        73,
        "other batch",
        resumed(lambda run: None, "--optim.batch_size", 4),
        r"optim.batch_size was 8, now 4",
    ),
    Row(
        73,
        "other base",
        other_base,
        r"another run: base \S+other: its weights are not those of \S+tiny with which the run began; "
        r"base \S+other: its tokenizer is not that of \S+tiny with which the run began$",
    ),
    Row(73, "other numbers", other_numbers, r"another run: base.norm_eps was 1e-06, now 0.5$"),
    Row(
        73,
        "other held-out records",
        other_held_out_records,
        r"another run: data.val \S+val\.json: other records are held out \(8 records then, 1 now\)$",
    ),
    Row(
        73,
        "more records",
        more_records,
        r"another run: data\.train \S+more\.json: its records have changed \(48 records then, 49 now\)$",
    ),
    Row(
        73,
        "another split",
        resumed(lambda run: None, "--data.val_size", 5),
        r"another run: data.val, data.val_size: other records are held out \(8 records then, 5 now\)$",
    ),
    Row(
        73,
        "another template",
        resumed(lambda run: None, "--data.template", "alpaca-newline"),
        r"another run: data\.template: its kind was 'alpaca', now 'alpaca-newline'$",
    ),
    Row(
        73,
        "other stop ids",
        lambda b: resumed(lambda run: None, "--base", b.new_base(other_stop_ids))(b),
        r"another run: base\.stop_ids was \[1\], now \[1, 7\]$",
    ),
    Row(
        71,
        "folder moved",
        moved,
        r"run: no such run folder.* if the folder was moved, give its place with --out$",
    ),
    Row(73, "other seed", resumed(lambda run: None, "--seed", 4), r"seed was 1337, now 4"),
    Row(
        73,
        "other prompts",
        resumed(lambda run: None, "--adapter.prompt_length", 5),
        r"prompt_length was 4, now 5",
    ),
    Row(
        73, "other precision", resumed(lambda run: None, "--trainer.precision", "bf16-true"), r"precision was"
    ),
    Row(74, "other loaders", devices_that_do_not_divide, r"data.workers changed from 0 to 1", 0, True),
    Row(
        75,
        "finished run",
        resumed(lambda run: None, "--optim.max_steps", 6),
        r"already complete, 6 steps",
        0,
        True,
    ),
    Row(
        75,
        "finished run, fewer steps planned",
        resumed(lambda run: None, "--optim.max_steps", 5),
        r"has 6 steps, more than the 5 of this run; set optim.max_steps to 6 or more",
    ),
    Row(
        77,
        "nan in a checkpoint",
        not_finite,
        r"step-0000001\.ckpt: not written: .* has NaN or infinite values",
    ),
    Row(
        77,
        "nan while training",
        rate_too_high,
        r"step \d+: loss .* skipped .* in a row.*tiny\.json:\d+",
        2,
        True,
    ),
    Row(78, "loss spike", spike, r"the loss jumped to .*; a lower optim.lr may help", 0, True),
    Row(
        79,
        "clock gone backwards",
        resumed(older_by_time),
        r"resuming from .*step-0000006\.ckpt: step 6",
        0,
        True,
    ),
]


def _named(bench: Bench) -> Outcome:
    run = bench.copy_finished_run()
    truncate(newest(run))
    return bench.finetune("--resume", newest(run), "--optim.max_steps", 9)
