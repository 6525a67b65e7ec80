"""Joins the weights of layers that read the same input, so that one matrix product computes them all.

On CPUs, products of several rows read a copy of the joined weights that is packed for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_adapter.device import free_bytes
from lit_adapter.model.layout import BlockLayout
from lit_adapter.model.torch_internals import pack


def grouped_linears(block: nn.Module, layout: BlockLayout) -> dict[str, list[Any]]:
    """Return the linear layers of each group of a block, in the order in which they are joined."""
    return {group: [block.get_submodule(name) for name in names] for group, names in layout.groups.items()}


def join(*linears: Any) -> None:
    """Store the layers' weights side by side in memory, if they are not yet; the layers use them there."""
    weights = weights_of(*linears)
    if lie_side_by_side(weights):
        return
    whole = torch.cat(weights)
    for linear, part in zip(linears, whole.split([len(weight) for weight in weights]), strict=True):
        linear.weight.data = part


def joined(*linears: Any) -> Tensor:
    """Return the weights as one matrix ``[sum of outputs, inputs]``: a view after `join`, else a copy."""
    weights = weights_of(*linears)
    return as_one(weights) if lie_side_by_side(weights) else torch.cat(weights)


def weights_of(*linears: Any) -> list[Tensor]:
    """Return the layers' weights, each ``[outputs, inputs]``."""
    return [linear.weight.detach() for linear in linears]


def joined_biases(*linears: Any) -> Tensor | None:
    """Return the layers' biases as one ``[sum of outputs]``, zeros where a layer has none; or None."""
    if all(linear.bias is None for linear in linears):
        return None
    found = ((linear.bias, linear.weight) for linear in linears)
    return torch.cat([w.new_zeros(len(w)) if bias is None else bias.detach() for bias, w in found])


def as_one(weights: list[Tensor]) -> Tensor:
    """Return weights that are side by side in memory as one matrix, without a copy."""
    return weights[0].as_strided((sum(map(len, weights)), weights[0].shape[1]), weights[0].stride())


def lie_side_by_side(weights: list[Tensor]) -> bool:
    """Whether each weight starts in memory where the previous one ends."""
    storage, place = weights[0].untyped_storage().data_ptr(), weights[0].storage_offset()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != storage or weight.storage_offset() != place:
            return False
        place += weight.numel()
    return True


class PackedWeights:
    """Packed copies of a base's matrices, made when first needed; all models on the base share them."""

    def __init__(self) -> None:
        self._copies: dict[int, Tensor] = {}  # by the place of the matrix in memory

    def __deepcopy__(self, memo: Any) -> PackedWeights:
        """Return an empty object: torch cannot copy them, and a copied base is in another place."""
        return PackedWeights()

    def copies_of(self, matrices: list[Tensor]) -> list[Tensor] | None:
        """Return a copy of each matrix; None where new ones would take more than half of the free memory."""
        missing = [matrix for matrix in matrices if matrix.data_ptr() not in self._copies]
        free = free_bytes(torch.device("cpu"))
        if free is not None and 2 * sum(matrix.nbytes for matrix in missing) > free:
            return None
        self._copies |= {matrix.data_ptr(): pack(matrix) for matrix in missing}
        return [self._copies[matrix.data_ptr()] for matrix in matrices]
