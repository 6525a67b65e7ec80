"""Activation checkpointing: the same gradients from less memory."""

from __future__ import annotations

import numpy as np
import torch
from random_records import encoded
from tiny_models import open_adapter, random_llama
from torch import Tensor

from lit_adapter.data.packing import Packer, shared_preambles
from lit_adapter.model.adapter import adapter_parameters
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.loss import row_loss


def gradients_and_kept(recompute: bool) -> tuple[list[Tensor], int]:
    """The adapter's gradients, and how many numbers the forward pass keeps that are no parameter's."""
    model = open_adapter(random_llama(0, n_layer=6), AdapterConfig(layers=5))
    data = encoded(0, 12, longest=40)
    packer = Packer(data, shared_preambles(data), mask_prompt=True, row_tokens=1000)
    kept: dict[int, int] = {}
    owned = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in owned:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    row = packer.row(np.arange(12).tolist())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = row_loss(model, row, recompute=recompute)
    parameters = [parameter for _, parameter in adapter_parameters(model)]
    return list(torch.autograd.grad(loss, parameters)), sum(kept.values())


def test_recomputing_changes_memory_and_not_results() -> None:
    (plain, much), (recomputed, little) = gradients_and_kept(False), gradients_and_kept(True)
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)
    assert little < much / 4
