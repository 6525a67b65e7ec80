"""Trained norms, alone or as part of V2, and V2's biases and scales (arXiv 2304.15010, section 4.1).

    linear   y = s * (W x + b)     b = 0 and s = 1 at the start; W and its own bias stay frozen
    norm     y = w * x / rms(x)    w starts as the frozen norm's weight, which stays as it is

Both modules replace the module they adapt and hold its frozen tensors under the same names, so neither the
model nor the base's files need to know them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.joining import grouped_linears
from lit_adapter.model.layout import FINAL_NORM, OUTPUT_LAYER, BlockLayout, Shape, block_layout, block_names
from lit_adapter.model.llama import Block, Llama, RMSNorm
from lit_adapter.model.matrices import AffineMatrix, Matrix
from lit_adapter.model.parts import TrainedModule, TrainedPart, share, whole


class AdaptedLinear(TrainedModule):
    """A frozen linear layer with a trained bias and scale on each of its outputs.

    Args:
        frozen: the layer it replaces.
        shard_axis: the axis that tensor parallelism divides, ``outputs`` or ``inputs``.
    """

    part = "linears"
    trained = ("adapter_bias", "adapter_scale")
    bias: nn.Parameter | None
    outputs = slice(None)
    """The outputs that this process computes; all of them without tensor parallelism."""
    bias_share = 1.0
    """0 where another process, whose result is added to this one's, adds the bias."""

    def __init__(self, frozen: nn.Linear, shard_axis: str) -> None:
        super().__init__()
        self.shard_axis = shard_axis
        self.weight = frozen.weight
        self.register_parameter("bias", frozen.bias)
        device = "cpu" if frozen.weight.is_meta else frozen.weight.device  # a base that is not loaded yet
        zero = torch.zeros(frozen.out_features, dtype=torch.float32, device=device)
        self.adapter_bias = nn.Parameter(zero)
        self.adapter_scale = nn.Parameter(torch.ones_like(zero))

    def shard(self, rank: int, n_shards: int) -> None:
        """Scale the outputs of one shard, or add the bias in one process alone."""
        if self.shard_axis == "outputs":
            self.outputs = share(len(self.adapter_scale), rank, n_shards)
        else:
            self.bias_share = float(rank == 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., n_in]`` to ``[..., n_out]`` in x's dtype."""
        y = F.linear(x, self.weight, self.bias)
        if not self.active:
            return y
        scale, bias = self.adapter_scale[self.outputs], self.adapter_bias[self.outputs]
        # In this form autograd keeps the narrow y, not a wide y + b.
        return (y * scale + scale * bias * self.bias_share).to(y.dtype)


@dataclass(frozen=True)
class JoinedAffine:
    """The biases and scales of a block's layers that read the same input, for executors."""

    modules: list[AdaptedLinear]

    @property
    def parameters(self) -> list[Tensor]:
        """The trained bias and scale of each layer in turn."""
        return [tensor for module in self.modules for tensor in (module.adapter_bias, module.adapter_scale)]

    def applied(self, matrix: Matrix) -> AffineMatrix:
        """Return the joined frozen ``matrix`` with the biases and scales of the outputs computed here."""
        bias = torch.cat([module.adapter_bias.detach()[module.outputs] for module in self.modules])
        return AffineMatrix(matrix, torch.cat(self._scales), bias * self.modules[0].bias_share)

    @property
    def _scales(self) -> list[Tensor]:
        """The scale of each layer's outputs that this process computes."""
        return [module.adapter_scale.detach()[module.outputs] for module in self.modules]

    def gradients(self, products: Tensor, total: Tensor) -> list[Tensor]:
        """Return the gradients of `parameters`.

        Args:
            products: the sum of ``dy y`` over tokens ``[outputs]``: of an output y and its gradient.
            total: the sum of ``dy``.
        """
        found, scales = [], self._scales
        sizes = [len(scale) for scale in scales]
        parts = zip(self.modules, scales, products.split(sizes), total.split(sizes), strict=True)
        for module, scale, product, sum_ in parts:
            # y / s is W x + b. An output whose scale is 0 tells nothing of it, and its scale stays.
            own = (scale * sum_ * module.bias_share, torch.where(scale == 0, 0, product / scale))
            found += [whole(gradient, module.adapter_scale, module.outputs) for gradient in own]
        return found


