"""What a run folder tells of the training of the adapter in it: losses over steps, and the gates."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError
from lit_adapter.files.read import read_json
from lit_adapter.model.gates import GATE_FORMS
from lit_adapter.weights.adapter_file import read_adapter

Curve = list[tuple[float, float]]
LAYER = re.compile(r"gates/layer_(\d+)")


@dataclass(frozen=True)
class History:
    """Curves of a run; empty where the folder does not have them."""

    train: Curve = field(default_factory=list)
    held_out: Curve = field(default_factory=list)
    gates: dict[int, Curve] = field(default_factory=dict)
    """Mean strength of each layer's gates over steps."""


def history(adapter: Path) -> History:
    """Read the curves of the run in whose folder an adapter lies; a file that is missing leaves them empty."""
    folder = adapter.parent
    held_out: Curve = []
    try:
        record = read_json(folder / "run.json")
        held_out = [(point["step"], point["loss"]) for point in record["loss"]["held_out"] if point["loss"]]
    except (UserError, KeyError, TypeError):
        pass  # an adapter outside a run folder has none
    scalars = _scalars(folder / "tensorboard")
    found = ((LAYER.fullmatch(tag), curve) for tag, curve in scalars.items())
    gates = {int(match[1]): curve for match, curve in found if match}
    return History(scalars.get("train/loss", []), held_out, gates)


def _scalars(folder: Path) -> dict[str, Curve]:
    """Return TensorBoard's curves by tag."""
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={SCALARS: 2000})
    reader.Reload()
    return {
        tag: [(event.step, event.value) for event in reader.Scalars(tag) if math.isfinite(event.value)]
        for tag in reader.Tags()["scalars"]
    }


def strengths(adapter: Path) -> dict[int, list[float]]:
    """Return how much every attention head takes from its prompts, by layer; empty without prompts.

    It is the mean of ``|c(g)|`` over prompt tokens and channels; one number where the heads share a gate.
    """
    info, state = read_adapter(adapter)
    sizes, config = info.model, info.adapter
    form = GATE_FORMS[config.gate]
    axes = form.axes(sizes.n_head, config.prompt_length, sizes.head_dim)
    found: dict[int, Any] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"layers\.(\d+)\..*\.gate", name)
        if match:
            strength = form.strength(tensor.float(), axes).abs().mean((-2, -1))
            found[int(match[1])] = strength.flatten().tolist()
    return dict(sorted(found.items()))
