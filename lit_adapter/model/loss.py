"""Cross-entropy at the target positions, in chunks, through a frozen output head.

Only positions with a target meet the head, a chunk at a time, so that no ``[tokens, vocabulary]`` tensor
ever exists. The head's weight is frozen: its gradient is never formed, and the gradient of the hidden
states falls out of each chunk while its logits are at hand, so that the backward pass is one product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adapter.model.attention import BlockView, KeyValue, PackedRow, SegmentView, View
from lit_adapter.model.llama import Llama
from lit_adapter.model.precision import widen

CHUNK_LOGITS = 2**25
"""Numbers in one chunk of logits: 128 MiB in fp32."""


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target_id: Tensor) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wants_gradient else None
        rows = max(1, CHUNK_LOGITS // weight.shape[0])
        total = widen(hidden).new_zeros(())
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            logits = F.linear(hidden[chunk], weight)
            loss, share = _sum_and_share(logits, target_id[chunk], wants_gradient)
            total += loss
            if gradient is not None:
                gradient[chunk] = share @ weight.to(share.dtype)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return (ctx.gradient * upstream).to(ctx.gradient.dtype), None, None


def _sum_and_share(logits: Tensor, target_id: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy, and in the logits' precision its gradient if that is wanted."""
    if logits.is_cuda and logits.dtype != torch.float64:
        from lit_adapter.model.kernels.loss import cross_entropy_

        return cross_entropy_(logits, target_id, gradient=wants_gradient).sum(), logits
    wide, target = widen(logits), target_id[:, None]
    log_total = wide.logsumexp(-1, keepdim=True)
    total = (log_total - wide.gather(-1, target)).sum()
    if not wants_gradient:
        return total, logits
    share = wide.sub_(log_total).exp_()
    share.scatter_add_(-1, target, share.new_full(target.shape, -1.0))
    return total, share.to(logits.dtype)


def target_loss(hidden: Tensor, weight: Tensor, target_id: Tensor) -> Tensor:
    """Return the summed cross-entropy (nats) of the targets.

    Args:
        hidden: normed hidden states at the target positions ``[M, C]``.
        weight: the frozen output head ``[V, C]``.
        target_id: the token to predict at each ``[M]``.

    Returns:
        A scalar, fp32 or wider. Whoever sums over micro-batches and ranks divides by the number of targets.
    """
    return _FrozenHeadLoss.apply(hidden, weight, target_id)


def row_loss(model: Llama, row: PackedRow, *, recompute: bool = False) -> Tensor:
    """Return the summed cross-entropy of a packed row's targets, a scalar in nats.

    Args:
        model: on any device.
        row: on the CPU, where what a view needs to know of it is planned.
        recompute: keep each block's input alone for the backward pass; the result is the same.
    """
    ids, position, target_index, target_id = row.inputs(model.embed_tokens.weight.device)
    view = _view(model, row, model.rotation(position[None]), recompute)
    hidden = model(ids[None], view, target_index)[0]
    return target_loss(hidden, model.lm_head.weight, target_id)


def _view(model: Llama, row: PackedRow, rotation: KeyValue, recompute: bool) -> View | BlockView:
    """Return the fastest way to compute the row on the model's device."""
    if rotation[0].is_cuda:
        from lit_adapter.model import fused  # needs Triton, which comes with CUDA builds of torch

        if fused.applies(model):
            return fused.FusedView(row, rotation, recompute=recompute)
    return SegmentView(row, rotation, recompute=recompute)
