"""LoRA: trained low-rank updates of frozen linear layers (arXiv 2106.09685, section 4.1).

    y = W x + b + scale * B (A dropout(x))     A [r, n_in], B [n_out, r]; B = 0 at the start

The scale is alpha / r, or alpha / sqrt(r) with ``rank_stabilised`` (arXiv 2312.03732). A prompt's keys and
values are projected by the same layers, so they have the update too.

`LoraLinear` is the module. The other executors compute the updates of layers that read the same input
together: see `JoinedLora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.layout import Linear, Shape, block_layout, block_names
from lit_adapter.model.llama import Llama
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.model.matrices import Float8Matrix, float8_linear
from lit_adapter.model.parts import TrainedModule, TrainedPart, share, whole

ROWS = 8
"""The rows of a group's joined A are a multiple of this."""


class LoraLinear(TrainedModule):
    """A frozen linear layer with a low-rank update.

    It holds the frozen tensors under their own names, so neither the model nor the base's files need to know
    it.

    Args:
        frozen: the layer it replaces.
        config: rank, scale and dropout.
        shard_axis: the axis that tensor parallelism divides, ``outputs`` or ``inputs``.
    """

    part = "lora"
    trained = ("lora_a", "lora_b")
    weight: Any
    bias: nn.Parameter | None
    matrix: Float8Matrix | None = None
    """The frozen layer of a base in fp8, in place of weight and bias."""
    inputs = outputs = slice(None)
    """What this process computes; everything without tensor parallelism."""

    def __init__(self, frozen: nn.Linear, config: LoraConfig, shard_axis: str) -> None:
        super().__init__()
        self.scale, self.dropout, self.shard_axis = config.scale, config.dropout, shard_axis
        self.weight = frozen.weight
        self.register_parameter("bias", frozen.bias)
        n_out, n_in = frozen.weight.shape
        device = "cpu" if frozen.weight.is_meta else frozen.weight.device  # a base that is not loaded yet
        room = torch.zeros(config.rank, n_in, dtype=torch.float32, device=device)
        self.lora_a = nn.Parameter(room)
        self.lora_b = nn.Parameter(room.new_zeros(n_out, config.rank))

    def shard(self, rank: int, n_shards: int) -> None:
        """Compute the update of one shard's outputs, or one shard's part of the sum over the inputs."""
        if self.shard_axis == "outputs":
            self.outputs = share(self.lora_b.shape[0], rank, n_shards)
        else:
            self.inputs = share(self.lora_a.shape[1], rank, n_shards)

    @property
    def dropout_now(self) -> float:
        """The share of the input that is dropped: none outside training."""
        return self.dropout if self.training else 0.0

    def keep_float8(self, matrix: Float8Matrix) -> None:
        """Keep the frozen layer in fp8; the update stays in the precision of the computation."""
        self.matrix, self.weight, self.bias = matrix, None, None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., n_in]`` to ``[..., n_out]`` in x's dtype."""
        y = F.linear(x, self.weight, self.bias) if self.matrix is None else float8_linear(x, self.matrix)
        if not self.active:
            return y
        a, b = self.lora_a[:, self.inputs].to(x.dtype), self.lora_b[self.outputs].to(x.dtype)
        dropped = F.dropout(x, self.dropout_now, self.dropout_now > 0)
        return y + F.linear(F.linear(dropped, a), b) * self.scale


class LoraPart(TrainedPart):
    """Low-rank updates of the chosen linear layers of every block."""

    name = "lora"
    lr_share = "lr_scale_lora"
    decays = False

    def form(self, model: LlamaConfig) -> dict[str, Any]:
        """Return rank, scale and layers."""
        lora = self.config.lora
        return {"lora.rank": lora.rank, "lora scale": lora.scale, "lora.on": " ".join(self._names(model))}

    def _layers(self, model: LlamaConfig) -> list[Linear]:
        return block_layout(model).projections(self.config.lora.layers)

    def _names(self, model: LlamaConfig) -> list[str]:
        return [linear.projection for linear in self._layers(model)]

    def shapes(self, model: LlamaConfig) -> dict[str, Shape]:
        """Return the shapes of A ``[r, n_in]`` and B ``[n_out, r]``."""
        rank, shapes = self.config.lora.rank, dict[str, Shape]()
        for block in block_names(model):
            for linear in self._layers(model):
                shapes[f"{block}.{linear.name}.lora_a"] = (rank, linear.n_in)
                shapes[f"{block}.{linear.name}.lora_b"] = (linear.n_out, rank)
        return shapes

    def attach(self, model: Llama, generator: torch.Generator | None) -> None:
        """Replace the layers; A is uniform with variance 1 / (3 n_in), as in PEFT, and B is 0."""
        for block in block_names(model.config):
            for declared in self._layers(model.config):
                name = f"{block}.{declared.name}"
                frozen: Any = model.get_submodule(name)
                linear = LoraLinear(frozen, self.config.lora, declared.shard)
                if generator is not None:
                    bound = declared.n_in**-0.5
                    drawn = torch.empty(linear.lora_a.shape).uniform_(-bound, bound, generator=generator)
                    linear.lora_a.data.copy_(drawn)
                model.set_submodule(name, linear)

    def summary(self, model: LlamaConfig, count: Mapping[str, int]) -> str:
        """Return how many numbers are trained, and where."""
        lora = self.config.lora
        where = " ".join(self._names(model))
        return f"LoRA {count['lora_a'] + count['lora_b']:,}, r {lora.rank}, scale {lora.scale:g}, on {where}"


