"""Files under kills and on full disks: the old one or the new one, whole, every time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from generation_fixtures import save_random_adapter
from safetensors import safe_open
from safetensors.torch import save

from lit_adapter.errors import UserError, WriteError
from lit_adapter.files import read
from lit_adapter.files.locks import LockFile, one_at_a_time
from lit_adapter.files.paths import free_path, without_home
from lit_adapter.files.write import check_writable, durable_path, sweep, write_bytes, write_text
from lit_adapter.generation.prompt_file import Answers, read_prompts
from lit_adapter.training.checkpoint import METADATA_KEY, PARTS, DurableCheckpointIO, read_checkpoint
from lit_adapter.weights.adapter_file import read_adapter, save_adapter
from lit_adapter.weights.tensor_writer import Entry, write_tensors

KILLS = 50


def save_for_ever(folder: Path, adapter: Path, started: int) -> None:
    """Write checkpoint and adapter over and over, every number in them the number of the round."""
    info, state = read_adapter(adapter)
    rounds = 1.0
    while True:
        tensors = {"a": torch.full((300_000,), rounds), "b": torch.full((7, 11), rounds)}
        checkpoint = dict.fromkeys(PARTS) | {"state_dict": tensors, "round": rounds}
        DurableCheckpointIO().save_checkpoint(checkpoint, folder / "last.ckpt")
        same = {name: torch.full_like(tensor, rounds) for name, tensor in state.items()}
        save_adapter(folder / "adapter.safetensors", same, info)
        os.write(started, b".")
        rounds += 1


@pytest.mark.slow
def test_fifty_kills_during_saves_leave_whole_files(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at random moments of saving, the system's temporary folder on another file system.

    How many of the moments fall into a save depends on the disk: there are more kills if too few did.
    """
    other = Path("/dev/shm")
    if other.is_dir() and other.stat().st_dev != tmp_path.stat().st_dev:
        monkeypatch.setenv("TMPDIR", str(other))
        monkeypatch.setattr(tempfile, "tempdir", None)
    adapter = save_random_adapter(tiny_base, tmp_path / "start.safetensors")
    draw = random.Random(1337)
    folder, leftovers, rounds = tmp_path / "saved", 0, 0.0
    folder.mkdir()
    for kill in range(10 * KILLS):
        if kill >= KILLS and leftovers > KILLS // 5:
            break
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                save_for_ever(folder, adapter, writing)
            os._exit(1)
        os.close(writing)
        assert os.read(reading, 1) == b"."  # both files are there
        time.sleep(draw.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        os.close(reading)
        found = read_checkpoint(folder / "last.ckpt")
        rounds = found["round"]
        assert all(bool((tensor == rounds).all()) for tensor in found["state_dict"].values())
        state = read_adapter(folder / "adapter.safetensors")[1]
        assert {float(value) for tensor in state.values() for value in tensor.flatten()} <= {
            rounds,
            rounds - 1,
        }
        leftovers += len(list(folder.glob(".*.tmp")))
        sweep(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "last.ckpt"]
    assert leftovers > KILLS // 5  # the kills did fall into saves
    if other.is_dir():
        assert not list(other.glob(".last.ckpt*"))


def test_a_checkpoint_is_json_whatever_its_numbers_are_and_older_ones_are_read(tmp_path: Path) -> None:
    """Before the first validation its loss is not a number; older files have a bare NaN there."""
    path, numbers = tmp_path / "a.ckpt", [float("nan"), float("inf"), -float("inf"), 0.1]
    DurableCheckpointIO().save_checkpoint(
        dict.fromkeys(PARTS) | {"state_dict": {}, "measured": numbers}, path
    )

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    with safe_open(path, framework="pt") as file:
        json.loads(file.metadata()[METADATA_KEY], parse_constant=refuse)
    assert repr(read_checkpoint(path)["measured"]) == repr(numbers)
    older = json.dumps(["dict", [[key, ["list", numbers]] for key in sorted(PARTS)]])
    digest = hashlib.sha256(older.encode()).hexdigest()
    path.write_bytes(save({}, metadata={METADATA_KEY: older, "sha256": digest}))
    assert repr(read_checkpoint(path)["measured"]) == repr(numbers)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A file system of one megabyte where mounting is allowed, else a limit of 600 kB on files."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def of_bytes(path: Path, size: int) -> None:
    write_bytes(path, bytes(size))


def of_checkpoint(path: Path, size: int) -> None:
    DurableCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(size // 4)}}, path)


def of_base(path: Path, size: int) -> None:
    """The weights of a converted base, streamed tensor by tensor."""
    tensor = torch.zeros(size // 4)
    entries = [Entry("a", (size // 4,), torch.float32)]
    write_tensors(path.parent, entries, lambda _: tensor, str)


def of_answers(path: Path, size: int) -> None:
    """The output of a file of prompts."""
    source = path.with_name("prompts.jsonl")
    source.write_text('{"instruction": "a"}\n')
    answers = Answers(path, read_prompts(source), {}, group=1, overwrite=True)
    answers.run(lambda part: [{"output": "x" * size} for _ in part])


WRITERS = {
    "bytes": (of_bytes, "file"),
    "checkpoint": (of_checkpoint, "file"),
    "base": (of_base, "model.safetensors"),
    "answers": (of_answers, "file"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_says_how_much_is_missing(kind: str, tmp_path: Path) -> None:
    write, name = WRITERS[kind]
    folder = tmp_path / "disk"
    folder.mkdir()
    path = folder / name
    with full_disk(folder):
        write(path, 100_000)
        old = path.read_bytes()
        with pytest.raises(UserError) as caught:
            write(path, 2_000_000)
        message = str(caught.value)
        partial = ".file.partial" if kind == "answers" else name
        assert message.startswith(f"{folder / partial}: cannot write: ")
        assert "bytes free" in message
        assert "needs" in message
        assert "free some space or choose another place" in message
        assert path.read_bytes() == old
        assert not list(folder.glob("*.tmp"))
        write(path, 100_000)  # and it is still a place to write to


def test_the_temporary_file_lies_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    with durable_path(tmp_path / "a") as temporary:
        temporary.write_bytes(b"x")
        assert temporary.parent == tmp_path
    assert (tmp_path / "a").read_bytes() == b"x"


WRITE = """
import sys
from pathlib import Path
from lit_adapter.files.write import write_text
from lit_adapter.weights.output_folder import move_into_place, scratch_folder

folder = Path(sys.argv[1])
write_text(folder / "file", "private")
with scratch_folder(folder / "out") as scratch:
    write_text(scratch / "inner", "private")
    move_into_place(scratch, folder / "out")
"""


@pytest.mark.parametrize("mask", [0o077, 0o002, 0o022])
def test_rights_are_those_of_the_users_umask(mask: int, tmp_path: Path) -> None:
    """What Python's own open and mkdir would give."""
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path)], umask=mask, check=True)
    rights = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert rights == {"file": 0o666 & ~mask, "out": 0o777 & ~mask, "inner": 0o666 & ~mask}


def leftover(folder: Path, name: str, seconds: float) -> Path:
    path = folder / name
    path.write_bytes(b"half")
    os.utime(path, (time.time() - seconds, time.time() - seconds))
    return path


def test_leftovers_go_at_the_next_write_of_the_same_file(tmp_path: Path) -> None:
    old = leftover(tmp_path, ".a[1].xyz.tmp", 100)
    young = leftover(tmp_path, ".a[1].abc.tmp", 1)
    other = leftover(tmp_path, ".b.xyz.tmp", 100)
    write_bytes(tmp_path / "a[1]", b"x")
    assert (old.exists(), young.exists(), other.exists()) == (False, True, True)
    assert sweep(tmp_path) == 2
    assert not list(tmp_path.glob(".*"))


def test_what_another_process_is_writing_is_no_leftover(tmp_path: Path) -> None:
    """Its lock says so, however old the file is."""
    with durable_path(tmp_path / "a") as temporary:
        temporary.write_bytes(b"new")
        os.utime(temporary, (0, 0))
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, str(sweep(tmp_path)).encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reading, 10) == b"0"
    assert (tmp_path / "a").read_bytes() == b"new"


def write_half(path: Path, error: BaseException) -> None:
    with durable_path(path) as temporary:
        temporary.write_text("half")
        raise error


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_text(path, "old")
    for error in (KeyboardInterrupt(), ValueError("x"), OSError(errno.EIO, "broken")):
        with pytest.raises((KeyboardInterrupt, ValueError, UserError)):
            write_half(path, error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_probe_leaves_nothing_and_names_what_cannot_be_written(tmp_path: Path) -> None:
    check_writable(tmp_path / "deep" / "run")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"/proc/run: cannot write: .*; choose a writable place"):
        check_writable(Path("/proc/run"))


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    """Before a file's suffix, and at the end of a folder's name, whose dots mean nothing."""
    assert free_path(tmp_path / "run.v2") == tmp_path / "run.v2"
    for name in ("run.v2", "run.v2-2", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-8.aside").touch()
    assert free_path(tmp_path / "run.v2") == tmp_path / "run.v2-3"
    assert free_path(tmp_path / "run") == tmp_path / "run-2"
    assert free_path(tmp_path / "step-8.aside") == tmp_path / "step-8-2.aside"


def test_a_path_below_home_is_saved_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    shortened: Callable[[str], str] = without_home
    assert shortened("/home/me/base") == "~/base"
    assert shortened("/home/me") == "~"
    assert shortened("/home/meat/base") == "/home/meat/base"
    assert shortened("checkpoints/base") == "checkpoints/base"


def test_json_beyond_all_reason_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_JSON_BYTES", 100)
    path = tmp_path / "config.json"
    path.write_text('"' + "x" * 200 + '"')
    with pytest.raises(UserError, match=r"config.json: 202 bytes of JSON; expected 100 or less"):
        read.read_json(path)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_a_folder_that_takes_no_files_does_not_keep_anybody_waiting() -> None:
    with one_at_a_time(Path("/proc/self/x")):
        pass
    with pytest.raises(WriteError, match=r"^/proc/self/lock: cannot write: No such file"):
        LockFile(Path("/proc/self/lock"), Path("x"), "--out").acquire()


def test_whoever_waited_is_inside_alone(tmp_path: Path) -> None:
    """A lock file goes with its holder: the next one must not hold the lock of a file without a name."""
    inside, leave = threading.Event(), threading.Event()

    def wait_for_the_first() -> None:
        with one_at_a_time(tmp_path / "x"):
            inside.set()
            leave.wait(300)

    second = threading.Thread(target=wait_for_the_first)
    with one_at_a_time(tmp_path / "x"):
        second.start()
        assert not inside.wait(0.5)
    assert inside.wait(300)
    with pytest.raises(UserError, match=f"x: in use by process {os.getpid()}; wait for it, or"):
        one_at_a_time(tmp_path / "x", wait=False).__enter__()
    leave.set()
    second.join()
    assert list(tmp_path.iterdir()) == []
