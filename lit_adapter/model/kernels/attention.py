"""Attention over a packed row with the gated prefix in the same pass, and their gradients.

Per query tile, with q already rotated and c the prefix's strength,

    o = softmax(q k^T / sqrt(D) where seen) v  +  softmax(q pk^T / sqrt(D)) (c * pv)

where c differs by channel or by prompt token. If unrotated queries attend to the prefix, q is rotated back
for the second term. The prefix branch is computed while the queries are in registers, so that it reads and
writes no tensor of the row's size. The backward pass recomputes the attention weights from the log-sum-exp
(arXiv 2205.14135) and the prefix's contribution to ``o`` from the prompt, so that only q, k, v, o are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lit_adapter.model.kernels.attention_forward import forward_kernel
from lit_adapter.model.kernels.attention_gradients import (
    key_gradient_kernel,
    query_gradient_kernel,
    sum_key_gradient_kernel,
    sum_prefix_gradient_kernel,
)
from lit_adapter.model.kernels.sizes import ceil_div, power_of_two
from lit_adapter.model.tiles import KEY_TILE, OWNED_KEYS, QUERY_TILE, VISITING_TILE, TilePlan

LOG2_E = 1.4426950408889634


@dataclass
class Prefix:
    """A layer's projected prompt and its strength."""

    kv: Tensor
    """Keys and values, joined, ``[K, 2 G D]``; rows may be strided."""
    strength: Tensor
    """c(g) for every channel, fp32 ``[H, D]``, or for every prompt token ``[H, K]``."""
    by_token: bool = False
    """Whether ``strength`` is that of prompt tokens."""
    unrotated: bool = False
    """Whether queries attend to the prompt as they were before they were rotated."""
    dropout: float = 0.0
    """The share of the attention weights that is dropped."""
    seed: int = 0
    """The seed that decides which weights are dropped, below 2**31."""


def _sizes(k: Tensor, D: int, H: int, queries: int = QUERY_TILE, keys: int = KEY_TILE) -> dict[str, Any]:
    return {"GROUP": H * D // k.shape[1], "D": D, "M": queries, "N": keys, "num_warps": 4}


@cache
def _registers(device: torch.device, prompt_rows: int) -> int | None:
    """Return how many registers a thread of the forward kernel may use; None leaves it to the compiler.

    With 168, a multiprocessor of a Hopper GPU runs three programs. On other GPUs, or with long prompts,
    spilled registers would cost more than that gains.
    """
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    return 168 if hopper and prompt_rows <= 16 else None


def _prompt_rows(prefix: Prefix | None) -> tuple[int, int]:
    """Return the prompt's length and the size of the tile that holds it; 0 and 0 without a prompt."""
    if prefix is None:
        return 0, 0
    K = prefix.kv.shape[0]
    return K, max(16, power_of_two(K))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor],
    plan: TilePlan,
    D: int,
    prefix: Prefix | None,
) -> tuple[Tensor, Tensor]:
    """Attend over a packed row by its ``plan``, and to the prompt of ``prefix`` if there is one.

    ``q [M, H * D]`` and ``k [T, G * D]`` are rotated, ``v`` has the layout of ``k``; rows may be strided.
    ``rotation`` is the cosines and sines of the row's positions, fp32 ``[T, D/2]``.

    Returns:
        ``o [M, H * D]`` and its log-sum-exp (base 2) ``[H, M]``, fp32.
    """
    H = q.shape[1] // D
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, q.shape[0], dtype=torch.float32, device=q.device)
    n_prompt, prompt_rows = _prompt_rows(prefix)
    some = prefix or Prefix(q, lse)
    forward_kernel[(ceil_div(q.shape[0], QUERY_TILE), H)](
        q, k, v, o, lse, *rotation, some.kv, some.strength,
        plan.place, plan.first, plan.preamble_start, plan.preamble_end, plan.key_from, plan.key_tile,
        plan.n_queries, plan.n_keys, q.stride(0), k.stride(0), o.stride(0), some.kv.stride(0), n_prompt,
        some.seed, D**-0.5 * LOG2_E,
        **_sizes(k, D, H), **_form(some, prompt_rows), num_stages=3,
        maxnreg=_registers(q.device, prompt_rows),
    )  # fmt: skip
    return o, lse


