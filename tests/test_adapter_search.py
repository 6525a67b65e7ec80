"""An adapter is named by its file, its run's folder or its run's name, wherever one is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from generation_fixtures import CHOICES, save_random_adapter, script

from lit_adapter.errors import UserError
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.serving.errors import ApiError
from lit_adapter.serving.loading import load_adapters
from lit_adapter.serving.names import named_adapters
from lit_adapter.serving.options import ServerOptions
from lit_adapter.weights.adapter_search import find_adapter


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run, from whose grandparent commands are given."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out" / "colours"
    folder.mkdir(parents=True)
    save_random_adapter(tiny_base, folder / "adapter.safetensors")
    return folder


def test_generate_takes_a_run(run: Path, tiny_base: Path) -> None:
    fixed = ("--base", tiny_base, "--prompt", "Say it.", "--max_new_tokens", 8, *CHOICES)
    wanted = script("--adapter", run / "adapter.safetensors", *fixed)
    assert wanted != script(*fixed)
    for name in (run, "out/colours", "colours"):
        assert script("--adapter", name, *fixed) == wanted


def test_an_empty_name_is_not_the_working_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert find_adapter(".") == Path("adapter.safetensors")
    with pytest.raises(UserError, match="the adapter's name is empty"):
        find_adapter("")


def test_a_server_takes_a_run_and_its_name(run: Path, tiny_base: Path) -> None:
    shutil.copy(run / "adapter.safetensors", "plain.safetensors")
    file = Path("out/colours/adapter.safetensors")
    for word in ("out/colours", "colours", str(file)):
        assert named_adapters([word]) == {"colours": file}
    assert named_adapters(["colours", "plain.safetensors", "x=colours"]) == {
        "colours": file,
        "plain": Path("plain.safetensors"),
        "x": file,
    }
    options = ServerOptions(
        adapters=named_adapters([str(run)]), base=tiny_base, device="cpu", dtype="float32"
    )
    assert [served.name for served in load_adapters(options)][1:] == ["colours"]


def test_a_word_that_may_mean_two_things_is_refused(run: Path, tiny_base: Path) -> None:
    for name in ("x=plain.safetensors", "plain.safetensors"):
        shutil.copy(run / "adapter.safetensors", name)
    with pytest.raises(
        UserError, match=r"is a file, but may also mean the file plain.safetensors .* name x;"
    ):
        named_adapters(["x=plain.safetensors"])
    assert named_adapters(["y=x=plain.safetensors"]) == {"y": Path("x=plain.safetensors")}
    assert named_adapters(["x=./plain.safetensors"]) == {"x": Path("plain.safetensors")}


def test_a_name_that_the_folder_has_too_is_refused(run: Path, tiny_base: Path) -> None:
    shutil.copytree(run, "adapters/colours")
    given = {"base": tiny_base, "folder": Path("adapters"), "device": "cpu", "dtype": "float32"}
    options = ServerOptions(adapters=named_adapters(["colours"]), **given)
    with pytest.raises(UserError, match=r"--adapter colours: adapters/colours/.* has the same name"):
        load_adapters(options)
    options = ServerOptions(adapters=named_adapters(["adapters/colours"]), **given)
    assert len(load_adapters(options)) == 1


def test_a_folder_of_adapters_names_the_base(run: Path, tiny_base: Path) -> None:
    """Whatever else is in it; what cannot be read is told only where nothing else can."""
    Path("checkpoints").mkdir()
    Path("checkpoints", tiny_base.resolve().name).symlink_to(tiny_base)
    broken = Path("adapters/broken/adapter.safetensors")
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"not an adapter")
    options = ServerOptions(folder=Path("adapters"), device="cpu", dtype="float32")
    with pytest.raises(UserError, match=str(broken)):
        load_adapters(options)
    shutil.copytree(run, "adapters/colours")
    assert [served.name for served in load_adapters(options)][1:] == ["colours"]


NONE = "adapter name 'none' means the plain base; give the adapter another"


@pytest.mark.parametrize("word", ["none=colours", "out/none", "none", "none.safetensors"])
def test_the_name_of_the_plain_base_is_refused(run: Path, word: str) -> None:
    shutil.copytree(run, "out/none")
    shutil.copy(run / "adapter.safetensors", "none.safetensors")
    with pytest.raises(UserError, match=NONE):
        named_adapters([word])


def test_a_folder_cannot_have_the_name_of_the_plain_base(
    run: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run, "adapters/none")
    shutil.copytree(run, "adapters/colours")
    options = ServerOptions(base=tiny_base, folder=Path("adapters"), device="cpu", dtype="float32")
    adapters = load_adapters(options)
    for _ in range(2):
        adapters.scan()
    assert [served.name for served in adapters][1:] == ["colours"]
    assert [record.getMessage() for record in caplog.records if "none" in record.getMessage()] == [
        f"adapter none: refused: {NONE}"
    ]
    with pytest.raises(ApiError, match=NONE) as error:  # as POST /v1/adapters
        adapters.load_from_folder("none")
    assert error.value.status_code == 400


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("base", "adapter name 'base' is the base's; give the adapter another"),
        ("two words", "expected letters, digits"),
        ("two\nlines", "expected letters, digits"),
    ],
)
def test_a_name_in_the_folder_that_no_adapter_can_have_is_logged_once(
    run: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture, name: str, why: str
) -> None:
    shutil.copytree(tiny_base, "base")
    shutil.copytree(run, f"adapters/{name}")
    shutil.copytree(run, "adapters/.written-now")
    options = ServerOptions(base=Path("base"), folder=Path("adapters"), device="cpu", dtype="float32")
    adapters = load_adapters(options)
    for _ in range(2):
        adapters.scan()
    assert [served.name for served in adapters] == ["base"]
    (message,) = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert why in message
    assert "\n" not in message


def test_an_adapter_that_memory_cannot_take_keeps_no_other_out(
    run: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A scan that ended with its error would be a server's last."""
    for name in ("large", "colours"):
        shutil.copytree(run, f"adapters/{name}")
    load = AdaptedLlama.with_adapter

    def with_adapter(self: AdaptedLlama, path: Path) -> AdaptedLlama:
        if path.parent.name == "large":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(self, path)

    monkeypatch.setattr(AdaptedLlama, "with_adapter", with_adapter)
    options = ServerOptions(base=tiny_base, folder=Path("adapters"), device="cpu", dtype="float32")
    assert [served.name for served in load_adapters(options)][1:] == ["colours"]
    assert "adapter large: refused: CUDA out of memory" in [record.getMessage() for record in caplog.records]


def test_an_empty_word_is_not_the_working_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert named_adapters(["."]) == {"colours": Path("adapter.safetensors")}
    with pytest.raises(UserError, match=r"--adapter '': expected NAME=FILE, or a file"):
        named_adapters([""])
