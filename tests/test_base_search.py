"""Where an adapter's base is found, in which order, and what is said when it is nowhere."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from generation_fixtures import CHOICES, save_random_adapter, script

import lit_adapter
from lit_adapter.errors import UserError
from lit_adapter.files.write import write_json
from lit_adapter.weights import base_search
from lit_adapter.weights.adapter_file import BaseIdentity
from lit_adapter.weights.base_search import base_at_hand, find_base

TINY = BaseIdentity("tiny", "weights", "tokenizer")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory beside everything, a home, and a checkout, all without bases."""
    for name in ("here", "home", "checkout", "project/out/run"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("LIT_ADAPTER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(base_search, "CHECKOUT", tmp_path / "checkout")
    (tmp_path / "checkout" / "pyproject.toml").touch()
    return tmp_path


def base_at(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "fingerprint.json").touch()
    return folder


def test_the_order_of_the_places(elsewhere: Path) -> None:
    """Each one is taken once those before it are gone."""
    run = elsewhere / "project" / "out" / "run"
    (run / "config.yaml").write_text("base: bases/tiny\nout: out/run\n")
    places = [
        elsewhere / "project" / "bases" / "tiny",
        run / "checkpoints" / "tiny",
        elsewhere / "project" / "checkpoints" / "tiny",
        elsewhere / "home" / "checkpoints" / "tiny",
        elsewhere / "here" / "checkpoints" / "tiny",
        elsewhere / "checkout" / "checkpoints" / "tiny",
    ]
    for place in places:
        base_at(place)
    for place in places:
        assert find_base(TINY, run / "adapter.safetensors").absolute() == place
        (place / "fingerprint.json").unlink()  # what is left is no converted base
    assert base_at_hand(TINY, run / "adapter.safetensors") is None


def test_the_first_folder_with_the_recorded_fingerprints_comes_before_others_of_its_name(
    elsewhere: Path,
) -> None:
    adapter = elsewhere / "project" / "out" / "run" / "adapter.safetensors"
    other = base_at(elsewhere / "project" / "checkpoints" / "tiny")
    rest = {"format": 1, "files": {}, "source": {}}
    write_json(other / "fingerprint.json", {**rest, "weights": "other", "tokenizer": "tokenizer"})
    right = base_at(elsewhere / "home" / "checkpoints" / "tiny")
    write_json(right / "fingerprint.json", {**rest, "weights": "weights", "tokenizer": "tokenizer"})
    base_at(elsewhere / "checkout" / "checkpoints" / "tiny")
    assert find_base(TINY, adapter) == right
    write_json(right / "fingerprint.json", {**rest, "weights": "weights", "tokenizer": "another"})
    assert find_base(TINY, adapter) == other  # none is the right one: the first, whose difference is named


def test_what_is_below_the_working_directory_is_shown_from_there(elsewhere: Path) -> None:
    base_at(elsewhere / "here" / "checkpoints" / "tiny")
    assert find_base(TINY, elsewhere / "adapter.safetensors") == Path("checkpoints/tiny")
    assert find_base(TINY, elsewhere / "here" / "out" / "adapter.safetensors") == Path("checkpoints/tiny")


@pytest.mark.parametrize("form", ["absolute", "home", "link"])
def test_the_base_that_a_run_records(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    base, run = base_at(elsewhere / "disk" / "tiny"), elsewhere / "project" / "out" / "run"
    monkeypatch.setenv("HOME", str(elsewhere))
    (elsewhere / "current").symlink_to(base)
    recorded = {"absolute": base, "home": "~/disk/tiny", "link": elsewhere / "current"}[form]
    (run / "config.yaml").write_text(f"base: {recorded}\n")
    assert find_base(TINY, run / "best.safetensors").resolve() == base
    with pytest.raises(UserError, match="base 'other': no converted base"):
        find_base(replace(TINY, name="other"), run / "best.safetensors")  # an adapter that was copied there


@pytest.mark.parametrize("content", ["base: [", "base: 3", "- base", "&a [*a]", "", "base: ~nobody-at-all/x"])
def test_a_configuration_that_names_no_base_is_passed_over(elsewhere: Path, content: str) -> None:
    base = base_at(elsewhere / "home" / "checkpoints" / "tiny")
    (elsewhere / "project" / "config.yaml").write_text(content)
    assert find_base(TINY, elsewhere / "project" / "adapter.safetensors") == base


@pytest.mark.parametrize(
    "content",
    ['base: "a\\0b"', "base: loop/tiny", f"base: {'a' * 300}/tiny", 'base: "\\ud800/tiny"', "base: [tiny]"],
    ids=["null", "loop", "long", "surrogate", "list"],
)
def test_a_recorded_place_that_cannot_be_looked_at_is_passed_over(elsewhere: Path, content: str) -> None:
    base, project = base_at(elsewhere / "home" / "checkpoints" / "tiny"), elsewhere / "project"
    (project / "loop").symlink_to("loop")
    (project / "config.yaml").write_text(content)
    assert find_base(TINY, project / "adapter.safetensors") == base


@pytest.mark.parametrize("content", ["[" * 99_000, "a: b\n" * 19_000, "x" * 900_000, "- " * 40_000])
def test_a_long_configuration_is_passed_over_in_time(elsewhere: Path, content: str) -> None:
    base = base_at(elsewhere / "home" / "checkpoints" / "tiny")
    (elsewhere / "project" / "config.yaml").write_text(content)
    start = time.process_time()
    assert find_base(TINY, elsewhere / "project" / "adapter.safetensors") == base
    assert time.process_time() - start < 1


def test_the_home_folder_may_start_with_a_tilde(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_at(elsewhere / "home" / "checkpoints" / "tiny")
    monkeypatch.setenv("HOME", str(elsewhere))
    monkeypatch.setenv("LIT_ADAPTER_HOME", "~/home")
    assert find_base(TINY, elsewhere / "project" / "adapter.safetensors") == base


def test_an_adapter_that_is_a_link_is_looked_for_beside_its_run(elsewhere: Path) -> None:
    base = base_at(elsewhere / "project" / "checkpoints" / "tiny")
    run = elsewhere / "project" / "out" / "run"
    (run / "adapter.safetensors").touch()
    (elsewhere / "here" / "mine.safetensors").symlink_to(run / "adapter.safetensors")
    assert find_base(TINY, Path("mine.safetensors")) == base


def test_the_error_lists_where_it_was_looked_for(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = elsewhere / "project" / "out" / "run" / "adapter.safetensors"
    places = f"{elsewhere}/home, the working directory, {elsewhere}/checkout; convert it there"
    with pytest.raises(
        UserError, match=f"no converted base checkpoints/tiny in {adapter.parent} and the"
    ) as e:
        find_base(TINY, adapter)
    assert places in str(e.value)
    monkeypatch.delenv("LIT_ADAPTER_HOME")
    (elsewhere / "checkout" / "pyproject.toml").unlink()  # installed, not a checkout
    with pytest.raises(UserError, match=r"\$LIT_ADAPTER_HOME \(not set\), the working directory; convert it"):
        find_base(TINY, adapter)


def test_scripts_and_python_find_it_from_any_working_directory(elsewhere: Path, tiny_base: Path) -> None:
    adapter = save_random_adapter(tiny_base, elsewhere / "project" / "out" / "run" / "adapter.safetensors")
    (elsewhere / "project" / "checkpoints").mkdir()
    (elsewhere / "project" / "checkpoints" / "tiny").symlink_to(tiny_base)
    model = lit_adapter.load(adapter, device="cpu", dtype="float32")
    wanted = model.generate("x", max_new_tokens=4)
    assert script("--adapter", adapter, *CHOICES, "--prompt", "x", "--max_new_tokens", 4) == wanted + "\n"