def _form(prefix: Prefix, prompt_rows: int) -> dict[str, Any]:
    form = {"ROWS": prompt_rows, "BY_TOKEN": prefix.by_token, "UNROTATED": prefix.unrotated}
    return form | {"DROPOUT": prefix.dropout}


@dataclass
class Gradients:
    """Where `attend_backward` writes the gradients of its inputs, rotated back; rows may be strided."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass
class PrefixGradients:
    """Where `attend_backward` writes the gradients of the prefix; rows may be strided."""

    kv: Tensor
    """For the projected prompt, ``[K, 2 G D]``."""
    q: Tensor | None
    """Query rows ``[K, H D]`` next to ``kv``, to be set to 0: prompts have no queries. None without them."""
    strength: Tensor
    """For c(g), fp32, as in `Prefix`."""


def attend_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor],
    o: Tensor,
    lse: Tensor,
    plan: TilePlan,
    D: int,
    prefix: Prefix | None,
    into: Gradients | None,
    into_prefix: PrefixGradients | None,
) -> None:
    """Compute the gradients of `attend` and of the rotation before it, from what `attend` took and returned.

    ``do``, the gradient of ``o``, is contiguous. ``into`` is None if the gradients of q, k and v are not
    needed; ``into_prefix`` is None without a prefix.
    """
    H, G, n_tiles = q.shape[1] // D, k.shape[1] // D, ceil_div(q.shape[0], QUERY_TILE)
    n_prompt, prompt_rows = _prompt_rows(prefix)
    delta = torch.empty_like(lse)
    dprompt = lse.new_empty(n_tiles, 2, H, prompt_rows, D)
    some = prefix or Prefix(q, lse)
    dstrength = lse.new_empty(n_tiles, H, prompt_rows if some.by_token else D)
    out = into or Gradients(do, do, do)
    scales = (D**-0.5 * LOG2_E, D**-0.5)
    sight = (plan.place, plan.first, plan.preamble_start, plan.preamble_end)
    sizes = _sizes(k, D, H)
    if some.unrotated and D > 64:  # two forms of the queries do not fit the registers of four warps
        sizes["num_warps"] = 8
    query_gradient_kernel[(n_tiles, H)](
        q, k, v, o, do, lse, delta, out.q, *rotation, some.kv, some.strength, dprompt, dstrength,
        *sight, plan.key_from, plan.key_tile,
        plan.n_queries, plan.n_keys, q.stride(0), k.stride(0), o.stride(0), out.q.stride(0),
        some.kv.stride(0), n_prompt, some.seed, *scales, **sizes, **_form(some, prompt_rows),
        ROW=into is not None, num_stages=2,
    )  # fmt: skip
    if into is not None:
        n_sums = plan.sum_tile.shape[0]
        sums = lse.new_empty(plan.n_slots, G, 2, OWNED_KEYS, D) if n_sums else lse
        key_gradient_kernel[(plan.n_parts, G)](
            q, k, v, do, lse, delta, into.k, into.v, sums, *rotation, *sight,
            plan.query_tile, plan.part_tile, plan.part_from, plan.part_slot,
            plan.n_queries, plan.n_keys, q.stride(0), k.stride(0), o.stride(0), into.k.stride(0),
            *scales, **_sizes(k, D, H, VISITING_TILE, OWNED_KEYS), num_stages=1,
        )  # fmt: skip
        sum_key_gradient_kernel[(n_sums, G)](
            sums, into.k, into.v, *rotation, plan.sum_tile, plan.sum_from,
            plan.n_keys, into.k.stride(0), D=D, N=OWNED_KEYS, num_warps=4,
        )  # fmt: skip
    if into_prefix is not None:
        kv, zeros = into_prefix.kv, into_prefix.q
        block = min(256, prompt_rows * D)
        sum_prefix_gradient_kernel[(prompt_rows * D // block, 2 * G + H)](
            dprompt, dstrength, kv, into_prefix.strength, kv if zeros is None else zeros,
            n_tiles, n_prompt, kv.stride(0), 0 if zeros is None else zeros.stride(0),
            GROUP=H // G, G=G, D=D, ROWS=prompt_rows, BLOCK=block, TILES=32, ZEROS=zeros is not None,
            BY_TOKEN=some.by_token,
        )  # fmt: skip
