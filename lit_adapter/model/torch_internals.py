"""Every private part of torch that this package touches, and why no public one serves.

`tests/test_torch_internals.py` has a test for each; it names the function when an upgrade moves a part.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn


def own_children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a module's children by name; with the public iterators a survey takes longer."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's own parameters and buffers by name, for the same reason."""
    return [
        (name, tensor)
        for registry in (module._parameters, module._buffers)
        for name, tensor in registry.items()
        if tensor is not None
    ]


def hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of a module, which torch lets users register but not list."""
    return [
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *module._backward_pre_hooks.values(),
        *module._backward_hooks.values(),
    ]


def is_fsdp_part(part: Any) -> bool:
    """Tell a class or hook that FSDP2 adds to what it shards; torch has no public list of them."""
    return str(getattr(part, "__module__", "")).startswith("torch.distributed")


def flash_attention_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attend with the CPU kernel also on the meta device, where the public function uses another one.

    Args:
        q: ``[B, H, T, D]``.
        k: ``[B, H, S, D]``.
        v: ``[B, H, S, D]``.
        mask: added to the scores.
        scale: of the scores.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, attn_mask=mask, scale=scale)[0]


def packs(dtype: torch.dtype) -> bool:
    """Return whether `pack` and `packed_linear` serve: in fp32 and bf16, on x86 processors."""
    if not torch.backends.mkldnn.is_available() or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(weight: Tensor) -> Tensor:
    """Return a copy of weights ``[outputs, inputs]`` in the layout that oneDNN's products read fastest.

    The public function for it, ``torch.utils.mkldnn.to_mkldnn``, makes a copy that every product packs anew.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight, 16)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + b [B, outputs]`` of ``x [B, inputs]`` and weights from `pack`."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
