"""A base's files against the checksums of its conversion: what is found, when, and what it costs."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from finetune_runs import TINY
from generation_fixtures import CHOICES, script
from safetensors.torch import load_file

import lit_adapter
from lit_adapter.cli.finetune import parse_finetune
from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.files import locks
from lit_adapter.training.base import read_base
from lit_adapter.training.processes import is_first_of_node
from lit_adapter.weights import base_content
from lit_adapter.weights.base_content import check_content
from lit_adapter.weights.base_folder import read_config
from lit_adapter.weights.convert import convert

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def n_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Bytes of weights compared since the last call."""
    read: list[int] = []

    def crc32(content: bytes, start: int = 0) -> int:
        read.append(memoryview(content).nbytes)
        return zlib.crc32(content, start)

    class Counting:
        pass

    Counting.crc32 = staticmethod(crc32)  # type: ignore[attr-defined]
    monkeypatch.setattr(base_content, "zlib", Counting)

    def since() -> int:
        total = sum(read)
        read.clear()
        return total

    return since


def size(base: Path) -> int:
    return (base / WEIGHTS).stat().st_size


def last_check() -> Path:
    """The one file that checks have left in the cache folder."""
    (path,) = Path(os.environ["LIT_ADAPTER_CACHE"]).iterdir()
    return path


def flip(base: Path, tensor: str, place: float) -> None:
    """Flip a bit of a tensor, at a share of its bytes, in place."""
    with (base / WEIGHTS).open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        begin, end = json.loads(stream.read(length))[tensor]["data_offsets"]
        at = 8 + length + begin + int((end - begin - 1) * place)
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


def as_if_unseen(base: Path) -> None:
    """Have the present size, times and inode be those of the last check, as on a disk that decays."""
    described = json.loads(last_check().read_text())
    s = (base / WEIGHTS).stat()
    described["seen"] = {WEIGHTS: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]}
    last_check().write_text(json.dumps(described))


def make_format_1(base: Path) -> None:
    path = base / "fingerprint.json"
    later = json.loads(path.read_text())
    older = {key: later[key] for key in ("weights", "tokenizer", "files", "source")}
    path.write_text(json.dumps({"format": 1} | older))


EMBEDDING = "model.embed_tokens.weight"


def test_an_unchanged_base_costs_a_page_of_every_tensor(base: Path, n_read: Callable[[], int]) -> None:
    check_content(base)
    whole = n_read()
    assert whole > size(base)
    n_tensors = len(load_file(base / WEIGHTS))
    check_content(base)
    assert 0 < n_read() < n_tensors * (4096 + 100) < whole


@pytest.mark.parametrize("what", ["touched", "copied", "moved", "written again"])
def test_another_file_is_compared_whole_once(base: Path, n_read: Callable[[], int], what: str) -> None:
    check_content(base)
    if what == "touched":
        os.utime(base / WEIGHTS)
    elif what == "copied":
        base = Path(shutil.copytree(base, base.with_name("copy")))
    elif what == "moved":
        base = base.rename(base.with_name("moved"))
    else:
        content = (base / WEIGHTS).read_bytes()
        (base / WEIGHTS).unlink()
        (base / WEIGHTS).write_bytes(content)
    n_read()
    check_content(base)
    assert n_read() > size(base)
    check_content(base)
    assert n_read() < size(base)


@pytest.mark.parametrize("format_", [1, 2])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_one_bit_is_found_wherever_it_is(base: Path, format_: int, place: float) -> None:
    if format_ == 1:
        make_format_1(base)
    flip(base, EMBEDDING, place)
    named = "the weights have" if format_ == 1 else f"tensor {EMBEDDING} has"
    with pytest.raises(
        UserError, match=rf"^{base / WEIGHTS}: {named} changed since the base was converted; "
    ):
        check_content(base)


def test_a_base_that_has_changed_does_not_pass_the_second_time_either(base: Path) -> None:
    flip(base, EMBEDDING, 0.5)
    for _ in range(2):
        with pytest.raises(UserError, match=f"tensor {EMBEDDING} has changed"):
            check_content(base)


def test_a_page_of_every_tensor_is_compared_though_a_file_looks_unchanged(base: Path) -> None:
    check_content(base)
    flip(base, "model.layers.1.mlp.up_proj.weight", 0.5)
    as_if_unseen(base)
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight has changed"):
        check_content(base)


