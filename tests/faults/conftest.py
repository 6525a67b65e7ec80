"""What the faults are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import Bench
from finetune_runs import TINY, Stopper
from generation_fixtures import save_random_adapter

from lit_adapter.cli.finetune import parse_finetune
from lit_adapter.training.finetune import finetune


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny base with open gates."""
    return save_random_adapter(tiny_base, tmp_path_factory.mktemp("adapter") / "adapter.safetensors")


@pytest.fixture(scope="session")
def finished_run(tiny_base: Path, tiny_records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps, with checkpoints of steps 4 and 6."""
    out = tmp_path_factory.mktemp("finished") / "run"
    fixed = ["--config", TINY, "--base", tiny_base, "--data.train", tiny_records, "--out", out]
    options = ["--optim.max_steps", "6", "--trainer.save_every", "2", "--trainer.samples", "0"]
    assert finetune(parse_finetune([*map(str, fixed), *options]).config, say=Stopper()) == 0
    return out


@pytest.fixture
def bench(
    tmp_path: Path,
    tiny_base: Path,
    tiny_records: Path,
    tiny_adapter: Path,
    finished_run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    folder = tmp_path / "bench"
    folder.mkdir()
    return Bench(folder, tiny_base, tiny_records, tiny_adapter, finished_run, monkeypatch)