@dataclass
class _Joined:
    """One layer's place in a `JoinedLora`."""

    module: LoraLinear
    outputs: slice
    rows: slice


@dataclass
class JoinedLora:
    """The updates of a block's layers that read the same input, in the precision of the computation.

    ``y += (x a^T) b^T`` adds them all; ``a`` has the layers' A below one another, and ``b`` their scaled B on
    its diagonal. Zeros fill it up to a multiple of eight rows.
    """

    a: Tensor
    """``[R, n_in]``"""
    b: Tensor
    """``[n_out, R]``, for the outputs of the whole group."""
    parts: list[_Joined]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained A and B of each layer in turn."""
        return [parameter for part in self.parts for parameter in (part.module.lora_a, part.module.lora_b)]

    @property
    def dropout(self) -> float:
        """The share of the input that is dropped now; of one input for all layers of the group."""
        return self.parts[0].module.dropout_now

    def reduce(self, x: Tensor) -> Tensor:
        """Return ``x a^T``, ``[T, R]``."""
        return F.linear(x, self.a)

    def add_to(self, y: Tensor, z: Tensor, outputs: slice = slice(None)) -> None:
        """Add the updates of some ``outputs`` to ``y``, given ``z = x a^T``."""
        y.addmm_(z, self.b[outputs].T)

    def gradients(self, dz: Tensor, dyz: Tensor, x: Tensor) -> list[Tensor]:
        """Return the gradients of `parameters`, fp32.

        Args:
            dz: the gradient of z, ``[T, R]``.
            dyz: ``dy^T z``, fp32 ``[n_out, R]``.
            x: the input, ``[T, n_in]``.
        """
        da = product(dz.T, x)
        found = []
        for part in self.parts:
            module, db = part.module, dyz[part.outputs, part.rows] * part.module.scale
            found += [
                whole(da[part.rows], module.lora_a, (slice(None), module.inputs)),
                whole(db, module.lora_b, module.outputs),
            ]
        return found


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a b`` of narrow matrices in fp32."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def joined_rows(model: LlamaConfig, lora: LoraConfig) -> dict[str, int]:
    """Return the rows of the joined A of each group of a block; 0 where it has no updates."""
    groups = [linear.group for linear in block_layout(model).linears]
    chosen = [linear.group for linear in block_layout(model).projections(lora.layers)]
    return {group: _n_rows(chosen.count(group), lora.rank) for group in groups}


def joined_numbers(model: LlamaConfig, lora: LoraConfig) -> int:
    """Return how many numbers the joined updates of all blocks have."""
    layout, total = block_layout(model), 0
    for group, n_rows in joined_rows(model, lora).items():
        linears = [layout[name] for name in layout.groups[group]]
        total += n_rows * (linears[0].n_in + sum(linear.n_out for linear in linears))
    return model.n_layer * total


def _n_rows(n_layers: int, rank: int) -> int:
    return -(-n_layers * rank // ROWS) * ROWS


@torch.no_grad()
def join_updates(model: Llama) -> list[dict[str, JoinedLora]]:
    """Return the updates of each block by the group of `layout`, as the trained tensors are now.

    They are in the base's precision; groups without updates are absent. The blocks are joined together, in a
    few large copies. Where processes share the heads of a row, the updates are those of the outputs that this
    one computes.
    """
    found: list[dict[str, JoinedLora]] = [{} for _ in model.layers]
    layout = block_layout(model.config.shard(model.n_shards))
    for group, names in layout.groups.items():
        modules = {name: [block.get_submodule(name) for block in model.layers] for name in names}
        chosen = [name for name, layers in modules.items() if isinstance(layers[0], LoraLinear)]
        if not chosen:
            continue
        first = modules[chosen[0]][0]
        rank, n_in = len(first.lora_a), layout[chosen[0]].n_in
        n_rows, places = _n_rows(len(chosen), rank), layout.outputs(group)
        dtype = model.embed_tokens.weight.dtype
        a = first.lora_a.new_zeros(len(model.layers), n_rows, n_in, dtype=dtype)
        b = a.new_zeros(len(model.layers), places[names[-1]].stop, n_rows)
        for number, name in enumerate(chosen):
            rows = slice(number * rank, (number + 1) * rank)
            of_all = modules[name]
            a[:, rows] = torch.stack([module.lora_a[:, module.inputs] for module in of_all])
            own_b = torch.stack([module.lora_b[module.outputs] for module in of_all])
            b[:, places[name], rows] = own_b * first.scale
            for index, module in enumerate(of_all):
                joined = found[index].setdefault(group, JoinedLora(a[index], b[index], []))
                joined.parts.append(_Joined(module, places[name], rows))
    return found
