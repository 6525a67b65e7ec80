"""Chooses the likeliest token of each text and prepares its next step, in one launch.

Tensors are contiguous and on one CUDA device.

Letters: B texts, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lit_adapter.model.kernels.decode_products import starts_early
from lit_adapter.model.kernels.entry import Entry

BLOCK = 4096
"""Logits that a program reads at a time."""


def advance(logits: Tensor, chosen: Tensor, token: Tensor, place: Tensor, last_place: Tensor) -> None:
    """Choose every text's next token and count it.

    Args:
        logits: ``[B, V]``.
        chosen: receives the likeliest tokens ``[B]``, the first of equals; -1 if logits are NaN or infinite.
        token: receives the same, but 0 for -1 ``[B]``.
        place: counters of the texts ``[2, B]``, rows may be strided; each is increased by one.
        last_place: their largest values ``[2, 1]``.
    """
    B, V = logits.shape
    early = starts_early(logits.device)
    _advance_kernel[(B,)](
        logits, chosen, token, place, last_place, place.stride(0), V,
        BLOCK=BLOCK, EARLY=early, num_warps=8, launch_pdl=early,
    )  # fmt: skip


@Entry
@triton.jit
def _advance_kernel(
    logits_ptr, chosen_ptr, token_ptr, place_ptr, last_ptr, place_stride, V,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns a text."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    text = tl.program_id(0)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.full((BLOCK,), 0, tl.int32) + V
    broken = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        index = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + text.to(tl.int64) * V + index, mask=index < V, other=float("-inf"))
        x = x.to(tl.float32)
        broken |= (x != x).to(tl.int32)
        where = tl.where(x > best, index, where)
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, where, V), 0).to(tl.int64)
    is_number = (tl.max(broken, 0) == 0) & (tl.abs(top) < float("inf"))
    tl.store(chosen_ptr + text, tl.where(is_number, token, -1))
    tl.store(token_ptr + text, tl.where(is_number, token, 0))
    for counter in tl.static_range(2):
        count = tl.load(place_ptr + counter * place_stride + text) + 1
        tl.store(place_ptr + counter * place_stride + text, tl.minimum(count, tl.load(last_ptr + counter)))
