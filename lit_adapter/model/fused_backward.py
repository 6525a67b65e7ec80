"""The backward pass of a fused block: the MLP, then attention. No gradient of a frozen weight is formed.

LoRA's gradients need inputs of products, which the forward pass did not keep. The kernel that computes the
gradient of an input also recomputes the input, and may store it in place of that gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_adapter.model.fused_site import Attended, Between, Site
from lit_adapter.model.kernels import attention, rows
from lit_adapter.model.lora import product


def mlp_backward(site: Site, between: Between, dy: Tensor) -> tuple[Tensor, rows.Operand, Tensor | None]:
    """Return the gradients of the sum after attention (also as an operand) and of a trained norm's weight.

    ``dy`` is that of the block's output.
    """
    weights, dtotal = site.weights, site.total(dy)
    if site.affine:
        y = site.outputs.pop("down", None)
        y = weights.down(weights.operand(rows.swiglu(between.gate_up))) if y is None else y
        site.learn_affine("down", (dtotal, y))
        del y
    dproduct = weights.down.backward(weights.operand(dtotal))
    dz = site.reach("down", dtotal, dproduct)
    hidden = dproduct if "down" in site.updates else None
    dgate_up = rows.swiglu_backward(dproduct, between.gate_up, hidden, quantised=site.quantises("gate_up"))
    site.learn("down", hidden, dtotal, dz)
    del dproduct, hidden, dtotal
    if site.affine:
        site.learn_affine("gate_up", (dgate_up, between.gate_up))
    dnormed = weights.gate_up.backward(weights.operand(dgate_up))
    dz = site.reach("gate_up", dgate_up, dnormed)
    normed = dnormed if "gate_up" in site.updates else None
    found = rows.norm_backward(
        dnormed,
        between.middle,
        site.between.used_weight,
        between.rstd,
        dy,
        normed,
        quantised=weights.quantised,
    )
    site.learn("gate_up", normed, dgate_up, dz)
    return found


def output_backward(site: Site, attended: Attended, dmiddle: Tensor, operand: rows.Operand) -> Tensor:
    """Return the gradient of attention's output, before the output projection.

    ``dmiddle`` is that of the sum after attention, and ``operand`` the same in the form that a product takes.
    """
    dtotal = site.total(dmiddle)
    if site.affine:
        site.learn_affine("o", (dtotal, site.outputs.pop("o")))
    do = site.weights.o.backward(operand if dtotal is dmiddle else site.weights.operand(dtotal))
    site.learn("o", attended.y, dtotal, site.reach("o", dtotal, do))
    return do


def _scores_backward(
    site: Site,
    attended: Attended,
    do: Tensor,
    into: attention.Gradients | None,
    below: tuple[Tensor, Tensor | None],
) -> Tensor | None:
    """Write the gradients of q, k and v to ``into``.

    Args:
        site: the block on its row.
        attended: what its forward pass computed.
        do: gradient of the attention's output.
        into: receives the gradients of q, k and v; None if they are not needed.
        below: receives the gradients of the prompt's keys and values, and its rows next to the queries.

    Returns:
        The gradient of the gate, or None where there is no prefix.
    """
    q, kv = site.turned(attended.q, attended.kv)
    T = len(attended.rstd)
    k, v = kv[:T].chunk(2, dim=1)
    given = (do, q, k, v, site.rotation, attended.y, attended.lse, site.plan, site.D)
    if site.adapter is None or site.strength is None:
        attention.attend_backward(*given, None, into, None)
        return None
    dstrength = torch.zeros_like(site.strength)  # of all heads
    dprefix = attention.PrefixGradients(*below, dstrength[site.adapter.heads])
    attention.attend_backward(*given, site.prefix(kv[T:]), into, dprefix)
    form, (H, _, D) = site.adapter.form, site.adapter.axes
    if form.per_token:
        return form.gradient(site.strength[..., None], dstrength[..., None])
    return form.gradient(site.strength[:H, None, :D], dstrength[:, None])


def prefix_gradients(site: Site, attended: Attended, do: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a block's prompt and gate alone."""
    if site.adapter is None:
        return None, None
    dkv = torch.empty_like(attended.prompt, memory_format=torch.contiguous_format)
    dgate = _scores_backward(site, attended, do, None, (dkv, None))
    if site.head_norms is not None:
        width = site.k_width
        site.head_norms.keys_backward_(dkv[:, :width], attended.prompt[:, :width])
    return site.kv.backward(site.weights.operand(dkv)).float(), dgate


