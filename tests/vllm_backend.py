"""A stand-in for vLLM's Transformers backend: it builds a model and gives it an attention of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def on_a_backend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[int]]:
    """Build a folder's model without weights; return it, and a list of what its attention is then given."""
    seen: list[int] = []

    def flat(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **rest):  # type: ignore[no-untyped-def]
        seen.append(attention_instances[module.layer_idx])
        length, n_group = query.shape[2], query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(n_group, dim=1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling
        )
        return out.transpose(1, 2).reshape(length, -1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flat", flat)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config._attn_implementation = "flat"
    model = AutoModel.from_config(config, trust_remote_code=True).eval()
    assert model.is_backend_compatible()
    return model, seen
