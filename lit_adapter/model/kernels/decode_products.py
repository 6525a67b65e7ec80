"""Products of the newest tokens of a few texts with the weights, each with what surrounds it.

Such a step is bound by reading weights. What follows a product (rotation, cache write, SiLU or residual) is
computed by the product's own kernel, and for a single text so is the RMSNorm before it: a layer with its
attention takes five launches, for several texts seven. On compute capability 9 a launch begins while the one
before it ends.

Tensors are contiguous and on one CUDA device.

Letters: B texts, C width, M width of the MLP, H query heads, G key/value heads, D head size, S cache length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_adapter.model.kernels.decode_product_kernels import (
    gate_up_kernel,
    linear_kernel,
    norm_kernel,
    project_kernel,
)
from lit_adapter.model.kernels.sizes import ceil_div, power_of_two, row_stride, whole_row

MOST_TEXTS = 32
"""Texts whose hidden states fit a program's registers beside its weights."""


@dataclass(frozen=True)
class Tiling:
    """How a product is divided among programs."""

    rows: int
    """Rows of either weight that a program owns."""
    depth: int
    """Columns that a program reads at a time."""
    warps: int
    stages: int = 1
    """Such reads in flight."""
    splits: int = 1
    """Programs that share the columns of the same rows."""


# The best of 15 to 40 tried for each on an H200, in the step of LLaMA 7B.
ONE_NORMED = Tiling(rows=2, depth=256, warps=2)
"""For a single text, whose product norms it."""
ONE_ADDED = Tiling(rows=4, depth=512, warps=8)
"""For a single text whose product is added to the residual."""
SEVERAL_QKV = Tiling(rows=16, depth=256, warps=2, stages=3)
"""For several texts' queries, keys and values."""
SEVERAL_WIDE = Tiling(rows=64, depth=64, warps=8, stages=4)
"""For several texts and a weight of many rows: the MLP's gate and up, the output layer."""
SEVERAL_ADDED = Tiling(rows=64, depth=128, warps=4, stages=3, splits=4)
"""For several texts whose product is added to the residual: few rows, so programs share columns."""


