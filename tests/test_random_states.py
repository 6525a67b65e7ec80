"""What a run draws follows from its seed; checkpoints keep no random state, and none is needed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_runs import Stopper
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_adapter.config import Config
from lit_adapter.data.packing import TrainingSteps, ValidationSteps
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.training.finetune import finetune
from lit_adapter.training.module import LitAdapter


@pytest.mark.slow
def test_no_random_state_of_the_process_decides_anything(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random states are overwritten at every step, validation, sample and batch, differently in each run."""
    seeds = count()

    def disturbed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seed = (next(seeds) * 1_000_003 + os.getpid()) % 2**32
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            return function(*arguments, **options)

        return call

    for kind, name in (
        (LitAdapter, "training_step"),
        (LitAdapter, "validation_step"),
        (AdaptedLlama, "continue_batch"),
        (TrainingSteps, "__getitem__"),
        (ValidationSteps, "__getitem__"),
    ):
        monkeypatch.setattr(kind, name, disturbed(getattr(kind, name)))
    options = ["--adapter.dropout", "0.2", "--data.workers", "2", "--trainer.samples", "2"]
    whole, stopped = tiny(*options, out="whole"), tiny(*options, out="stopped")
    assert finetune(whole, say=Stopper()) == 0
    assert finetune(stopped, say=Stopper("step 8/")) == 143
    assert finetune(stopped, resume="last", say=Stopper()) == 0
    files = ("adapter.safetensors", "best.safetensors")
    one, other = ([(Path(config.out) / name).read_bytes() for name in files] for config in (whole, stopped))
    assert one == other
    assert samples(whole) == samples(stopped)


def samples(config: Config) -> dict[str, list[tuple[int, bytes]]]:
    """Step and text of every sample answer that a run has drawn."""
    events = EventAccumulator(str(Path(config.out) / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples/")]
    assert len(tags) == 2
    return {
        tag: [(event.step, event.tensor_proto.string_val[0]) for event in events.Tensors(tag)] for tag in tags
    }