def test_verify_compares_everything_though_a_file_looks_unchanged(base: Path) -> None:
    """The sampled page lies in the middle: only `everything` finds a change at the end."""
    check_content(base)
    flip(base, EMBEDDING, 1.0)
    as_if_unseen(base)
    check_content(base)
    with pytest.raises(UserError, match=f"tensor {EMBEDDING} has changed"):
        check_content(base, everything=True)
    with pytest.raises(UserError, match=f"tensor {EMBEDDING} has changed"):
        lit_adapter.load(base=base, device="cpu", verify=True)
    with pytest.raises(UserError, match=f"tensor {EMBEDDING} has changed"):
        script("--base", base, *CHOICES, "--prompt", "x", "--verify")


@pytest.mark.parametrize(("key", "file"), [("weights", WEIGHTS), ("tokenizer", "tokenizer.json")])
def test_verify_compares_what_adapters_know_the_base_by(base: Path, key: str, file: str) -> None:
    path = base / "fingerprint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "0" * 64}))
    with pytest.raises(UserError, match=rf"{file}.* changed since the base was converted"):
        check_content(base, everything=True)


def test_a_tensor_under_another_name_or_type_is_another_tensor(base: Path) -> None:
    content = (base / WEIGHTS).read_bytes()
    one, other = b'"model.layers.1.mlp.up_proj.weight"', b'"model.layers.2.mlp.up_proj.weight"'
    exchanged = content.replace(one, b"<one>").replace(other, one).replace(b"<one>", other)
    for changed in (exchanged, content.replace(b'"F32"', b'"I32"', 1)):
        assert len(changed) == len(content)
        assert changed != content
        (base / WEIGHTS).write_bytes(changed)
        with pytest.raises(UserError, match=r"tensor \S+ .*has changed"):
            check_content(base)


def test_without_a_cache_folder_everything_is_compared(
    base: Path, monkeypatch: pytest.MonkeyPatch, n_read: Callable[[], int]
) -> None:
    monkeypatch.setenv("LIT_ADAPTER_CACHE", str(base / "config.json"))  # a file, so not a folder
    for _ in range(2):
        check_content(base)
        assert n_read() > size(base)
    flip(base, EMBEDDING, 0.0)
    with pytest.raises(UserError, match=f"tensor {EMBEDDING} has changed"):
        check_content(base)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"seen": 3}', None])
def test_a_damaged_file_of_the_last_check_counts_as_none(
    base: Path, content: str | None, n_read: Callable[[], int]
) -> None:
    check_content(base)
    known = json.loads(last_check().read_text())
    last_check().write_text(json.dumps(known | {"pages": 3}) if content is None else content)
    n_read()
    check_content(base)
    assert n_read() > size(base)


def test_checks_at_the_same_time_compare_everything_once(base: Path, n_read: Callable[[], int]) -> None:
    failed: list[BaseException] = []

    def check() -> None:
        try:
            check_content(base)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=check) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert n_read() < 2 * size(base) + 5 * 50 * 4096
    assert json.loads(last_check().read_text())["version"] == 1


def test_the_configuration_of_an_older_base_is_known_from_the_first_check_on(base: Path) -> None:
    make_format_1(base)
    config = base / "config.json"
    config.write_text(config.read_text().replace('"eos_token_id": 1', '"eos_token_id": 5'))
    lines: list[str] = []
    check_content(base, everything=True, say=lines.append)  # nothing says what it was
    assert lines[0].startswith(f"verified {base}: weights and tokenizer are those that were converted; ")
    config.write_text(config.read_text().replace('"eos_token_id": 5', '"eos_token_id": 1'))
    with pytest.raises(UserError, match=r"config\.json: has changed since"):
        check_content(base)


def test_a_change_that_is_meant_makes_a_new_base_as_the_message_says(base: Path, tmp_path: Path) -> None:
    config = base / "config.json"
    config.write_text(config.read_text().replace('"eos_token_id": 1', '"eos_token_id": 5'))
    with pytest.raises(UserError, match=rf"make a new base: scripts/convert\.py {base} --out ANOTHER$"):
        check_content(base)
    new = convert(base, tmp_path / "new")
    check_content(new, everything=True)
    assert json.loads((new / "config.json").read_text())["eos_token_id"] == 5
    identity = [json.loads((folder / "fingerprint.json").read_text())["weights"] for folder in (base, new)]
    assert identity[0] == identity[1]


@pytest.mark.parametrize("kind", ["pipe", "dangling link", "link to itself"])
def test_what_is_no_regular_file_is_named_and_not_opened(base: Path, kind: str) -> None:
    path = base / "model-2.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if kind == "dangling link" else path.name)
    with pytest.raises(UserError, match=rf"^{path}: was added after the base was converted; remove it"):
        check_content(base, everything=True)


