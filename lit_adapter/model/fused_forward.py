"""The forward pass of a fused block: attention, then everything up to the MLP's last product."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_adapter.model.fused_site import Attended, Between, Site
from lit_adapter.model.kernels import attention, rows


def attend(site: Site, x: Tensor) -> Attended:
    """Compute a block up to attention's output; the tokens' matrix product also projects the prompt."""
    D, T = site.D, x.shape[0]
    norm = site.before
    quantised = site.quantises("qkv")
    normed, rstd = rows.norm(x, norm.used_weight, norm.eps, site.prompt, quantised=quantised)
    if site.query_positions is None:
        qkv = site.project("qkv", normed)
        q, kv = qkv[:T, : site.q_width], qkv[:, site.q_width :]
        if site.head_norms is None:
            rows.rotate_(qkv[:T], *site.rotation, (site.q_width + site.k_width) // D)
    else:
        operand = site.weights.operand(normed)
        q, kv = site.q(operand[site.query_positions]), site.kv(operand)
        _update_targets(site, normed, q, kv)
        if site.head_norms is None:
            rows.rotate_(q, *site.query_rotation, site.q_width // D)
            rows.rotate_(kv[:T], *site.rotation, site.k_width // D)
    turned_q, turned = site.turned(q, kv)
    k, v = turned[:T].chunk(2, dim=1)
    y, lse = attention.attend(turned_q, k, v, site.rotation, site.plan, D, site.prefix(turned[T:]))
    return Attended(rstd, q, kv, y, lse)


def _update_targets(site: Site, x: Any, q: Tensor, kv: Tensor) -> None:
    """Add LoRA's updates to the queries of the targets, and to the keys and values of all positions."""
    update = site.updates.get("qkv")
    if update is not None:
        z = site.reduce("qkv", x)
        update.add_to(q, z[site.query_positions], slice(site.q_width))
        update.add_to(kv, z, slice(site.q_width, None))


def go_between(site: Site, x: Tensor, attended: Attended, *, twice: bool) -> tuple[Between, Tensor]:
    """Compute a block from attention's output to the input of SwiGLU.

    Returns:
        What the backward pass needs, and the sum after attention, to which the MLP's output will be added; a
        copy if ``twice``.
    """
    norm, attention_output = site.between, site.project_total("o", attended.y)
    middle, twin, normed, rstd = rows.add_and_norm(
        x if site.query_positions is None else x[site.query_positions],
        attention_output,
        norm.used_weight,
        norm.eps,
        quantised=site.quantises("gate_up"),
        twice=twice,
    )
    return Between(middle, rstd, site.project("gate_up", normed)), twin
