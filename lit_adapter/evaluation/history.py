"""What a run folder tells about the training of its adapter: losses over steps, and the gates."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from lit_adapter.errors import UserError
from lit_adapter.files.read import read_json
from lit_adapter.model.gates import GATE_FORMS
from lit_adapter.weights.adapter_file import read_adapter

Curve = list[tuple[float, float]]
TRAIN, STRENGTH = "loss/train", "prefix/strength_by_head"
"""Names of curves; the second is a tensor of all layers and heads."""
Strengths = dict[int, list[float]]
"""How much each attention head takes from its prompts, by layer; one number if heads share a gate."""


@dataclass(frozen=True)
class History:
    """Curves of a run; empty if the folder does not have them."""

    train: Curve = field(default_factory=list)
    held_out: Curve = field(default_factory=list)
    gates: dict[int, Strengths] = field(default_factory=dict)
    """Strengths of the adapted layers by step."""


def history(adapter: Path) -> History:
    """Read the curves of the run in whose folder an adapter lies; a missing file leaves them empty."""
    folder = adapter.parent
    held_out: Curve = []
    try:
        record = read_json(folder / "run.json")
        points = record["loss"]["held_out"]
        held_out = [(point["step"], point["loss"]) for point in points if point["loss"] is not None]
    except (UserError, KeyError, TypeError):
        pass  # an adapter outside a run folder has none
    train, gates = _train_loss(folder / "csv"), dict[int, Strengths]()
    if (folder / "tensorboard").is_dir():
        train, gates = _tensorboard(folder / "tensorboard")
    return History(train, held_out, gates)


def _tensorboard(folder: Path) -> tuple[Curve, dict[int, Strengths]]:
    """Return training loss and strengths from event files."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    reader = EventAccumulator(str(folder), size_guidance={SCALARS: 2000, TENSORS: 2000})
    reader.Reload()
    tags = reader.Tags()
    points = reader.Scalars(TRAIN) if TRAIN in tags["scalars"] else []
    gates: dict[int, Strengths] = {}
    for event in reader.Tensors(STRENGTH) if STRENGTH in tags["tensors"] else ():
        rows = enumerate(make_ndarray(event.tensor_proto).tolist())
        gates[event.step] = {layer: row for layer, row in rows if all(map(math.isfinite, row))}
    return [(point.step, point.value) for point in points if math.isfinite(point.value)], gates


def _train_loss(folder: Path) -> Curve:
    """Return the training loss from Lightning's CSV files, one for each start; a later start overrides."""
    curve: Curve = []
    for path in sorted(folder.glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime):
        with path.open(newline="", encoding="utf-8") as stream:
            rows = [(row.get("step"), row.get(TRAIN)) for row in csv.DictReader(stream)]
        found = [(float(step), float(loss)) for step, loss in rows if step and loss]
        first = min((step for step, _ in found), default=math.inf)
        curve = [point for point in curve if point[0] < first] + found
    return curve


def strengths(adapter: Path) -> Strengths:
    """Return the mean of ``|c(g)|`` over prompt tokens and channels; empty without prompts."""
    info, state = read_adapter(adapter)
    sizes, config = info.model, info.adapter
    form = GATE_FORMS[config.gate]
    axes = form.axes(sizes.n_head, config.prompt_length, sizes.head_dim)
    found: Strengths = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"layers\.(\d+)\..*\.gate", name)
        if match:
            strength = form.strength(tensor.float(), axes).abs().mean((-2, -1))
            found[int(match[1])] = strength.flatten().tolist()
    return dict(sorted(found.items()))
