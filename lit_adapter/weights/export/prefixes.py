"""Prefixes as the tensors and settings of `modeling_lit_adapter`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.gates import GATE_FORMS
from lit_adapter.model.prefix import prefix_name


def prefix_settings(form: AdapterConfig, model: LlamaConfig) -> dict[str, Any]:
    """Return the keys of ``config.json`` that describe the prefixes."""
    gate = GATE_FORMS[form.gate]
    return {
        "prefix_length": form.prompt_length,
        "prefix_layers": len(form.adapted_layers(model.n_layer)),
        "prefix_per_token": gate.per_token,
        "prefix_per_channel": gate.per_channel,
        "prefix_unrotated": form.prefix_query == "unrotated",
        "lm_head_bias": form.head,
    }


def prefix_tensors(form: AdapterConfig, model: LlamaConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return every prompt ``[K, C]``, and its strengths c(g), ``[H * (K or 1) * (D or 1), 1]``, in fp32.

    A gate form with one gate per layer gives every attention head the same strength.
    """
    gate = GATE_FORMS[form.gate]
    axes = gate.axes(model.n_head, form.prompt_length, model.head_dim)
    found = {}
    for index in form.adapted_layers(model.n_layer):
        name = prefix_name(index)
        strength = gate.strength(state[f"{name}.gate"], axes).expand(model.n_head, *axes[1:])
        found[f"model.{name}.prompt"] = state[f"{name}.prompt"]
        found[f"model.{name}.strength.weight"] = strength.reshape(-1, 1).to(torch.float32).contiguous()
    return found
