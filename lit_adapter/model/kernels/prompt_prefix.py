"""The gated prefixes of prompts in one row, a different one for each; `attention` adds one to a whole row.

Letters: T tokens of the row, M queries, H query heads, G key/value heads, D head size, K prompt length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_adapter.model.attention import moved
from lit_adapter.model.kernels.attention_forward import rotated_back
from lit_adapter.model.kernels.decode_attention import attend_prompt
from lit_adapter.model.kernels.entry import Entry
from lit_adapter.model.kernels.sizes import power_of_two
from lit_adapter.model.prefix import PrefixState

QUERIES = 64
"""Queries that a program handles."""


def plan(spans: Sequence[slice], slots: Sequence[int], device: torch.device) -> Tensor:
    """Return what each program of a head handles: its first query, the end of its queries, and their slot.

    Args:
        spans: of the queries of each text, one after another.
        slots: of the texts.
        device: of the result, int32 ``[3, programs]``.
    """
    tiles = [
        (first, min(first + QUERIES, span.stop), slot)
        for span, slot in zip(spans, slots, strict=True)
        for first in range(span.start, span.stop, QUERIES)
    ]
    return moved(torch.tensor(tiles, dtype=torch.int32).T.contiguous(), device)


def add(
    q: Tensor, place: Tensor, rotation: tuple[Tensor, Tensor], prefix: PrefixState, tiles: Tensor, y: Tensor
) -> None:
    """Add the prefix branch of each query's slot to its attention.

    Args:
        q: rotated queries ``[M, H * D]``; rows may be strided.
        place: of each query among the positions of ``rotation``, int32 ``[M]``.
        rotation: cosines and sines, fp32 ``[T, D/2]``.
        prefix: the layer's, a row for each slot, as `decode_attention.attend` takes it.
        tiles: as `plan` returns them.
        y: attention ``[M, H * D]``, to which the branch is added.
    """
    G, K, D = prefix.k.shape[1:]
    H, by_token = y.shape[1] // D, prefix.by_token
    unrotated = prefix.unrotated if isinstance(prefix.unrotated, Tensor) else None
    _add_kernel[tiles.shape[1], H](
        q, *rotation, place, tiles, prefix.k, prefix.v, prefix.strength, prefix.hidden,
        prefix.strength if by_token is None else by_token,
        tiles if unrotated is None else unrotated.view(torch.int8), y, q.stride(0), D**-0.5,
        GROUP=H // G, G=G, D=D, M=QUERIES, K=K, K_PADDED=max(16, power_of_two(K)),
        BY_TOKEN=by_token is not None, UNROTATED=unrotated is not None, num_warps=4,
    )  # fmt: skip


@Entry
@triton.jit(do_not_specialize_on_alignment=["place_ptr"])
def _add_kernel(
    q_ptr, cos_ptr, sin_ptr, place_ptr, tiles_ptr, pk_ptr, pv_ptr, strength_ptr, hidden_ptr, by_token_ptr,
    unrotated_ptr, y_ptr, q_stride, scale,
    GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    K_PADDED: tl.constexpr, BY_TOKEN: tl.constexpr, UNROTATED: tl.constexpr,
):  # fmt: skip
    """A program owns up to M queries of one text and head."""
    tile, n_tiles, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    row = tl.load(tiles_ptr + 2 * n_tiles + tile)
    n = (tl.load(tiles_ptr + tile) + tl.arange(0, M)).to(tl.int64)
    live = n < tl.load(tiles_ptr + n_tiles + tile)
    channel = (head * D + tl.arange(0, D))[None, :]
    q = tl.load(q_ptr + n[:, None] * q_stride + channel, mask=live[:, None], other=0.0)
    if UNROTATED:
        each = tl.zeros([M], tl.int32)  # Triton 3.9's interpreter cannot combine a mask with one boolean
        back = live & (tl.load(unrotated_ptr + row + each) != 0)
        i = tl.load(place_ptr + n, mask=live, other=0)
        q = rotated_back(q.to(tl.float32), cos_ptr, sin_ptr, i, back, D, M, True).to(q.dtype)
    place = (row * G + head // GROUP).to(tl.int64) * K * D
    factor_ptr = by_token_ptr + (row * G * GROUP + head) * K + tl.zeros([M], tl.int32)
    added = attend_prompt(
        q, pk_ptr + place, pv_ptr + place, hidden_ptr + row * K, factor_ptr, live, scale,
        D, K, K_PADDED, BY_TOKEN,
    )  # fmt: skip
    strength = tl.load(strength_ptr + row * G * GROUP * D + channel)
    at = y_ptr + n[:, None] * (G * GROUP * D) + channel
    y = tl.load(at, mask=live[:, None], other=0.0).to(tl.float32) + strength * added
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=live[:, None])
