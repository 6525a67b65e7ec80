"""``lit-adapter COMMAND`` and ``python -m lit_adapter COMMAND``, which do what ``scripts/`` does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from finetune_runs import arguments
from safetensors.torch import load_file

from lit_adapter.cli.main import COMMANDS, main
from lit_adapter.errors import UserError

ROOT = Path(__file__).parents[1]
MODULE = ["-m", "lit_adapter"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The console script as pip writes it."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["lit-adapter"].partition(":")
    path = tmp_path_factory.mktemp("bin") / "lit-adapter"
    path.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    return [str(path)]


def run(door: list[str], *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *door, *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_every_door_in_scripts_is_a_command() -> None:
    doors = {path.stem for path in (ROOT / "scripts").glob("*.py") if "lit_adapter.cli" in path.read_text()}
    measuring = {door for door in doors if door == "benchmark" or door.startswith("measure_")}
    assert {name.replace("-", "_") for name in COMMANDS} == doors - measuring


@pytest.mark.parametrize("name", COMMANDS)
def test_the_usage_names_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    said = capsys.readouterr().out
    assert said.startswith(f"usage: lit-adapter {name} ")
    assert COMMANDS[name] in said


def test_the_usage_names_the_door(installed: list[str]) -> None:
    for door, program in ((installed, "lit-adapter"), (MODULE, "python -m lit_adapter")):
        said = run(door, "--help").stdout
        assert said.startswith(f"usage: {program} COMMAND")
        assert all(f"\n  {name} " in said for name in COMMANDS)
        assert run(door, "merge", "--help").stdout.startswith(f"usage: {program} merge --out FOLDER")
    said = run([str(ROOT / "scripts" / "merge.py")], "--help").stdout
    assert said.startswith("usage: merge.py --out FOLDER")


def test_an_unknown_command_is_one_line_and_status_two(installed: list[str]) -> None:
    done = run(installed, "finetun")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command 'finetun'; did you mean 'finetune'?\n"
    with pytest.raises(UserError, match="unknown command 'x'; see lit-adapter --help"):
        main(["x"])


@pytest.mark.slow
@pytest.mark.parametrize("by_module", [False, True])
def test_two_processes_are_started_by_the_same_door(
    installed: list[str], tiny_base: Path, tiny_records: Path, tmp_path: Path, by_module: bool
) -> None:
    """Lightning's launcher runs the command line again for the second process."""
    options = ("--optim.max_steps", "2", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    door = MODULE if by_module else installed
    done = run(door, "finetune", *arguments(tiny_base, tiny_records, tmp_path / "run", *options))
    assert (done.returncode, done.stderr) == (0, "")
    assert load_file(tmp_path / "run" / "adapter.safetensors")


def test_an_editable_install_is_a_path(tmp_path: Path) -> None:
    """A path on ``sys.path`` comes before a working directory that holds the clone; a finder does not."""
    pytest.importorskip("setuptools", minversion="77")
    clone = tmp_path / "lit_adapter"
    (clone / "lit_adapter").mkdir(parents=True)
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "lit_adapter/__init__.py",
        "lit_adapter/errors.py",
    ):
        shutil.copy(ROOT / name, clone / name)
    build = "from setuptools.build_meta import build_editable; build_editable('..')"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        (added,) = (name for name in files.namelist() if name.endswith(".pth"))
        assert files.read(added).decode() == f"{clone}\n"
