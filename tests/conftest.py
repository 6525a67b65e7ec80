"""Fixtures for the whole session: a tiny converted base and a small data file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tokenizers
import torch
import transformers
import warm_runs
from finetune_runs import TINY, WORDS
from generation_fixtures import save_random_adapter
from hub_stand_in import hub  # noqa: F401 (a fixture)
from hypothesis import HealthCheck, settings
from tiny_models import transformers_llama
from tokenizers import decoders, models, pre_tokenizers, trainers

import lit_adapter
from lit_adapter.cli.finetune import parse_finetune
from lit_adapter.config import Config
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.text.template import ALPACA, ALPACA_WITHOUT_INPUT
from lit_adapter.weights.convert import convert

if TYPE_CHECKING:
    from tokenizer_kinds import Kind

torch.set_num_threads(1)  # tiny tensors: starting threads costs more than they save
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in the processes that tests start
# How long an example takes depends on what else the machine does.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def records() -> list[dict[str, str]]:
    """Forty-eight records of uneven length; every third has an input."""
    made = []
    for number in range(48):
        words = [WORDS[(number * step + step) % len(WORDS)] for step in range(1, 3 + number % 5)]
        made.append(
            {
                "instruction": f"Repeat the words {number} times in order." if number % 2 else "Say it back.",
                "input": " ".join(words) if number % 3 == 0 else "",
                "output": " ".join([*words, str(number)]),
            }
        )
    return made


@pytest.fixture(scope="session")
def tiny_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON file of 48 records."""
    path = tmp_path_factory.mktemp("data") / "tiny.json"
    path.write_text(json.dumps(records(), indent=1), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted base: four layers, grouped queries, and a byte-level tokenizer trained here."""
    return make_base(tmp_path_factory.mktemp("base"), hidden_size=48)


@pytest.fixture(scope="session")
def fused_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with attention heads of size 16, which the CUDA kernels support."""
    return make_base(tmp_path_factory.mktemp("fused"), hidden_size=64)


def make_base(folder: Path, *, hidden_size: int) -> Path:
    source = folder / "source"
    source.mkdir()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for record in records() for text in record.values()]
    tokenizer.train_from_iterator([*texts, ALPACA, ALPACA_WITHOUT_INPUT], trainer)
    tokenizer.save(str(source / "tokenizer.json"))
    described = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (source / "tokenizer_config.json").write_text(json.dumps(described))
    model = transformers_llama(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    model.float().save_pretrained(source)
    return convert(source, source.parent / "tiny")


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny base whose gates are open."""
    return save_random_adapter(tiny_base, tmp_path_factory.mktemp("adapter") / "adapter.safetensors")


@pytest.fixture(scope="module")
def model(tiny_base: Path, adapter: Path) -> AdaptedLlama:
    """That adapter on its base."""
    return lit_adapter.load(adapter, tiny_base, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """A tokenizer of every kind, beside the library that it comes from."""
    from tokenizer_kinds import MAKERS

    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


@pytest.fixture(scope="session", autouse=True)
def _warm_server() -> None:
    """Start it before a run of this process starts the one server for its loader workers, without scripts."""
    warm_runs.start_server()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_ADAPTER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def own_code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers copies a folder's code into this folder before it imports it."""
    for module in (transformers.dynamic_module_utils, transformers.utils.hub):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def tiny(tiny_base: Path, tiny_records: Path, tmp_path: Path) -> Callable[..., Config]:
    """Return a function that makes run configurations from command-line options."""

    @cache
    def make(*options: str, out: str = "run") -> Config:
        fixed = ["--base", str(tiny_base), "--data.train", str(tiny_records), "--out", str(tmp_path / out)]
        return parse_finetune(["--config", str(TINY), *fixed, *options])[0]

    return make


@pytest.fixture
def adamw_forms(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, bool | None]]:
    """The devices on which AdamW has taken a step, and its form: fused, or torch's choice (None)."""
    seen: set[tuple[str, bool | None]] = set()
    step = torch.optim.AdamW.step

    def watched(optimizer: torch.optim.AdamW, *given: Any, **named: Any) -> Any:
        seen.update((group["params"][0].device.type, group["fused"]) for group in optimizer.param_groups)
        return step(optimizer, *given, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return seen


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip GPU tests, with the reason, where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many kills, faults and fuzz examples were tried, over all processes of the run."""
    found = [
        (name, value)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "teardown"  # its report has what fixtures have added too
        for name, value in report.user_properties
    ]
    for name, value in found:
        if name == "kills":
            terminalreporter.write_line(value)
    faults = [value for name, value in found if name == "fault"]
    examples = sum(value for name, value in found if name == "examples")
    if faults or examples:
        terminalreporter.write_line(
            f"faults: {len(faults)} rows tried, {len(set(faults))} of docs/faults.md; "
            f"fuzz: {examples:,} examples"
        )
