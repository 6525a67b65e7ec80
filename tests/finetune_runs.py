"""Helpers for tests of whole runs."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

PR_SET_PDEATHSIG = 1
_SYSTEM = ctypes.CDLL(None)  # loaded before any fork
WORDS = ("red", "green", "blue", "apple", "river", "stone", "cloud", "seven", "lamp", "Öl")
"""Of the tiny records."""
TINY = Path(__file__).parent / "configs" / "tiny.yaml"
SCRIPT = Path(__file__).parents[1] / "scripts" / "finetune.py"


class Stopper:
    """Collects lines, and sends this process a signal when a line starts with ``at``."""

    def __init__(self, at: str = "never", number: signal.Signals = signal.SIGTERM) -> None:
        self.at, self.number = at, number
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        if line.startswith(self.at):
            signal.raise_signal(self.number)


def arguments(base: Path, data: Path, out: Path, *options: str) -> list[str]:
    """The command line of a tiny run."""
    fixed = ["--base", str(base), "--data.train", str(data), "--out", str(out)]
    return ["--config", str(TINY), *fixed, *options]


def config_fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a configuration, with its type."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from config_fields(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def end_with_parent() -> None:
    """Have this process killed when its parent ends, so that a killed test leaves no run behind."""
    if hasattr(_SYSTEM, "prctl"):  # on Linux
        _SYSTEM.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def launch(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own that ends with this one; ``log`` gets what it prints."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
