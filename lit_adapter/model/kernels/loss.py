"""Cross-entropy of logits in their own precision: each is read twice and overwritten once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_adapter.model.kernels.entry import Entry

COLUMNS = 4096
"""Vocabulary entries that a program handles at a time."""


@Entry
@triton.jit(do_not_specialize_on_alignment=["target_at"])  # a slice of a row's targets
def _cross_entropy_kernel(logits_at, target_at, loss_at, V, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    logits_at += m * V
    target = tl.load(target_at + m)
    of_target = tl.load(logits_at + target).to(tl.float32)
    top = -float("inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(logits_at + c, mask=c < V, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top))
        top = new_top
    log_total = top + tl.log(total)
    tl.store(loss_at + m, log_total - of_target)
    if GRADIENT:
        for start in range(0, V, BLOCK):
            c = start + tl.arange(0, BLOCK)
            x = tl.load(logits_at + c, mask=c < V, other=-float("inf")).to(tl.float32)
            share = tl.exp(x - log_total) - (c == target).to(tl.float32)
            tl.store(logits_at + c, share.to(logits_at.dtype.element_ty), mask=c < V)


def cross_entropy_(logits: Tensor, target_id: Tensor, *, gradient: bool) -> Tensor:
    """Return the cross-entropy (nats, fp32 ``[M]``) of contiguous ``logits [M, V]`` and ``target_id [M]``.

    With ``gradient``, the logits are overwritten by the gradient of the sum.
    """
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _cross_entropy_kernel[(len(logits),)](
        logits, target_id, loss, logits.shape[1], GRADIENT=gradient, BLOCK=COLUMNS, num_warps=8
    )
    return loss
