"""The frozen matrices of the CUDA executors: in the base's precision, or in fp8 with a scale for each row.

A product in fp8 (e4m3) needs both factors scaled along the dimension that it sums over. The forward pass sums
over a matrix's inputs and the backward pass over its outputs, so a transposed copy is kept as well. Both
together are as large as the matrix in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapter.model.joining import as_one, joined_biases, lie_side_by_side, weights_of

LARGEST = 448.0
"""The largest number of fp8 (e4m3)."""


@dataclass
class Quantised:
    """A matrix in fp8 with a scale for each row."""

    data: Tensor
    """``[T, C]``"""
    scale: Tensor
    """fp32 ``[T, 1]``"""

    def __getitem__(self, places: Tensor) -> Quantised:
        return Quantised(self.data[places], self.scale[places])


Operand = Tensor | Quantised
"""An operand of a matrix product: in the base's precision, or in fp8."""


class Matrix(Protocol):
    """A frozen ``[outputs, inputs]`` matrix W, with the bias b of its layers, if they have one."""

    quantised: bool
    """Whether its products take `Quantised` operands."""

    def __call__(self, x: Operand) -> Tensor:
        """Return ``x W^T + b``, ``[T, outputs]``."""

    def add_to(self, total: Tensor, x: Operand) -> None:
        """Add ``x W^T + b`` to ``total``, in place."""

    def backward(self, dy: Operand) -> Tensor:
        """Return ``dy W``, ``[T, inputs]``."""

    def outputs(self, part: slice) -> Matrix:
        """Return the matrix of some of the outputs."""


class PlainMatrix:
    """A matrix in bf16 or fp16."""

    quantised = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Operand) -> Tensor:
        """Return ``x W^T + b``."""
        return F.linear(_plain(x), self.weight, self.bias)

    def add_to(self, total: Tensor, x: Operand) -> None:
        """Add ``x W^T + b`` to ``total``, in place."""
        total.addmm_(_plain(x), self.weight.T)
        _add_bias(total, self.bias)

    def backward(self, dy: Operand) -> Tensor:
        """Return ``dy W``."""
        return _plain(dy) @ self.weight

    def outputs(self, part: slice) -> PlainMatrix:
        """Return the matrix of some of the outputs."""
        return PlainMatrix(self.weight[part], _part(self.bias, part))


class SplitMatrix:
    """A matrix in bf16 or fp16 whose outputs are in several tensors, as FSDP2 gathers them."""

    quantised = False

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        self.weights, self.bias = weights, bias
        self.sizes = [len(weight) for weight in weights]

    def __call__(self, x: Operand) -> Tensor:
        """Return ``x W^T + b``."""
        x = _plain(x)
        y = x.new_empty(len(x), sum(self.sizes))
        for weight, part in zip(self.weights, y.split(self.sizes, dim=1), strict=True):
            torch.mm(x, weight.T, out=part)
        _add_bias(y, self.bias)
        return y

    def add_to(self, total: Tensor, x: Operand) -> None:
        """Add ``x W^T + b`` to ``total``, in place."""
        for weight, part in zip(self.weights, total.split(self.sizes, dim=1), strict=True):
            part.addmm_(_plain(x), weight.T)
        _add_bias(total, self.bias)

    def backward(self, dy: Operand) -> Tensor:
        """Return ``dy W``."""
        first, *rest = zip(self.weights, _plain(dy).split(self.sizes, dim=1), strict=True)
        total = first[1] @ first[0]
        for weight, part in rest:
            total.addmm_(part, weight)
        return total

    def outputs(self, part: slice) -> SplitMatrix:
        """Return the matrix of some of the outputs."""
        *firsts, n_outputs = accumulate(self.sizes, initial=0)
        start, end, _ = part.indices(n_outputs)
        numbered = zip(self.weights, firsts, strict=True)
        weights = [weight[max(start - first, 0) : max(end - first, 0)] for weight, first in numbered]
        return SplitMatrix([weight for weight in weights if len(weight)], _part(self.bias, part))


def _part(bias: Tensor | None, part: slice) -> Tensor | None:
    return None if bias is None else bias[part]


def _add_bias(y: Tensor, bias: Tensor | None) -> None:
    if bias is not None:
        y.add_(bias)


def _plain(x: Operand) -> Tensor:
    assert isinstance(x, Tensor)
    return x


