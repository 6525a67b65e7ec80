"""The fused executor: a block of CUDA training, forward and backward, as matrix products and a few kernels.

Autograd would keep tensors that no gradient needs and read every tensor several times between the products.
Here a block is one node of the graph. For each token it keeps 6 C + 2 M numbers (its input, q, k, v, the
output of attention, the sum after attention, gate and up) and r of each of LoRA's updates, or its input alone
with ``recompute``. It forms no gradient of a frozen weight. The tests compare it with `Block.compute`.

Where processes share the heads and the MLP of a row, each computes its own part. The outputs of attention and
MLP are summed over the group, and in the backward pass their gradients: two sums each way, and with
``recompute`` that of attention's output once more. Any other gradient, also that of a trained parameter, is
this process's part of a sum over the group, as with `Block.total`.

Letters: T tokens of the row, C width, D head size; and of what this process computes, H query heads, G
key/value heads, M width of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_adapter.model.attention import KeyValue, PackedRow
from lit_adapter.model.fused_backward import (
    attention_backward,
    mlp_backward,
    output_backward,
    prefix_gradients,
)
from lit_adapter.model.fused_forward import attend, go_between
from lit_adapter.model.fused_site import Attended, Between, Site
from lit_adapter.model.kernels import rows
from lit_adapter.model.layout import block_layout
from lit_adapter.model.llama import Block, Llama
from lit_adapter.model.lora import JoinedLora, join_updates
from lit_adapter.model.prefix import GatedPrefix
from lit_adapter.model.rope import no_rotation
from lit_adapter.model.tiles import plan_tiles


class FusedView:
    """A packed row for blocks that are computed whole (`View`).

    Args:
        model: the model whose blocks run.
        row: on the CPU.
        rotation: cosines and sines of its positions.
        recompute: keep only each block's input for the backward pass, and compute the rest again there.
    """

    def __init__(self, model: Llama, row: PackedRow, rotation: KeyValue, *, recompute: bool = False) -> None:
        self.rotation, self.recompute = rotation, recompute
        self.no_rotation = no_rotation(rotation) if model.config.unrotated_layers else rotation
        self.layout = block_layout(model.config.shard(model.n_shards))
        self.is_part = model.n_shards > 1
        device = rotation[0].device
        windows = {block.self_attn.window for block in model.layers}
        self.all_queries = {window: plan_tiles(row, None, device, window) for window in windows}
        self.target_queries = {w: plan_tiles(row, row.target_index, device, w) for w in windows}
        self.strength = _strengths(model, device)
        self.updates = join_updates(model)
        self.seeds = _seeds(model, self.updates)

    def run(self, block: Block, x: Tensor, query_positions: Tensor | None) -> Tensor:
        """Compute a block for ``x [1, T, C]``, or for its ``query_positions``: the row's targets."""
        prefix, site = block.self_attn.prefix, Site(block, self, query_positions)
        learned = (None, None) if prefix is None else (prefix.prompt, prefix.gate)
        norms = (site.before.used_weight, site.between.used_weight)
        of_linears = [parameter for joined in site.trained.values() for parameter in joined.parameters]
        of_heads = site.head_norms.weights if site.head_norms else []
        return _FusedBlock.apply(x.squeeze(0), site, *learned, *norms, *of_heads, *of_linears).unsqueeze(0)


@torch.no_grad()
def _strengths(model: Llama, device: torch.device) -> dict[int, Tensor]:
    """Return c(g) of every layer with a prefix, in the form of `attention.Prefix`, by layer number."""
    adapted = [block.self_attn for block in model.layers if block.self_attn.prefix is not None]
    prefixes: dict[int, GatedPrefix] = {attention.index: attention.prefix for attention in adapted}
    if not prefixes:
        return {}
    some = next(iter(prefixes.values()))
    gates = torch.stack([prefix.gate for prefix in prefixes.values()])
    strength = some.form.strength(gates, some.axes).to(device)
    if some.form.per_token:
        strength = strength[..., 0]
    else:
        strength = strength[:, :, 0].expand(-1, model.config.n_head, model.config.head_dim)
    strength = strength.contiguous()
    return dict(zip(prefixes, strength.unbind(), strict=True))


def _seeds(model: Llama, updates: list[dict[str, JoinedLora]]) -> list[dict[str, int]]:
    """Draw each block's seeds of dropout, on the CPU: of its prefix and of its groups of updates."""
    prefixes = (block.self_attn.prefix for block in model.layers)
    drops = any(prefix is not None and prefix.dropout_now for prefix in prefixes)
    drops = drops or any(update.dropout for groups in updates for update in groups.values())
    names = ("prefix", *block_layout(model.config).groups)
    if not drops:
        return [dict.fromkeys(names, 0)] * len(updates)
    seeds = torch.randint(2**31, (len(updates), len(names))).tolist()
    return [dict(zip(names, of_block, strict=True)) for of_block in seeds]


class _FusedBlock(torch.autograd.Function):
    """A block. Autograd sees its input, its prompt and gate, its norms and what its linear layers train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, site: Site, *trained: Tensor | None) -> Tensor:
        attended = attend(site, x)
        learns, recompute = any(ctx.needs_input_grad), site.view.recompute
        between, y = go_between(site, x, attended, twice=learns and not recompute)
        if learns:
            ctx.site = site
            kept = () if recompute else (*vars(attended).values(), *vars(between).values())
            ctx.save_for_backward(x, *kept)
        site.add_down(rows.swiglu(between.gate_up, quantised=site.quantises("down")), y)
        if recompute:
            site.reduced.clear()
            site.outputs.clear()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, *kept), site = ctx.saved_tensors, ctx.site
        site.reload()
        attended = Attended(*kept[:-3]) if kept else attend(site, x)
        between = Between(*kept[-3:]) if kept else go_between(site, x, attended, twice=False)[0]
        of_heads: list[Tensor | None] = [None] * (2 if site.head_norms else 0)
        dmiddle, operand, dbetween = mlp_backward(site, between, dy.contiguous())
        del between
        do = output_backward(site, attended, dmiddle, operand)
        needs_x, _, _, _, needs_norms, *_ = ctx.needs_input_grad
        if needs_x or needs_norms or "qkv" in site.updates:
            dx, *dtrained, of_heads = attention_backward(site, x, attended, do, dmiddle)
        else:  # in the lowest block that learns
            dx, dtrained = None, [*prefix_gradients(site, attended, do), None]
        of_linears = [gradient for group in site.trained for gradient in site.learned.pop(group)]
        return dx, None, *dtrained, dbetween, *of_heads, *of_linears
