"""Conversion of gates between forms: exact if possible, otherwise with the size of the error."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.gates import GATE_FORMS, GateName
from lit_adapter.model.prefix import prefix_name
from lit_adapter.weights.plain import PlainAdapter


def with_gates(adapter: PlainAdapter, wanted: GateName, model: LlamaConfig) -> tuple[PlainAdapter, float]:
    """Return the adapter with gates of the form ``wanted`` (not channel), and the largest error in any c(g).

    The error is the difference between strengths before and after, apart from rounding to fp32.

    Raises:
        UserError: a strength that is not a tanh of any gate.
    """
    given = adapter.config.gate
    if given == wanted:
        return adapter, 0.0
    state, worst = dict(adapter.state), 0.0
    form, target = GATE_FORMS[given], GATE_FORMS[wanted]
    sizes = (model.n_head, adapter.config.prompt_length, model.head_dim)
    for layer in adapter.config.adapted_layers(model.n_layer):
        name = f"{prefix_name(layer)}.gate"
        before = form.strength(adapter.state[name].double(), form.axes(*sizes))
        joined = _joined(before, target.axes(*sizes))
        worst = max(worst, float((before - joined).abs().max()))
        raw = target.raw(joined)
        if not bool(torch.isfinite(raw).all()):
            raise UserError(
                f"{name} scales its prefix by {float(joined.abs().max()):.3g}, but a tanh stays below 1; "
                "use --to-gate identity"
            )
        state[name] = raw.float()
    return PlainAdapter(replace(adapter.config, gate=wanted), state, adapter.notes), worst


def _joined(strength: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return c(g) with the given axes: its mean along those that become 1; equal values stay bit for bit."""
    shared = [axis for axis, size in enumerate(axes) if size < strength.shape[axis]]
    if shared:
        least, most = strength.amin(shared, keepdim=True), strength.amax(shared, keepdim=True)
        strength = torch.where(least == most, least, strength.mean(shared, keepdim=True))
    return strength.expand(axes)