@dataclass
class Float8Matrix:
    """A matrix in fp8, and its transpose with separate scales."""

    data: Tensor
    """``[outputs, inputs]``"""
    scale: Tensor
    """The scale of each output, fp32 ``[1, outputs]``."""
    back: Tensor
    """``[inputs, outputs]``"""
    back_scale: Tensor
    """The scale of each input, fp32 ``[1, inputs]``."""
    bias: Tensor | None = None
    """``[outputs]``, in the base's precision."""
    quantised = True

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Float8Matrix:
        """Quantise a matrix."""
        return cls(*_scaled(weight), *_scaled(weight.T), bias)

    def __call__(self, x: Operand) -> Tensor:
        """Return ``x W^T + b``."""
        y = _product(x, self.data, self.scale)
        _add_bias(y, self.bias)
        return y

    def add_to(self, total: Tensor, x: Operand) -> None:
        """Add ``x W^T + b`` to ``total``, in place."""
        total.add_(self(x))

    def backward(self, dy: Operand) -> Tensor:
        """Return ``dy W``."""
        return _product(dy, self.back, self.back_scale)

    def outputs(self, part: slice) -> Float8Matrix:
        """Return the matrix of some of the outputs."""
        bias = _part(self.bias, part)
        return Float8Matrix(self.data[part], self.scale[:, part], self.back[:, part], self.back_scale, bias)


@dataclass
class AffineMatrix:
    """A matrix whose outputs have a trained bias and scale, ``s (x W^T + b)``; see `affine`."""

    matrix: Matrix
    scale: Tensor
    """fp32 ``[outputs]``"""
    bias: Tensor
    """fp32 ``[outputs]``"""

    quantised = False

    def __call__(self, x: Operand) -> Tensor:
        """Return ``s (x W^T + b)``."""
        y = self.matrix(x)
        return torch.addcmul(self.scale * self.bias, y, self.scale, out=y)

    def add_to(self, total: Tensor, x: Operand) -> None:
        """Add ``s (x W^T + b)`` to ``total``, in place."""
        total.add_(self(x))

    def backward(self, dy: Operand) -> Tensor:
        """Return ``(s dy) W``."""
        dy = _plain(dy)
        return self.matrix.backward(torch.mul(dy, self.scale, out=torch.empty_like(dy)))

    def outputs(self, part: slice) -> AffineMatrix:
        """Return the matrix of some of the outputs."""
        return AffineMatrix(self.matrix.outputs(part), self.scale[part], self.bias[part])


def quantised(x: Tensor) -> Quantised:
    """Return ``x [T, C]`` in fp8, as the kernels round it; its data is contiguous."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return Quantised((x / scale).to(torch.float8_e4m3fn).contiguous(), scale)


def _scaled(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``weight`` in fp8, and the scales of its rows ``[1, rows]``."""
    found = quantised(weight)
    return found.data, found.scale.T.contiguous()


def _product(x: Operand, matrix: Tensor, scale: Tensor) -> Tensor:
    assert isinstance(x, Quantised)
    rows = F.ScalingType.RowWise
    return F.scaled_mm(x.data, matrix.T, x.scale, rows, scale, rows, use_fast_accum=True)


class _Float8Product(torch.autograd.Function):
    """A product with a frozen matrix in fp8, by PyTorch's operations alone; so is its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Float8Matrix) -> Tensor:
        ctx.matrix = matrix
        return matrix(quantised(x))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix.backward(quantised(dy)), None


def float8_linear(x: Tensor, matrix: Float8Matrix) -> Tensor:
    """Map ``[..., inputs]`` to ``[..., outputs]`` as the modules do with a base in fp8."""
    y: Tensor = _Float8Product.apply(x.reshape(-1, x.shape[-1]), matrix)
    return y.view(*x.shape[:-1], -1)


class Float8Linear(nn.Module):
    """Replaces a linear layer of a block whose weight is kept in fp8."""

    def __init__(self, matrix: Float8Matrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., inputs]`` to ``[..., outputs]``."""
        return float8_linear(x, self.matrix)


def side_by_side(*linears: Any) -> PlainMatrix | SplitMatrix:
    """Return the joined matrix of layers that read the same input; no weight is copied."""
    weights, bias = weights_of(*linears), joined_biases(*linears)
    return PlainMatrix(as_one(weights), bias) if lie_side_by_side(weights) else SplitMatrix(weights, bias)
