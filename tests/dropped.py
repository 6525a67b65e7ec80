"""Dropout of the kernels for the modules: they drop the same places, so that both can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lit_adapter.model.attention import PackedRow
from lit_adapter.model.kernels import rows
from lit_adapter.model.kernels.attention_forward import kept_weights
from lit_adapter.model.kernels.sizes import power_of_two
from lit_adapter.model.layout import block_layout
from lit_adapter.model.llama import Llama


@triton.jit
def _kept_kernel(out_at, seed, n_queries, DROPOUT: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr):
    h, n, r = tl.program_id(0), tl.arange(0, M), tl.arange(0, ROWS)
    at = out_at + (h * n_queries + n)[:, None] * ROWS + r[None, :]
    kept = kept_weights(seed, h, n, n_queries, DROPOUT, ROWS)
    tl.store(at, kept, mask=(n < n_queries)[:, None])


class Dropped:
    """Drops in the modules what the kernels drop with a view's seeds."""

    def __init__(self, model: Llama, row: PackedRow, seeds: list[dict[str, int]]) -> None:
        self.row, self.seeds, self.prefix_layer, self.now = row, seeds, 0, ("", 0)
        self.prefixes = [block.self_attn.index for block in model.layers if block.self_attn.prefix]
        groups = block_layout(model.config).groups
        for index, block in enumerate(model.layers):
            for group, names in groups.items():
                for name in names:
                    block.get_submodule(name).register_forward_pre_hook(self._note(group, index))

    def _note(self, group: str, layer: int) -> Any:
        def note(*unused: Any) -> None:
            self.now = (group, layer)

        return note

    def __call__(self, x: Tensor, share: float, training: bool = True) -> Tensor:
        if not training:
            return x
        kept = self.of_prefix(x, share) if x.ndim == 4 else self.of_input(x, share)
        return (x * kept).to(x.dtype)

    def of_prefix(self, weight: Tensor, share: float) -> Tensor:
        """Return the factors of the weights ``[1, H, K, T]`` of the next layer with a prefix."""
        _, H, K, T = weight.shape
        kept = torch.empty(H, T, max(16, power_of_two(K)), device=weight.device)
        seed, width = self.seeds[self.prefixes[self.prefix_layer]]["prefix"], kept.shape[2]
        _kept_kernel[(H,)](kept, seed, T, DROPOUT=share, ROWS=width, M=power_of_two(T))
        self.prefix_layer += 1
        return kept[:, :, :K].mT[None]

    def of_input(self, x: Tensor, share: float) -> Tensor:
        """Return the factors of a linear layer's input: a prompt ``[K, C]``, or tokens ``[1, T or M, C]``."""
        group, layer = self.now
        T, seed = len(self.row.ids), self.seeds[layer][group]
        if x.ndim == 2:
            return rows.dropout(torch.ones(T + len(x), x.shape[-1], device=x.device), share, seed)[T:]
        n = T if x.shape[1] == T or group == "qkv" else x.shape[1]
        kept = rows.dropout(torch.ones(n, x.shape[-1], device=x.device), share, seed)
        return kept if x.shape[1] == n else kept[self.row.target_index]


@contextmanager
def dropping(dropped: Dropped) -> Iterator[None]:
    """Let the modules drop the same."""
    own, F.dropout = F.dropout, dropped
    try:
        yield
    finally:
        F.dropout = own
