"""Gates from one form into another: exact where that can be, with the size of the error where it cannot."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.gates import GateName
from lit_adapter.weights.plain import PlainAdapter


def with_gates(adapter: PlainAdapter, wanted: GateName, model: LlamaConfig) -> tuple[PlainAdapter, float]:
    """Return the adapter with its gates in another form, and the largest error in any c(g).

    Args:
        adapter: in any form.
        wanted: ``tanh`` or ``identity`` (a gate per head), or ``layer``.
        model: the base's sizes.

    Returns:
        The adapter, and the largest difference between a gate's strength before and after: 0 where nothing
        but rounding to fp32 happens.

    Raises:
        UserError: a strength that no tanh reaches.
    """
    given = adapter.config.gate
    if given == wanted:
        return adapter, 0.0
    state, worst = dict(adapter.state), 0.0
    for name, gate in adapter.state.items():
        if not name.endswith(".gate"):
            continue
        before = strength(gate, given, model)  # [H, D or 1]
        shared = _shared(before, per_layer=wanted == "layer")
        worst = max(worst, float((before - shared[:, None]).abs().max()))
        if wanted == "tanh" and bool((shared.abs() >= 1).any()):
            raise UserError(
                f"{name} scales its prefix by {float(shared.abs().max()):.3g}, which no tanh reaches; "
                "keep --to-gate identity"
            )
        raw = shared.atanh() if wanted == "tanh" else shared
        state[name] = raw.float()
    return PlainAdapter(replace(adapter.config, gate=wanted), state, adapter.notes), worst


def strength(gate: Tensor, form: GateName, model: LlamaConfig) -> Tensor:
    """Return c(g) in fp64, ``[H, 1]``, or ``[H, D]`` for gates per channel."""
    wide = gate.double()
    if form == "channel":
        return wide.view(model.n_head, model.head_dim)
    return (wide.tanh() if form == "tanh" else wide).expand(model.n_head).view(-1, 1)


def _shared(before: Tensor, *, per_layer: bool) -> Tensor:
    """Return the one value, ``[1]`` or ``[H]``, that is nearest to all it stands for; equal ones exactly."""
    rows = before.reshape(1 if per_layer else len(before), -1)
    equal = (rows == rows[:, :1]).all(-1)
    return torch.where(equal, rows[:, 0], rows.mean(-1))