def test_a_pipe_in_place_of_the_last_check_or_of_a_configuration_is_not_opened(base: Path) -> None:
    check_content(base)
    path = last_check()
    path.unlink()
    os.mkfifo(path)
    check_content(base)
    (base / "config.json").unlink()
    os.mkfifo(base / "config.json")
    with pytest.raises(UserError, match=r"config\.json: cannot read: a pipe, socket or device$"):
        read_config(base)


def test_empty_weights_are_named_whatever_the_fingerprint_says(base: Path) -> None:
    (base / WEIGHTS).write_bytes(b"")
    path = base / "fingerprint.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, "files": {**known["files"], WEIGHTS: 0}}))
    with pytest.raises(UserError, match=rf"^{base / WEIGHTS}: the file is empty"):
        check_content(base)


def test_true_is_no_format(base: Path) -> None:
    path = base / "fingerprint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": True}))
    with pytest.raises(UserError, match=r"key 'format' is missing or of another type"):
        check_content(base)


def test_a_path_that_is_not_utf_8_is_refused(base: Path, tiny: Callable[..., Config]) -> None:
    folder = base.with_name(os.fsdecode(b"b\xff")) / "tiny"
    folder.parent.mkdir()
    base.rename(folder)
    for attempt in (
        lambda: check_content(folder),
        lambda: lit_adapter.load(base=folder, device="cpu"),
        lambda: script("--base", folder, *CHOICES, "--prompt", "x"),
        lambda: read_base(replace(tiny(), base=str(folder)), print),
    ):
        with pytest.raises(UserError, match=r"b\\udcff/tiny'.* not (a )?UTF-8"):
            attempt()


@pytest.mark.parametrize("where", ["a" * 300, "/proc/self", "~nobody-at-all/x"])
def test_a_cache_folder_that_cannot_be_is_done_without(
    base: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("LIT_ADAPTER_CACHE", where)
    check_content(base)
    flip(base, EMBEDDING, 0.0)
    with pytest.raises(UserError, match=f"tensor {EMBEDDING} has changed"):
        check_content(base)


def test_the_cache_folder_may_start_with_a_tilde(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LIT_ADAPTER_CACHE", "~/cache")
    check_content(base)
    assert len(list((tmp_path / "cache").glob("base-*.json"))) == 1


def test_a_long_wait_for_another_check_is_reported_once(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_content(base)
    os.utime(base / WEIGHTS)
    monkeypatch.setattr(locks, "REPORT_AFTER", 0.05)
    with locks.one_at_a_time(last_check()):
        waiting = threading.Thread(target=check_content, args=[base])
        waiting.start()
        said, end = "", time.monotonic() + 250
        while not said:
            assert time.monotonic() < end
            waiting.join(0.3)
            said = capsys.readouterr().err
        waiting.join(0.3)
        assert waiting.is_alive()
    waiting.join()
    said += capsys.readouterr().err
    assert said == f"waiting for process {os.getpid()}, which compares the base\n"


def test_verify_shows_escape_sequences_of_a_path(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base.rename(base.with_name("\x1b[31mred"))
    script("--base", base, *CHOICES, "--prompt", "x", "--max_new_tokens", 1, "--verify")
    assert "\x1b" not in (err := capsys.readouterr().err)
    assert "\\x1b[31mred" in err


def test_files_that_decide_nothing_may_come_and_go(base: Path) -> None:
    check_content(base)
    (base / "README.md").write_text("mine")
    (base / "adapter.safetensors").write_bytes(b"an adapter")
    check_content(base, everything=True)


@pytest.mark.parametrize("call", [check_content, lambda base: lit_adapter.load(base=base, device="cpu")])
def test_a_folder_without_a_fingerprint_cannot_be_checked(base: Path, call: Callable[[Path], object]) -> None:
    (base / "fingerprint.json").unlink()
    with pytest.raises(
        UserError, match=r"no fingerprint\.json, so not a converted base; run scripts/convert"
    ):
        call(base)


@pytest.mark.parametrize(
    ("environment", "first"),
    [({}, True), ({"LOCAL_RANK": "0"}, True), ({"LOCAL_RANK": "1"}, False), ({"SLURM_LOCALID": "3"}, False)],
)
def test_one_process_of_a_node_verifies(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], first: bool
) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_of_node() is first


def test_runs_say_that_they_have_verified_their_base(
    base: Path, tiny: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    verified = f"verified {base}: all files and tensors are those that were converted"
    script("--base", base, *CHOICES, "--prompt", "x", "--max_new_tokens", 1, "--verify")
    assert capsys.readouterr().err.splitlines() == [verified]
    lines: list[str] = []
    read_base(tiny("--base", str(base)), lines.append, verify=True)
    assert lines == [verified]
    assert parse_finetune(["--config", str(TINY), "--verify"]).verify
