"""Conversion of gates between forms: exact if possible, otherwise with the size of the error."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.model.config import GateForm, LlamaConfig
from lit_adapter.weights.plain import PlainAdapter

DESCRIPTIONS: dict[GateForm, str] = {
    "tanh": "tanh per head",
    "identity": "identity per head",
    "layer": "identity per layer",
    "channel": "identity per channel",
}


def our_gates(gates: list[Tensor], function: GateForm, n_head: int) -> tuple[list[Tensor], GateForm]:
    """Return a file's gates, each ``[H]`` or ``[1]``, in one of our forms (see `take_gates`)."""
    if function == "tanh":  # we have no form "tanh per layer"; the same tanh in every head is equal to it
        return [gate.expand(n_head).clone() for gate in gates], function
    is_layer = bool(gates) and n_head > 1 and len(gates[0]) == 1
    return gates, "layer" if is_layer else function


def with_gates(adapter: PlainAdapter, wanted: GateForm, model: LlamaConfig) -> tuple[PlainAdapter, float]:
    """Return the adapter with gates of the form ``wanted`` (not channel), and the largest error in any c(g).

    The error is the difference between strengths before and after, apart from rounding to fp32.

    Raises:
        UserError: a strength that is not a tanh of any gate.
    """
    given = adapter.config.gate
    if given == wanted:
        return adapter, 0.0
    state, worst = dict(adapter.state), 0.0
    for name, gate in adapter.state.items():
        if not name.endswith(".gate"):
            continue
        before = _strength(gate, given, model)  # [H, D or 1]
        joined = _joined(before, per_layer=wanted == "layer")  # [1 or H]
        worst = max(worst, float((before - joined[:, None]).abs().max()))
        if wanted == "tanh" and bool((joined.abs() >= 1).any()):
            raise UserError(
                f"{name} scales its prefix by {float(joined.abs().max()):.3g}, but a tanh stays below 1; "
                "use --to-gate identity"
            )
        state[name] = (joined.atanh() if wanted == "tanh" else joined).float()
    return PlainAdapter(replace(adapter.config, gate=wanted), state, adapter.notes), worst


def _strength(gate: Tensor, form: GateForm, model: LlamaConfig) -> Tensor:
    """Return c(g) in fp64, ``[H, 1]``, or ``[H, D]`` for gates per channel."""
    wide = gate.double()
    if form == "channel":
        return wide.view(model.n_head, model.head_dim)
    return (wide.tanh() if form == "tanh" else wide).expand(model.n_head).view(-1, 1)


def _joined(strength: Tensor, *, per_layer: bool) -> Tensor:
    """Return the mean strength of the layer ``[1]`` or of each head ``[H]``; equal ones stay bit for bit."""
    rows = strength.reshape(1 if per_layer else len(strength), -1)
    equal = (rows == rows[:, :1]).all(-1)
    return torch.where(equal, rows[:, 0], rows.mean(-1))
