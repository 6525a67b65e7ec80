"""Cross-entropy at the target positions, in chunks, through a frozen output layer.

Only positions with a target reach the output layer, a chunk at a time, so that no ``[tokens, vocabulary]``
tensor ever exists. Its weight is frozen, so its gradient is never formed. The gradient of the hidden states
is computed from each chunk while its logits exist, so that the backward pass is one product; so are the
gradients of the bias and scale that V2 may train on the output layer, ``s * (W h + b)``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adapter.model.affine import AdaptedLinear
from lit_adapter.model.attention import PackedRow, SegmentView, View
from lit_adapter.model.executors import Executor, choose, kernels_given_up
from lit_adapter.model.llama import Llama
from lit_adapter.model.precision import widen

CHUNK_LOGITS = 2**25
"""Numbers in one chunk of logits: 128 MiB in fp32."""
CPU_COLUMNS = 1024
"""Logits of a target that are computed together on a CPU where no gradient is wanted; they fit its caches."""
FEWEST_ROWS = 16
"""Targets whose softmax is taken together on a CPU with fewer threads; their logits fit its caches."""


class _FrozenOutputLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target_id: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if any(ctx.needs_input_grad) else None
        affine = [torch.zeros_like(x) for x in (bias, scale) if x is not None]
        rows = max(1, CHUNK_LOGITS // weight.shape[0])
        total = widen(hidden).new_zeros(())
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            narrow = F.linear(hidden[chunk], weight)
            logits = narrow if bias is None or scale is None else (narrow + bias) * scale
            total += _cross_entropy_(logits, target_id[chunk], gradient=gradient is not None)
            if gradient is None:
                continue
            share = logits
            if bias is not None and scale is not None:
                affine[1] += (share * (narrow + bias)).sum(0)
                share = share * scale
                affine[0] += share.sum(0)
            gradient[chunk] = share.to(narrow.dtype) @ weight.to(narrow.dtype)
            del narrow, logits, share  # before the next chunk's are made
        ctx.gradients = (gradient, *(affine or (None, None)))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, bias, scale = (g if g is None else (g * upstream).to(g.dtype) for g in ctx.gradients)
        return hidden, None, None, bias, scale


def _cross_entropy_(logits: Tensor, target_id: Tensor, *, gradient: bool) -> Tensor:
    """Return the summed cross-entropy; with ``gradient``, that of the logits overwrites them."""
    if logits.is_cuda and logits.dtype != torch.float64 and kernels_given_up() is None:
        from lit_adapter.model.kernels.loss import cross_entropy_

        return cross_entropy_(logits, target_id, gradient=gradient).sum()
    total, n_rows = widen(logits[:0]).sum(), rows_at_once()
    for start in range(0, len(logits), n_rows):
        rows = slice(start, start + n_rows)
        target = target_id[rows, None]
        share = widen(logits[rows]).log_softmax(-1)  # logsumexp would write out twice as much
        total -= share.gather(-1, target).sum()
        if gradient:
            logits[rows] = share.exp_().scatter_add_(-1, target, share.new_full(target.shape, -1.0))
    return total


def rows_at_once() -> int:
    """Return how many targets' softmax is taken together on a CPU: at least one for each thread."""
    return max(FEWEST_ROWS, torch.get_num_threads())


