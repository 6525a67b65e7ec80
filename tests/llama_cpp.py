"""llama.cpp itself, as node-llama-cpp brings it, built; it is no dependency of the tests."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

FOLDER = os.environ.get("LIT_ADAPTER_LLAMA_CPP", "")
REASON = (
    "needs llama.cpp: npm install --ignore-scripts --prefix FOLDER node-llama-cpp, and "
    "LIT_ADAPTER_LLAMA_CPP=FOLDER in the environment"
)
SCRIPT = Path(__file__).with_suffix(".mjs")
needs_llama_cpp = pytest.mark.skipif(not FOLDER, reason=REASON)


@dataclass(frozen=True)
class Job:
    """What to compute of a file."""

    path: str
    ids: Sequence[int]
    greedy: int = 0
    """Tokens to generate after ``ids``."""
    texts: Sequence[str] = ()
    """To tokenize."""
    special: bool = False
    """Whether control tokens that are spelled in them are such."""


@dataclass(frozen=True)
class Computed:
    """What llama.cpp has computed of a job."""

    log_probabilities: torch.Tensor
    """Of every next token, ``[T, V]``."""
    greedy: list[int]
    tokens: list[list[int]]
    context: int


def computed(jobs: Sequence[Job], folder: Path) -> list[Computed]:
    """What llama.cpp makes of the jobs, in one process."""
    given, made = folder / "jobs.json", folder / "answers.json"
    given.write_text(json.dumps([asdict(job) for job in jobs]))
    subprocess.run(["node", SCRIPT, Path(FOLDER).absolute(), given, made], check=True, timeout=800)
    found = []
    for answer in json.loads(made.read_text()):
        rows = [[row.get(str(id_), 0.0) for id_ in range(len(row))] for row in answer["probabilities"]]
        logs = torch.tensor(rows, dtype=torch.float64).log()
        found.append(Computed(logs, answer["greedy"], answer["tokens"], answer["context"]))
    return found
