"""The frozen matrices of a block as the CUDA executors read them: one for each group of `layout`.

Layers that read the same input are joined. No weight is kept twice, except for a base in fp8 (see
`matrices`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.model.affine import AdaptedLinear, JoinedAffine
from lit_adapter.model.cuda_support import unsupported
from lit_adapter.model.executors import Setting
from lit_adapter.model.joining import grouped_linears, join, joined, joined_biases
from lit_adapter.model.layout import BlockLayout, block_layout
from lit_adapter.model.llama import Block, Llama
from lit_adapter.model.lora import LoraLinear
from lit_adapter.model.matrices import Float8Linear, Float8Matrix, Matrix, Operand, side_by_side

BESIDE_FLOAT8 = "the adapter trains the linear layers' biases and scales"
"""Why a base is not kept in fp8."""


def prepare(model: Llama, blocks: Sequence[Block] | None = None, *, float8: bool = False) -> None:
    """Store a loaded model's matrices as the CUDA executors read them, if they can compute the model.

    Args:
        model: on its device, adapter attached.
        blocks: those that are not sharded; by default all.
        float8: keep the matrices of the blocks in fp8.

    Raises:
        UserError: fp8 on a model or device that cannot have it.
    """
    why = unsupported(model, Setting.of(model))
    if float8 and (why := why or _why_not_float8(model)):
        raise UserError(f"trainer.base_precision is fp8, but {why}; use base_precision full")
    if why is not None:
        return
    layout = block_layout(model.config)
    for block in model.layers if blocks is None else blocks:  # never a second copy of the whole model
        if not float8:
            _join_groups(block, layout)
        block.fused_weights = keep_float8(block, layout) if float8 else _plain_weights(block, layout)


def _why_not_float8(model: Llama) -> str | None:
    """Return why a model that the CUDA executors compute cannot be kept in fp8."""
    if isinstance(model.layers[0].mlp.down_proj, AdaptedLinear):
        return BESIDE_FLOAT8
    device = model.embed_tokens.weight.device
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} has no fp8 products (Hopper and later have)"
    return None


def join_groups(model: Llama) -> None:
    """Store matrices that read the same input side by side, where they are not yet."""
    for block in model.layers:
        _join_groups(block, block_layout(model.config))


def _join_groups(block: Block, layout: BlockLayout) -> None:
    for linears in grouped_linears(block, layout).values():
        join(*linears)


@dataclass
class BlockWeights:
    """The matrices of a block, one for each group of `layout`."""

    qkv: Matrix
    o: Matrix
    gate_up: Matrix
    down: Matrix

    @property
    def quantised(self) -> bool:
        """Whether the products take fp8."""
        return self.qkv.quantised

    def adapted(self, affine: Mapping[str, JoinedAffine]) -> BlockWeights:
        """Return them with V2's biases and scales, given by group."""
        if not affine:
            return self
        return replace(self, **{group: of.applied(getattr(self, group)) for group, of in affine.items()})

    def operand(self, x: Operand) -> Operand:
        """Return ``x`` in the form that a product takes."""
        if not self.quantised or not isinstance(x, Tensor):
            return x
        from lit_adapter.model.kernels.rows import quantise  # needs Triton, which CUDA builds of torch bring

        return quantise(x)


def block_weights(block: Block, layout: BlockLayout) -> BlockWeights:
    """Return a block's matrices; after `prepare` none of them is copied."""
    return block.fused_weights or _plain_weights(block, layout)


def float8_weights(block: Block, layout: BlockLayout) -> BlockWeights:
    """Return a block's matrices in fp8."""
    groups = grouped_linears(block, layout).items()
    return BlockWeights(**{g: Float8Matrix.of(joined(*some), joined_biases(*some)) for g, some in groups})


def _plain_weights(block: Block, layout: BlockLayout) -> BlockWeights:
    groups = grouped_linears(block, layout).items()
    return BlockWeights(**{group: side_by_side(*linears) for group, linears in groups})


def keep_float8(block: Block, layout: BlockLayout) -> BlockWeights:
    """Replace a block's matrices by fp8 ones, beside which LoRA's updates stay, and return them."""
    weights = float8_weights(block, layout)
    for group in layout.groups:
        for name, outputs in layout.outputs(group).items():
            part, linear = getattr(weights, group).outputs(outputs), block.get_submodule(name)
            if isinstance(linear, LoraLinear):
                linear.keep_float8(part)
            else:
                block.set_submodule(name, Float8Linear(part))
    return weights
