"""A bench to try faults on: it runs a script's ``main`` as the script does and sees what that left."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import TINY

from lit_adapter.cli import command
from lit_adapter.cli.convert import main as convert_main
from lit_adapter.cli.convert_adapter import main as convert_adapter_main
from lit_adapter.cli.evaluate import main as evaluate_main
from lit_adapter.cli.finetune import main as finetune_main
from lit_adapter.cli.generate import main as generate_main
from lit_adapter.errors import UserError
from lit_adapter.files.read import read_json
from lit_adapter.weights.base_content import small_file_digests
from lit_adapter.weights.base_folder import FINGERPRINT, tokenizer_fingerprint
from lit_adapter.weights.convert import convert

ROOT = Path(__file__).parents[2]
OK = {"instruction": "a", "output": "b"}


@dataclass(frozen=True)
class Outcome:
    """What a script did."""

    status: int
    out: str
    err: str


@dataclass
class Bench:
    """A folder of its own, and what every run needs."""

    folder: Path
    base: Path
    records: Path
    adapter: Path
    """An adapter of ``base`` with open gates."""
    finished: Path
    """The folder of a finished run of six steps; copy it before use."""
    monkeypatch: pytest.MonkeyPatch
    before: dict[Path, bytes] = field(default_factory=dict)
    """Every file as it was when the fault was tried."""

    @property
    def marker(self) -> Path:
        """What a pickle bomb would make."""
        return self.folder / "MARKER"

    @property
    def out(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def file(self, name: str, content: str | bytes | Any) -> Path:
        """Write a file: text, bytes, or anything else as JSON."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def finetune(self, *options: object, data: Path | None = None, base: Path | None = None) -> Outcome:
        """``scripts/finetune.py`` on the tiny base."""
        fixed = ["--config", TINY, "--base", base or self.base, "--data.train", data or self.records]
        self.before = self.snapshot()
        return as_script(finetune_main, [*fixed, "--out", self.out, *options])

    def generate(self, *options: object) -> Outcome:
        """``scripts/generate.py`` on the tiny base with its adapter, unless the options say otherwise."""
        given = {str(option).split("=")[0] for option in options}
        fixed: list[object] = ["--device", "cpu", "--dtype", "float32"]
        fixed += [] if "--base" in given else ["--base", self.base]
        fixed += [] if given & {"--adapter", "--no-adapter"} else ["--adapter", self.adapter]
        fixed += [] if given & {"--prompt", "--prompts"} else ["--prompt", "Say it back."]
        self.before = self.snapshot()
        return as_script(generate_main, [*fixed, *options])

    def evaluate(self, *options: object) -> Outcome:
        """``scripts/evaluate.py`` on the tiny base with its adapter, into the folder ``evaluation``."""
        fixed: list[object] = ["--device", "cpu", "--dtype", "float32", "--base", self.base]
        fixed += ["--adapter", self.adapter, "--out", self.folder / "evaluation"]
        self.before = self.snapshot()
        return as_script(evaluate_main, [*fixed, *options])

    def convert(self, source: Path, *options: object) -> Outcome:
        """``scripts/convert.py``."""
        self.before = self.snapshot()
        return as_script(convert_main, [source, "--out", self.folder / "converted", *options])

    def convert_adapter(self, source: Path) -> Outcome:
        """``scripts/convert_adapter.py`` from another code base's file."""
        self.before = self.snapshot()
        return as_script(
            convert_adapter_main, [source, "--base", self.base, "--out", self.folder / "ours.safetensors"]
        )

    def call(self, function: Callable[..., object], *args: Any, **kwargs: Any) -> Outcome:
        """A public Python call; a `UserError` counts as a script shows it."""
        self.before = self.snapshot()
        try:
            return Outcome(0, str(function(*args, **kwargs)), "")
        except UserError as error:
            return Outcome(error.exit_status, "", f"error: {error}\n")

    def process(self, script: str, *argv: object, **environment: str) -> Outcome:
        """A script in a process of its own."""
        self.before = self.snapshot()
        from warm_runs import run_script  # only here: it imports Lightning

        done = run_script(script, *argv, folder=self.folder, **environment)
        return Outcome(done.returncode, done.stdout, done.stderr)

    def bomb(self, name: str) -> Path:
        """A pickle that makes the marker when it is loaded."""
        import torch

        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model.norm.weight": _Bomb(str(self.marker))}, path)
        assert not self.marker.exists()
        return path

    def copy_finished_run(self) -> Path:
        """Copy the finished run to where `finetune` goes on."""
        shutil.copytree(self.finished, self.out)
        return self.out

    def copy_base(self, name: str) -> Path:
        """Copy the tiny base."""
        return Path(shutil.copytree(self.base, self.folder / name))

    def copy_source(self) -> Path:
        """Copy the Hugging Face folder that the tiny base was converted from."""
        return Path(shutil.copytree(self.base.parent / "source", self.folder / "source"))

    def strange_base(self, change: Callable[[Path], object]) -> Path:
        """Change a copy of the tiny base, fingerprint and all: as a stranger might give it away."""
        folder = self.copy_base("base")
        change(folder)
        about = read_json(folder / FINGERPRINT)
        about |= {"tokenizer": tokenizer_fingerprint(folder), "file_sha256": small_file_digests(folder)}
        about["files"] = {name: (folder / name).stat().st_size for name in about["files"]}
        (folder / FINGERPRINT).write_text(json.dumps(about))
        return folder

    def new_base(self, change: Callable[[Path], object], name: str = "other") -> Path:
        """Convert the source of the tiny base after a change."""
        source = self.copy_source()
        change(source)
        return convert(source, self.folder / name)

    def snapshot(self) -> dict[Path, bytes]:
        """Every file and its content."""
        return {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


class _Bomb:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.target, "w")


def as_script(main: Callable[[Sequence[str]], int], argv: Sequence[object]) -> Outcome:
    """Run a script's ``main`` as `command.run` does it, in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["script", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command.run(main)
    except SystemExit as leaving:
        return Outcome(int(leaving.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("a script that does not leave with a status")


@dataclass(frozen=True)
class Row:
    """One fault and what must come of it."""

    fault: int
    """Its number in docs/faults.md."""
    what: str
    tried: Callable[[Bench], Outcome]
    message: str
    """A pattern: of the one line on standard error, or of standard output where the status is 0."""
    status: int = 2
    writes: bool = False
    """Whether the trial may leave new files: it succeeds, or fails after it has written some."""
    slow: bool = False
    """Whether only the whole suite runs it."""