def starts_early(device: torch.device) -> bool:
    """Return whether a launch may overlap the end of the one before it."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def computes(n_texts: int, head_dim: int, device: torch.device) -> bool:
    """Return whether `Products` can take steps of ``n_texts`` texts.

    Several texts take half a head in tiles of `SEVERAL_QKV`, and need matrix units of compute capability 8.
    """
    fit = n_texts <= MOST_TEXTS and head_dim >= 2 * SEVERAL_QKV.rows
    return n_texts == 1 or (fit and torch.cuda.get_device_capability(device) >= (8, 0))


class Products:
    """The products of the steps of B texts.

    Args:
        x: hidden states ``[B, C]`` of the shape, dtype and device of later ones; `computes` must allow them.
    """

    def __init__(self, x: Tensor) -> None:
        self.n_texts, self.C = x.shape
        self.early = starts_early(x.device)
        properties: Any = torch.cuda.get_device_properties(x.device)
        self.shared_memory = properties.shared_memory_per_block_optin  # of a program, bytes
        self.padded = 1 if self.n_texts == 1 else max(16, power_of_two(self.n_texts))
        self.normed = torch.empty_like(x)
        blocks = ceil_div(self.C, 2 * SEVERAL_ADDED.rows)
        sums = (blocks, SEVERAL_ADDED.splits, 2, SEVERAL_ADDED.rows, self.padded)
        self.sums = torch.empty(sums, device=x.device)  # of programs that share columns, fp32
        self.arrived = torch.zeros(blocks, dtype=torch.int32, device=x.device)

    def project(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        rotation: tuple[Tensor, Tensor],
        position: Tensor,
        q: Tensor,
        cache: tuple[Tensor, Tensor],
    ) -> None:
        """Norm, project to queries, keys and values, rotate, and put keys and values into the cache.

        Args:
            x: hidden states ``[B, C]``.
            norm: the norm's weight ``[C]``, or that of each text ``[B, C]``; a trained one is in fp32.
            eps: the norm's.
            weights: of queries ``[H * D, C]``, keys and values ``[G * D, C]``.
            biases: of queries ``[H * D]``, keys and values ``[G * D]``; all None without them.
            rotation: cosines and sines of every position of the cache, fp32 ``[S, D/2]``.
            position: of the new tokens ``[B]``.
            q: is given the rotated queries ``[B, H * D]``.
            cache: the layer's keys and values ``[B, G, S, D]``.
        """
        _, G, S, D = cache[0].shape
        H, how = q.shape[1] // D, self._tiling(ONE_NORMED, SEVERAL_QKV)
        rows = min(how.rows, D // 2)
        given = [weight if bias is None else bias for weight, bias in zip(weights, biases, strict=True)]
        project_kernel[((H + 2 * G) * (D // 2 // rows),)](
            self._ready(x, norm, eps), norm, *weights, *given, *rotation, position, q, *cache, S, eps,
            self.n_texts, C=self.C, H=H, G=G, D=D, BIAS=biases[0] is not None, **self._launch(how, rows),
        )  # fmt: skip

    def gate_up(self, x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor, hidden: Tensor) -> None:
        """Norm, and write ``silu(gate x) * up x``.

        ``x`` and ``norm`` are those of `project`; ``gate`` and ``up [M, C]``; ``hidden [B, M]`` receives the
        result.
        """
        M, how = len(gate), self._tiling(ONE_NORMED, SEVERAL_WIDE)
        gate_up_kernel[(ceil_div(M, how.rows),)](
            self._ready(x, norm, eps), norm, gate, up, hidden, M, eps, self.n_texts,
            C=self.C, **self._launch(how, how.rows),
        )  # fmt: skip

    def add_linear(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Add ``weight x`` to ``out [B, C]``, the residual; ``x [B, N]``, ``weight [C, N]``."""
        self._linear(x, None, 0.0, weight, out, self._tiling(ONE_ADDED, SEVERAL_ADDED))

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, out: Tensor) -> None:
        """Write ``weight norm(x)`` to ``out [B, N]``.

        ``x`` and ``norm`` are those of `project`; ``weight [N, C]``.
        """
        how = self._tiling(ONE_NORMED, SEVERAL_WIDE)
        self._linear(self._ready(x, norm, eps), norm, eps, weight, out, how)

    def _linear(
        self, x: Tensor, norm: Tensor | None, eps: float, weight: Tensor, out: Tensor, how: Tiling
    ) -> None:
        N = len(weight)
        half = ceil_div(N, 2)
        linear_kernel[ceil_div(half, how.rows), how.splits](
            x, x if norm is None else norm, weight, out, self.sums, self.arrived, N, half, eps, self.n_texts,
            C=x.shape[1], ADD=norm is None, SPLITS=how.splits, **self._launch(how, how.rows),
        )  # fmt: skip

    def _tiling(self, one: Tiling, several: Tiling) -> Tiling:
        return one if self.n_texts == 1 else several

    def _ready(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """Return normed states; those of a single text unchanged, as its product applies the norm itself."""
        if self.n_texts == 1:
            return x
        norm_kernel[(self.n_texts,)](
            x, norm, self.normed, row_stride(norm), eps,
            C=self.C, EARLY=self.early, launch_pdl=self.early, **whole_row(self.C),
        )  # fmt: skip
        return self.normed

    def _launch(self, how: Tiling, rows: int) -> dict[str, Any]:
        part = 2 * how.depth * (2 * rows + self.padded)  # bytes of what is read at a time
        return {
            "ROWS": rows, "DEPTH": how.depth, "TEXTS": self.padded, "EARLY": self.early,
            "num_warps": how.warps, "num_stages": max(1, min(how.stages, self.shared_memory // part)),
            "launch_pdl": self.early,
        }  # fmt: skip