def join_affine(block: Block, layout: BlockLayout) -> dict[str, JoinedAffine]:
    """Return a block's trained biases and scales by the group of `layout`; nothing where it has none."""
    if not isinstance(block.mlp.down_proj, AdaptedLinear):  # all linear layers have them, or none
        return {}
    return {group: JoinedAffine(linears) for group, linears in grouped_linears(block, layout).items()}


class AdaptedNorm(RMSNorm, TrainedModule):
    """A root mean square norm with a trained weight beside the frozen one."""

    part = "norms"
    trained = ("adapter_weight",)

    def __init__(self, frozen: RMSNorm) -> None:
        nn.Module.__init__(self)  # that of a plain norm makes a weight
        self.eps, self.weight = frozen.eps, frozen.weight
        self.adapter_weight = nn.Parameter(frozen.weight.detach().to(torch.float32, copy=True))

    @property
    def used_weight(self) -> Tensor:
        """The trained weight, where the frozen one is; the frozen one while the adapter is switched off."""
        return self.adapter_weight.to(self.weight.device) if self.active else self.weight


class NormPart(TrainedPart):
    """The norms of the layers that learn, and the last one."""

    name = "norms"
    decays = False

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.lr_share = "lr_scale_v2" if "linears" in config.parts else "lr_scale_norms"

    def shapes(self, model: LlamaConfig) -> dict[str, Shape]:
        """Return the shape ``[C]`` of every weight."""
        norms, blocks = {FINAL_NORM: model.n_embd}, block_names(model)
        for index in self.config.learning_layers(model.n_layer):
            norms |= {f"{blocks[index]}.{norm.name}": norm.width for norm in block_layout(model).norms}
        return {f"{name}.adapter_weight": (width,) for name, width in norms.items()}

    def attach(self, model: Llama, generator: torch.Generator | None) -> None:
        """Replace the norms."""
        for tensor in self.shapes(model.config):
            name = tensor.rpartition(".")[0]
            model.set_submodule(name, AdaptedNorm(model.get_submodule(name)))  # type: ignore[arg-type]

    def summary(self, model: LlamaConfig, count: Mapping[str, int]) -> str:
        """Return how many numbers are trained."""
        return f"norms {count['adapter_weight']:,}"


class LinearPart(TrainedPart):
    """A bias and a scale on the outputs of every linear layer."""

    name = "linears"
    lr_share = "lr_scale_v2"
    decays = False

    def form(self, model: LlamaConfig) -> dict[str, Any]:
        """Return whether the output layer is adapted."""
        return {"head": self.config.head}

    def _axes(self, model: LlamaConfig) -> dict[str, tuple[int, str]]:
        """Return the number of outputs and the shard axis of each adapted layer, by name."""
        found = {OUTPUT_LAYER: (model.vocab_size, "outputs")} if self.config.head else {}
        for block in block_names(model):
            for linear in block_layout(model).linears:
                found[f"{block}.{linear.name}"] = (linear.n_out, linear.shard)
        return found

    def shapes(self, model: LlamaConfig) -> dict[str, Shape]:
        """Return the shape ``[n_out]`` of every bias and scale."""
        return {
            f"{name}.{tensor}": (n_out,)
            for name, (n_out, _) in self._axes(model).items()
            for tensor in AdaptedLinear.trained
        }

    def attach(self, model: Llama, generator: torch.Generator | None) -> None:
        """Replace the linear layers."""
        for name, (_, axis) in self._axes(model.config).items():
            model.set_submodule(name, AdaptedLinear(model.get_submodule(name), axis))  # type: ignore[arg-type]

    def summary(self, model: LlamaConfig, count: Mapping[str, int]) -> str:
        """Return how many numbers are trained."""
        output = "with" if self.config.head else "without"
        biases, scales = count["adapter_bias"], count["adapter_scale"]
        return f"biases {biases:,} and scales {scales:,}, {output} the output layer's"