def attention_backward(
    site: Site,
    x: Tensor,
    attended: Attended,
    do: Tensor,
    dmiddle: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """Return the gradients of the block's input, prompt, gate, and the weights of its trained norms.

    Those of the head norms come last; those of what linear layers train are in `Site.learned`.
    """
    weights, T, q_width = site.weights, x.shape[0], site.q_width
    n_rows = T + attended.prompt.shape[0]
    if site.query_positions is None:
        dqkv = x.new_empty(n_rows, q_width + 2 * site.k_width)
        dq, dkv, below = dqkv[:T, :q_width], dqkv[:, q_width:], dqkv[T:, :q_width]
    else:
        dq, dkv, below = torch.empty_like(attended.q), x.new_empty(n_rows, 2 * site.k_width), None
    dk, dv = dkv[:T].chunk(2, dim=1)
    into = attention.Gradients(dq, dk, dv)
    dgate = _scores_backward(site, attended, do, into, (dkv[T:], below))
    of_heads = [] if site.head_norms is None else site.head_norms.backward_(dq, dkv, attended.q, attended.kv)
    if site.affine:
        outputs = site.unturned(attended.q, attended.kv)
        site.learn_affine("qkv", *zip((dq, dkv), outputs, strict=True))
    if site.query_positions is None:
        dnormed, beside = weights.qkv.backward(weights.operand(dqkv)), dmiddle
        dz = site.reach("qkv", dqkv, dnormed)
    else:  # in fp32: many targets can share one position, in a preamble
        dnormed = site.kv.backward(weights.operand(dkv)).float()
        dnormed.index_add_(0, site.query_positions, site.q.backward(weights.operand(dq)).float())
        _learn_targets(site, x, (dq, dkv), dnormed)
        beside = dnormed.new_zeros(T, x.shape[1]).index_add_(0, site.query_positions, dmiddle.float())
    dprompt = None if dgate is None else dnormed[T:].to(torch.float32, copy=True)  # those rows are used again
    weight, updated = site.before.used_weight, "qkv" in site.updates and site.query_positions is None
    normed = dnormed[:T] if updated else None
    dx, _, dbefore = rows.norm_backward(dnormed[:T], x, weight, attended.rstd, beside, normed)
    if updated:
        if site.prompt is not None:
            dnormed[T:] = site.prompt
        site.learn("qkv", dnormed, dqkv, dz)
    return dx, dprompt, dgate, dbefore, of_heads


def _learn_targets(site: Site, x: Tensor, dy: tuple[Tensor, Tensor], dnormed: Tensor) -> None:
    """Do what `Site.learn` does for q, k and v where only the targets have queries.

    ``dy`` are the gradients of the targets' queries and of the keys and values; ``dnormed`` is fp32.
    """
    update, targets = site.updates.get("qkv"), site.query_positions
    if update is None or targets is None:
        return
    given: Any = rows.norm(x, site.before.used_weight, site.before.eps, site.prompt)[0]
    (dq, dkv), split = dy, site.q_width
    z = site.reduce("qkv", given)
    dz = (dkv @ update.b[split:]).float()
    dz = dz.index_add_(0, targets, (dq @ update.b[:split]).float()).to(z.dtype)
    dnormed.add_(site.dropped("qkv", dz @ update.a))
    dyz = torch.cat((product(dq.T, z[targets]), product(dkv.T, z)))
    site.learned["qkv"] = update.gradients(dz, dyz, site.dropped("qkv", given))