def target_loss(
    hidden: Tensor, weight: Tensor, target_id: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """Return the summed cross-entropy (nats) of the targets.

    Args:
        hidden: normed hidden states at the target positions ``[M, C]``.
        weight: the weight of the frozen output layer ``[V, C]``.
        target_id: the token to predict at each ``[M]``.
        bias: V2's bias on the output layer ``[V]``, added before the scale.
        scale: V2's scale on it ``[V]``, given with the bias.

    Returns:
        A scalar, fp32 or wider. The caller, who sums over micro-batches and ranks, divides by the targets.
    """
    return _FrozenOutputLoss.apply(hidden, weight, target_id, bias, scale)


def row_loss(
    model: Llama, row: PackedRow, *, recompute: bool = False, executor: Executor | None = None
) -> Tensor:
    """Return the summed cross-entropy of a packed row's targets, a scalar in nats.

    Args:
        model: on any device.
        row: on the CPU, where its attention is planned.
        recompute: keep only each block's input for the backward pass; the result is the same.
        executor: as `choose` returned it for training this model; None to choose now.
    """
    hidden, target_id = _target_hidden(model, row, recompute, executor)
    return target_loss(hidden, model.lm_head.weight, target_id, *_affine(model))


def _affine(model: Llama) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return V2's bias and scale on the output layer ``[V]``, if it has them."""
    output = model.lm_head
    return (output.adapter_bias, output.adapter_scale) if isinstance(output, AdaptedLinear) else (None, None)


@torch.inference_mode()
def target_log_likelihoods(model: Llama, row: PackedRow) -> tuple[Tensor, Tensor]:
    """Return the log-likelihood (nats) of each target of a packed row, and the likeliest token there.

    Args:
        model: on any device.
        row: on the CPU, where its attention is planned.

    Returns:
        Both ``[M]`` on the CPU, in fp64 and as ids, in the order of the row's targets.
    """
    hidden, target_id = _target_hidden(model, row)
    V = model.config.vocab_size
    n_rows, n_columns = (
        (CHUNK_LOGITS // V, V) if hidden.is_cuda else (CHUNK_LOGITS // CPU_COLUMNS, CPU_COLUMNS)
    )
    parts = zip(hidden.split(max(1, n_rows)), target_id.split(max(1, n_rows)), strict=True)
    scores, likeliest = zip(*(_scored(model, *part, n_columns) for part in parts), strict=True)
    return torch.cat(scores).double().cpu(), torch.cat(likeliest).cpu()


def _scored(model: Llama, hidden: Tensor, target_id: Tensor, n_columns: int) -> tuple[Tensor, Tensor]:
    """Return log-likelihoods and likeliest tokens of targets ``[M]``, a block of the vocabulary at a time."""
    weight, (bias, scale) = model.lm_head.weight, _affine(model)
    chosen = widen(hidden).new_empty(len(hidden))
    highest, where, excess = [], [], []  # of each block; the excess is its logsumexp less its maximum
    for start in range(0, len(weight), n_columns):
        block = slice(start, start + n_columns)
        logits = F.linear(hidden, weight[block])
        if bias is not None and scale is not None:
            logits = (logits + bias[block]) * scale[block]
        logits = widen(logits)
        here = (target_id >= start) & (target_id < start + n_columns)
        chosen[here] = logits[here, target_id[here] - start]
        top = logits.max(-1)
        highest.append(top.values)
        where.append(top.indices + start)
        # Much faster than logsumexp, which writes the exponentials out.
        excess.append(-logits.log_softmax(-1).gather(-1, top.indices[:, None])[:, 0])
    maximum, best = torch.stack(highest).max(0)
    whole_excess = (torch.stack(highest) - maximum + torch.stack(excess)).logsumexp(0)
    return chosen - maximum - whole_excess, torch.stack(where).gather(0, best[None])[0]


def _target_hidden(
    model: Llama, row: PackedRow, recompute: bool = False, executor: Executor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the normed hidden states ``[M, C]`` at a row's targets, and the targets' ids ``[M]``."""
    executor = choose(model, "training") if executor is None else executor
    ids, position, target_index, target_id = row.inputs(model.embed_tokens.weight.device)
    rotation = model.rotation(position[None])
    view: View
    if executor.name == "fused":
        from lit_adapter.model.fused import FusedView

        view = FusedView(model, row, rotation, recompute=recompute)
    else:
        view = SegmentView(row, rotation, recompute=recompute)
    return model(ids[None], view, target_index).squeeze(0), target_id
