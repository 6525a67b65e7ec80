"""Helpers for tests of generation: an adapter with random gates, and the script without a process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from paper import paper

from lit_adapter.cli.generate import main
from lit_adapter.files.read import read_json
from lit_adapter.generation.adapter import Adapter
from lit_adapter.generation.engine import Answers, Engine
from lit_adapter.generation.request import Request
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.adapter import adapter_shapes
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.llama import Llama
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template
from lit_adapter.weights.adapter_file import AdapterInfo, base_identity, save_adapter

ROOT = Path(__file__).parents[1]
CHOICES = ("--device", "cpu", "--dtype", "float32")


def save_random_adapter(
    base: Path, path: Path, seed: int = 0, config: AdapterConfig | None = None, *, scale: float = 1.0
) -> Path:
    """An adapter of a base with random numbers, ``scale`` large, so that its gates are open."""
    raw, config = read_json(base / "config.json"), config or paper(layers=3, prompt_length=5)
    generator = torch.Generator().manual_seed(seed)
    shapes = adapter_shapes(config, LlamaConfig.from_hf(raw))
    state = {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    template = resolve_template("alpaca", load_tokenizer(base))
    save_adapter(path, state, AdapterInfo(config, base_identity(base), raw, template))
    return path


def decode(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    stop_ids: frozenset[int] = frozenset(),
    *,
    batch_size: int = 1,
) -> Answers:
    """Answer prompts by a model with its own adapter."""
    with torch.inference_mode():
        adapter = Adapter.of(model)
    return Engine().run([Request(prompt, how, adapter, stop_ids) for prompt in prompts], batch_size)


def script(*argv: object, out: io.StringIO | None = None) -> str:
    """What ``scripts/generate.py`` writes on standard output."""
    out = out or io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(value) for value in argv]) == 0
    return out.getvalue()


def standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Have a command read ``content``."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def json_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def process(*argv: object) -> subprocess.Popen[bytes]:
    """The script as a process of its own, one thread, nothing on its standard input."""
    return subprocess.Popen(
        [sys.executable, "scripts/generate.py", *map(str, argv)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
