"""The adapter of the official LLaMA-Adapter code: one table of prompts, and a gate in every layer.

``adapter_query.weight`` holds the prompts of the lowest adapted layer first, and gates exist below it too
(they stay 0). The file says neither how many layers are adapted nor what form its gates have; a training
checkpoint's ``args`` say the first.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from lit_adapter.errors import UserError
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.gates import GateName
from lit_adapter.weights.plain import LAYER, PlainAdapter, State, prefix, take

NAME = "official"
QUERY = "adapter_query.weight"
_GATE = re.compile(rf"layers\.{LAYER}\.attention\.gate")


def adapter_tensors(tensors: State) -> State:
    """Return the adapter's tensors of a checkpoint that holds its base too."""
    return {name: tensor for name, tensor in tensors.items() if name == QUERY or _GATE.fullmatch(name)}


def read(
    tensors: State, model: LlamaConfig, gate: GateName | None, args: argparse.Namespace | None, source: str
) -> PlainAdapter:
    """Return the adapter.

    Args:
        tensors: of the file.
        model: the base's sizes.
        gate: ``tanh`` or ``identity``, which the file cannot say.
        args: of a training checkpoint.
        source: its name, for messages.

    Raises:
        UserError: no choice of gate, a number of layers that cannot be found out, tensors that are
            missing, unknown, or not of this base's sizes.
    """
    left = dict(tensors)
    if gate is None:
        raise UserError(
            f"{source}: an official adapter does not say how its gates act; add --gate tanh (as in the "
            "official training code) or --gate identity (as in its example script)"
        )
    single = all(left[name].numel() == 1 for name in left if _GATE.fullmatch(name)) and model.n_head > 1
    form: GateName = "layer" if single and gate == "identity" else gate
    gates = [
        take(left, f"layers.{layer}.attention.gate", (1 if single else model.n_head,), source)
        for layer in range(model.n_layer)
    ]
    n_rows = left[QUERY].numel() // model.n_embd if QUERY in left else 0
    table = take(left, QUERY, (n_rows, model.n_embd), source)
    if left:
        raise UserError(f"{source}: tensor {min(left)} is not one of an official LLaMA-Adapter")
    opened = [bool(gate.any()) for gate in gates]
    n_layers, note = _count(n_rows, opened, args, source)
    state: State = {}
    first = model.n_layer - n_layers
    for layer, prompt in zip(range(first, model.n_layer), table.chunk(n_layers), strict=True):
        state[f"{prefix(layer)}.prompt"] = prompt.clone()
        # One tanh a layer is the same tanh in every head; our form `layer` has none.
        own = gates[layer].expand(model.n_head) if form == "tanh" else gates[layer]
        state[f"{prefix(layer)}.gate"] = own.clone()
    config = AdapterConfig(prompt_length=n_rows // n_layers, layers=n_layers, gate=form)
    said = f"gates: {gate}, as --gate says" + ("; one a layer, as before April 2023" if single else "")
    return PlainAdapter(config, state, [note, said])


def _count(n_rows: int, opened: list[bool], args: Any, source: str) -> tuple[int, str]:
    """Return how many layers are adapted, and how that was found out."""
    told = getattr(args, "adapter_layer", None)
    if isinstance(told, int) and 0 < told <= len(opened) and n_rows % told == 0:
        return told, f"layers: {told}, as the checkpoint's args say"
    count = len(opened) - opened.index(True) if any(opened) else 0
    if not count or n_rows % count or not all(opened[len(opened) - count :]):
        raise UserError(
            f"{source}: {n_rows} prompt rows, and gates open in {sum(opened)} of {len(opened)} layers: "
            "how many layers are adapted cannot be told; give the training checkpoint, whose args say it"
        )
    return count, f"layers: the top {count}, whose gates are open"
