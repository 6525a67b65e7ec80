"""The run folder by itself: what is set aside, and who may have the folder."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import Stopper, arguments
from warm_runs import two_ranks

from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.model.adapter import adapter_state
from lit_adapter.training import callbacks, module
from lit_adapter.training.checkpoint import read_checkpoint
from lit_adapter.training.finetune import finetune
from lit_adapter.training.run_folder import RunFolder
from lit_adapter.weights.adapter_file import read_adapter


def test_nothing_that_was_set_aside_is_replaced(tmp_path: Path) -> None:
    """Three branches from step 4, each with a step 8 of its own."""
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    lines: list[str] = []
    for content in ("first", "second", "third"):
        folder.checkpoint_path(4).write_text("start")
        folder.checkpoint_path(8).write_text(content)
        folder.set_aside(4, lines.append)
    found = {path.name: path.read_text() for path in folder.checkpoints.iterdir()}
    assert found == {
        "step-0000004.ckpt": "start",
        "step-0000008.aside": "first",
        "step-0000008-2.aside": "second",
        "step-0000008-3.aside": "third",
    }
    assert [line.rpartition(" ")[2] for line in lines] == [
        "step-0000008.aside",
        "step-0000008-2.aside",
        "step-0000008-3.aside",
    ]


FORK = multiprocessing.get_context("fork")
ROUNDS = 30


def test_one_of_two_that_start_at_once_gets_the_folder(tmp_path: Path) -> None:
    together, results = FORK.Barrier(2), FORK.Queue()
    both = [FORK.Process(target=_open_often, args=(tmp_path, together, results)) for _ in range(2)]
    for process in both:
        process.start()
    found = [results.get(timeout=250) for _ in both]
    for process in both:
        process.join()
    assert all({one, other} == {True, False} for one, other in zip(*found, strict=True)), found


def test_what_a_run_is_just_writing_or_was_when_killed_is_no_run(tmp_path: Path) -> None:
    run, half_written = tmp_path / "run", tmp_path / "run" / ".config.yaml.abc.tmp"
    run.mkdir()
    half_written.touch()
    holder = FORK.Process(target=_open_and_wait, args=(run, has_it := FORK.Event()), daemon=True)
    holder.start()
    assert has_it.wait(250)
    half_written.touch()
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
        RunFolder(run).open(resume=False)
    holder.kill()
    holder.join()
    folder = RunFolder(run)
    folder.open(resume=False)
    folder.close()
    assert list(tmp_path.iterdir()) == []


def _open_and_wait(path: Path, has_it: Event) -> None:
    RunFolder(path).open(resume=False)
    has_it.set()
    signal.pause()


def _open_often(path: Path, together: Barrier, results: Any) -> None:
    won: list[bool | str] = []
    for number in range(ROUNDS):
        folder = RunFolder(path / f"{number}")
        together.wait(250)
        try:
            folder.open(resume=False)
            won.append(True)
        except UserError as error:
            won.append("in use by" not in str(error) and str(error))
        together.wait(250)
        folder.close()
    results.put(won)


def test_the_lock_goes_with_its_process_also_where_its_number_lives_on(tmp_path: Path) -> None:
    killed = FORK.Process(target=_open_and_die, args=(tmp_path / "run",))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    lock = tmp_path / "run" / ".lock"
    assert lock.read_text() == str(killed.pid)
    lock.write_text(str(os.getppid()))
    folder = RunFolder(tmp_path / "run")
    folder.open(resume=False)
    assert lock.read_text() == str(os.getpid())
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_does_not_keep_the_lock_of_its_killed_parent(tmp_path: Path) -> None:
    """As loader workers, which may outlive a killed trainer."""
    reading, writing = os.pipe()
    killed = FORK.Process(target=_open_fork_and_die, args=(tmp_path / "run", writing))
    killed.start()
    killed.join()
    child = int(os.read(reading, 20))
    folder = RunFolder(tmp_path / "run")
    folder.open(resume=False)
    folder.close()
    os.kill(child, signal.SIGKILL)  # it was alive until now
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "missing" / "file")
    with pytest.raises(UserError, match=r"\.lock: cannot write"):
        RunFolder(tmp_path).open(resume=False)


def _open_and_die(path: Path) -> None:
    RunFolder(path).open(resume=False)
    os.kill(os.getpid(), signal.SIGKILL)


def _open_fork_and_die(path: Path, writing: int) -> None:
    RunFolder(path).open(resume=False)
    child = os.fork()
    if child:
        os.write(writing, str(child).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def test_without_locks_the_process_in_the_lock_file_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    other = FORK.Process(target=signal.pause)
    other.start()
    lock = tmp_path / ".lock"
    lock.write_text(str(other.pid))
    with pytest.raises(UserError, match=rf"in use by process {other.pid}; wait for it"):
        RunFolder(tmp_path).open(resume=False)
    assert lock.read_text() == str(other.pid)
    other.terminate()
    other.join()
    RunFolder(tmp_path).open(resume=False)
    assert lock.read_text() == str(os.getpid())


@pytest.mark.parametrize(("at", "left"), [(2, "checkpoints/step-0000004.ckpt"), (4, "adapter.safetensors")])
def test_nothing_is_written_where_a_folder_was_before_a_validation_ended(
    tiny: Callable[..., Config], at: int, left: str
) -> None:
    """The validation of step 2 would write an adapter; the run ends after that of step 4."""
    config = tiny("--optim.max_steps", "4", "--trainer.val_every", "2", "--trainer.samples", "0")
    out = Path(config.out)

    def say(line: str) -> None:
        if line.startswith(f"step {at}: held-out loss"):
            out.rename(out.with_name("elsewhere"))

    with pytest.raises(UserError, match=r"run: the run folder was moved or deleted .*run\.rescued"):
        finetune(config, say=say)
    assert not out.exists()
    assert (out.with_name("run.rescued") / left).is_file()
    assert not (out.with_name("elsewhere") / "adapter.safetensors").exists()


def test_a_folder_that_moves_just_before_its_best_adapter_is_written_is_not_made_again(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--trainer.val_every", "1", "--trainer.save_every", "2", "--trainer.samples", "0")
    config = tiny("--optim.max_steps", "2", *options)
    out = Path(config.out)

    def moving(model: Any) -> Any:
        out.rename(out.with_name("elsewhere"))
        return adapter_state(model)

    monkeypatch.setattr(callbacks, "adapter_state", moving)
    with pytest.raises(UserError, match=r"moved or deleted .*step 2 is saved in .*run\.rescued"):
        finetune(config, say=lambda line: None)
    assert not out.exists()


@pytest.mark.parametrize(("is_deleted", "lowest"), [(False, (2, 1.0)), (True, (4, 2.0))])
def test_a_rescued_run_keeps_its_best_adapter_or_says_which_it_has(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, is_deleted: bool, lowest: tuple[int, float]
) -> None:
    """The lowest loss is that of step 2; its adapter is lost with a folder that is deleted."""
    losses = {0: 3.0, 2: 1.0, 4: 2.0}

    def measured(self: Any) -> None:
        step = self.trainer.global_step
        self.validated_step, self.val_loss = step, losses[step]

    monkeypatch.setattr(module.LitAdapter, "on_validation_epoch_end", measured)
    options = ("--optim.max_steps", "4", "--trainer.val_every", "2", "--trainer.samples", "0")
    config, rescued = tiny(*options), tiny(*options, out="run.rescued")
    out, moved, lines = Path(config.out), Path(config.out).with_name("elsewhere"), Stopper()

    def say(line: str) -> None:
        if line.startswith("step 3/"):
            out.rename(moved)
            if is_deleted:
                shutil.rmtree(moved)

    with pytest.raises(UserError, match="moved or deleted"):
        finetune(config, say=say)
    assert finetune(rescued, resume="last", say=lines) == 0
    best = Path(rescued.out) / "best.safetensors"
    training = read_adapter(best)[0].training
    assert (training["steps"], training["val_loss"]) == lowest
    recorded = json.loads((best.parent / "run.json").read_text())["loss"]["lowest"]
    assert (recorded["step"], recorded["loss"]) == lowest
    assert is_deleted or best.read_bytes() == (moved / "best.safetensors").read_bytes()
    said = [line for line in lines.lines if "the lowest" in line]
    assert len(said) == (not is_deleted), said


@pytest.mark.slow
def test_two_processes_end_where_their_folder_is_gone(
    tiny_base: Path, tiny_records: Path, tmp_path: Path
) -> None:
    """Only the first looks; both have to save together, and neither waits for the other."""
    cache, out = {"LIT_ADAPTER_CACHE": str(tmp_path / "cache")}, tmp_path / "run"
    options = ["--optim.epochs", "3000", "--trainer.val_every", "100000", "--trainer.samples", "0"]
    command = arguments(tiny_base, tiny_records, out, *options)
    first, second = two_ranks(command, tmp_path / "log", cache)
    first.wait_for("step 3/")
    out.rename(tmp_path / "elsewhere")
    assert first.wait() == 2, first.output
    assert second.wait() == 2, second.output
    assert not out.exists()
    (saved,) = (tmp_path / "run.rescued" / "checkpoints").iterdir()
    step = read_checkpoint(saved)["global_step"]
    assert first.output.splitlines()[-1] == (
        f"error: {out}: the run folder was moved or deleted while the run went on; step {step} is saved in "
        f"{out}.rescued: go on with --out {out}.rescued --resume last"
    )


def test_the_adapter_of_an_unfinished_run_is_said_to_come(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    adapter = run / "adapter.safetensors"
    with pytest.raises(UserError, match="no such adapter file"):  # bases have a folder of this name too
        read_adapter(adapter)
    (run / "checkpoints" / "step-0000002.ckpt").touch()
    with pytest.raises(UserError, match=r"run holds an unfinished run, .* --resume last$"):
        read_adapter(adapter)
    (run / "best.safetensors").touch()
    with pytest.raises(UserError, match=r" --resume last; \S+/run/best\.safetensors is there$"):
        read_adapter(adapter)
    with pytest.raises(UserError, match=r"run: is a folder; name the adapter's file; .*best\.safetensors is"):
        read_adapter(run)
