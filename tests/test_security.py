"""What is kept out of saved files, and which releases are kept out of an environment."""

from __future__ import annotations

import resource
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_runs import Stopper
from packaging.requirements import Requirement

from lit_adapter.cli.finetune import parse_finetune
from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.training.finetune import finetune

ROOT = Path(__file__).parents[1]
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz012345"


def test_what_a_run_saves_names_no_home_folder_and_no_token(
    tiny: Callable[..., Config], tiny_base: Path, tiny_records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base, data and run folder below the user's home, a Hub token in the environment."""
    home = tiny_base.parents[1]
    assert tiny_records.is_relative_to(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    config = tiny("--optim.max_steps", "4")
    assert Path(config.out).is_relative_to(home)
    assert finetune(config, say=Stopper()) == 0
    saved = [path for path in Path(config.out).rglob("*") if path.is_file()]
    assert {path.suffix for path in saved} >= {".yaml", ".ckpt", ".safetensors"}
    for path in saved:
        content = path.read_bytes()
        assert str(home).encode() not in content, path
        assert TOKEN.encode() not in content, path
    again = parse_finetune(["--config", str(Path(config.out) / "config.yaml")]).config
    assert again == config
    assert finetune(again, resume="last", say=Stopper()) == 0


def test_converted_bases_name_no_folder(tiny_base: Path) -> None:
    for path in tiny_base.glob("*.json"):
        assert str(tiny_base.parent) not in path.read_text(encoding="utf-8"), path


def test_bad_releases_are_kept_out() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    wanted = {r.name: r.specifier for r in map(Requirement, tomllib.loads(text)["project"]["dependencies"])}
    for name, good, bad in (
        ("lightning", ["2.6.6"], ["2.6.2", "2.6.3", "2.6.5"]),
        ("torch", ["2.11.0", "2.13.0"], ["2.5.0", "2.9.1"]),
        ("safetensors", ["0.8.0"], ["0.7.0"]),
    ):
        assert all(version in wanted[name] for version in good), name
        assert not any(version in wanted[name] for version in bad), name
        line = next(line for line in text.splitlines() if line.strip().startswith(f'"{name}'))
        assert "#" in line  # the reason stands next to it


@pytest.mark.parametrize(
    "option", ["--trainer.class_path", "--adapter.class_path", "--trainer.callbacks", "--optim.init_args"]
)
def test_options_name_no_classes(option: str) -> None:
    with pytest.raises(UserError, match=rf"unknown option '{option}'"):
        parse_finetune([option, "os.system"])


@pytest.mark.slow
def test_curves_end_on_a_full_disk_and_the_run_does_not(tiny: Callable[..., Config]) -> None:
    """No file may grow beyond 30 kB: event files do, checkpoints and the adapter do not."""
    lines, limits = Stopper(), resource.getrlimit(resource.RLIMIT_FSIZE)
    options = ("--adapter.norms", "false", "--optim.max_steps", "40", "--trainer.save_every", "100")
    config = tiny(*options, "--trainer.samples", "0")
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        assert finetune(config, say=lines) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = [line for line in lines.lines if "no more curves" in line]
    assert len(said) == 1, lines.lines
    assert "tensorboard: File too large" in said[0]
    assert (Path(config.out) / "adapter.safetensors").is_file()
