"""The fused executor: a block of CUDA training, forward and backward, as matrix products and a few kernels.

Autograd would keep tensors that no gradient needs and read every tensor several times between the products.
Here a block is one node of the graph. For each token it keeps 6 C + 2 M numbers (its input, q, k, v, the
output of attention, the sum after attention, gate and up), or its input alone with ``recompute``. It forms no
gradient of a frozen weight. The tests compare it with `Block.compute`.

Letters: T tokens of the row, C width, H query heads, G key/value heads, D head size, M width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.model.attention import KeyValue, PackedRow
from lit_adapter.model.cuda_support import unsupported
from lit_adapter.model.executors import Setting
from lit_adapter.model.joining import join, joined
from lit_adapter.model.kernels import attention, rows
from lit_adapter.model.layout import BlockLayout, block_layout
from lit_adapter.model.llama import Block, Llama, RMSNorm
from lit_adapter.model.matrices import Float8Linear, Float8Matrix, Matrix, side_by_side
from lit_adapter.model.prefix import GatedPrefix
from lit_adapter.model.tiles import TilePlan, plan_tiles


def prepare(model: Llama, *, float8: bool = False) -> None:
    """Store a loaded model's matrices as these kernels read them, where they can compute the model.

    Args:
        model: on its device, adapter attached.
        float8: keep the matrices of the blocks in fp8.

    Raises:
        UserError: fp8 on a model or device that cannot have it.
    """
    why = unsupported(model, Setting.of(model))
    device = model.embed_tokens.weight.device
    if float8 and why is None and torch.cuda.get_device_capability(device) < (9, 0):
        why = f"{torch.cuda.get_device_name(device)} has no fp8 products (Hopper and later have)"
    if float8 and why is not None:
        raise UserError(f"trainer.base_precision is fp8, but {why}; use base_precision full")
    if why is not None:
        return
    layout = block_layout(model.config)
    if not float8:
        join_groups(model)
    for block in model.layers:  # one at a time: never a second copy of the whole model
        block.fused_weights = _keep_float8(block, layout) if float8 else _plain_weights(block, layout)


def join_groups(model: Llama) -> None:
    """Store matrices that read the same input side by side, where they are not yet."""
    for block in model.layers:
        for linears in _groups(block, block_layout(model.config)).values():
            join(*linears)


@dataclass
class BlockWeights:
    """The matrices of a block, one for each group of `layout`."""

    qkv: Matrix
    o: Matrix
    gate_up: Matrix
    down: Matrix

    @property
    def quantised(self) -> bool:
        """Whether the products take fp8."""
        return self.qkv.quantised

    def operand(self, x: Tensor) -> rows.Operand:
        """Return ``x`` as a product takes it."""
        return rows.quantise(x) if self.quantised else x


def block_weights(block: Block, layout: BlockLayout) -> BlockWeights:
    """Return a block's matrices; after `prepare` none of them is copied."""
    return block.fused_weights or _plain_weights(block, layout)


def float8_weights(block: Block, layout: BlockLayout) -> BlockWeights:
    """Return a block's matrices in fp8."""
    groups = _groups(block, layout)
    return BlockWeights(**{group: Float8Matrix.of(joined(*linears)) for group, linears in groups.items()})


def _plain_weights(block: Block, layout: BlockLayout) -> BlockWeights:
    groups = _groups(block, layout)
    return BlockWeights(**{group: side_by_side(*linears) for group, linears in groups.items()})


def _groups(block: Block, layout: BlockLayout) -> dict[str, list[Any]]:
    """Return the linear layers of each group."""
    return {group: [block.get_submodule(name) for name in names] for group, names in layout.groups.items()}


def _keep_float8(block: Block, layout: BlockLayout) -> BlockWeights:
    """Replace a block's matrices by fp8 ones, and return them."""
    weights = float8_weights(block, layout)
    for group, names in layout.groups.items():
        matrix, start = getattr(weights, group), 0
        for name in names:
            end = start + layout[name].n_out
            block.set_submodule(name, Float8Linear(matrix.outputs(start, end)))
            start = end
    return weights


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
        self.layout = block_layout(model.config)
        device = rotation[0].device
        self.all_queries = plan_tiles(row, None, device)
        self.target_queries = plan_tiles(row, row.target_index, device)
        self.strength = _strengths(model)

    def run(self, block: Block, x: Tensor, query_positions: Tensor | None) -> Tensor:
        """Compute a block for ``x [1, T, C]``, or for its ``query_positions``: the row's targets."""
        prefix = block.self_attn.prefix
        learned = (None, None) if prefix is None else (prefix.prompt, prefix.gate)
        site = _Site(block, self, query_positions)
        norms = (site.before.used_weight, site.between.used_weight)
        return _FusedBlock.apply(x.squeeze(0), *learned, *norms, site).unsqueeze(0)


@torch.no_grad()
def _strengths(model: Llama) -> dict[int, Tensor]:
    """Return c(g) of every layer that has a prefix, as `attention.Prefix` has it, by the layer's number."""
    found = [(block.self_attn.index, block.self_attn.prefix) for block in model.layers]
    prefixes: dict[int, GatedPrefix] = {index: prefix for index, prefix in found if prefix is not None}
    if not prefixes:
        return {}
    some = next(iter(prefixes.values()))
    gates = torch.stack([prefix.gate for prefix in prefixes.values()])
    strength = some.form.strength(gates, some.axes)
    if some.form.per_token:
        strength = strength[..., 0]
    else:
        strength = strength[:, :, 0].expand(-1, model.config.n_head, model.config.head_dim)
    strength = strength.contiguous()
    return dict(zip(prefixes, strength.unbind(), strict=True))


class _Site:
    """One block on one row: everything that its computation reads beside ``x``."""

    def __init__(self, block: Block, view: FusedView, query_positions: Tensor | None) -> None:
        attn: Any = block.self_attn
        self.block, self.view, self.query_positions = block, view, query_positions
        self.weights = block_weights(block, view.layout)
        self.is_gathered = block.fused_weights is None
        self.adapter: GatedPrefix | None = attn.prefix
        self.prompt = None if self.adapter is None else self.adapter.prompt
        self.strength = view.strength.get(attn.index)
        self.before: RMSNorm = block.input_layernorm
        self.between: RMSNorm = block.post_attention_layernorm
        self.D: int = attn.head_dim
        self.q_width = view.layout["self_attn.q_proj"].n_out
        self.k_width = view.layout["self_attn.k_proj"].n_out
        self.plan: TilePlan = view.all_queries if query_positions is None else view.target_queries
        cos, sin = view.rotation
        self.rotation: KeyValue = (cos[0], sin[0])

    def reload(self) -> None:
        """Take weights that FSDP2 gathered anew for the backward pass."""
        if self.is_gathered:
            self.weights = block_weights(self.block, self.view.layout)

    @property
    def q(self) -> Matrix:
        """The matrix of the queries."""
        return self.weights.qkv.outputs(0, self.q_width)

    @property
    def kv(self) -> Matrix:
        """The matrix of keys and values."""
        return self.weights.qkv.outputs(self.q_width)

    def prefix(self, kv: Tensor) -> attention.Prefix | None:
        """Return the prompt with its projection ``[K, 2 G D]``, or None where there is no prompt."""
        if self.adapter is None or self.strength is None:
            return None
        by_token, unrotated = self.adapter.form.per_token, self.adapter.unrotated
        return attention.Prefix(kv, self.strength, by_token, unrotated)


@dataclass
class _Attended:
    """What a block's backward pass needs of its attention."""

    rstd: Tensor
    """Reciprocal root mean square of the norm before attention, fp32 ``[T]``."""
    q: Tensor
    """Rotated ``[T, H D]``, or ``[M, H D]``."""
    kv: Tensor
    """Rotated keys and values, joined, ``[T, 2 G D]``."""
    y: Tensor
    """The output, in the same layout as ``q``."""
    lse: Tensor
    """The log-sum-exp of the scores, fp32 ``[H, T]`` or ``[H, M]``."""
    prompt: Tensor
    """The prompt's keys and values, joined, ``[K, 2 G D]``; no rows without a prompt."""


@dataclass
class _Between:
    """What a block's backward pass needs of its MLP."""

    middle: Tensor
    """The sum after attention ``[T, C]``, or ``[M, C]``."""
    rstd: Tensor
    """Reciprocal root mean square of the norm of ``middle``, fp32 ``[T]`` or ``[M]``."""
    gate_up: Tensor
    """Gate and up, joined, ``[T, 2 M]``."""


class _FusedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        prompt: Tensor | None,
        gate: Tensor | None,
        before: Tensor,
        between: Tensor,
        site: _Site,
    ) -> Tensor:
        attended = _attend(site, x)
        learns, recompute = any(ctx.needs_input_grad), site.view.recompute
        middle, y = _go_between(site, x, attended, twice=learns and not recompute)
        if learns:
            ctx.site = site
            kept = () if recompute else (*vars(attended).values(), *vars(middle).values())
            ctx.save_for_backward(x, *kept)
        site.weights.down.add_to(y, rows.swiglu(middle.gate_up, quantised=site.weights.quantised))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, *kept), site = ctx.saved_tensors, ctx.site
        site.reload()
        attended = _Attended(*kept[:-3]) if kept else _attend(site, x)
        between = _Between(*kept[-3:]) if kept else _go_between(site, x, attended, twice=False)[0]
        dmiddle, operand, dbetween = _mlp_backward(site, between, dy.contiguous())
        del between
        do = site.weights.o.backward(operand)
        needs_x, *_, needs_norms, _ = ctx.needs_input_grad
        if needs_x or needs_norms:
            return *_attention_backward(site, x, attended, do, dmiddle), dbetween, None
        # In the first adapted block, only the prefix needs a gradient.
        return None, *_prefix_gradients(site, attended, do), None, None, None


def _attend(site: _Site, x: Tensor) -> _Attended:
    """Compute a block up to attention's output; the tokens' matrix product also projects the prompt."""
    D, T, weights, (cos, sin) = site.D, x.shape[0], site.weights, site.rotation
    norm = site.before
    normed, rstd = rows.norm(x, norm.used_weight, norm.eps, site.prompt, quantised=weights.quantised)
    if site.query_positions is None:
        qkv = weights.qkv(normed)
        rows.rotate_(qkv[:T], cos, sin, (site.q_width + site.k_width) // D)
        q, kv = qkv[:T, : site.q_width], qkv[:, site.q_width :]
    else:
        q, kv = site.q(normed[site.query_positions]), site.kv(normed)
        rows.rotate_(q, cos[site.query_positions], sin[site.query_positions], site.q_width // D)
        rows.rotate_(kv[:T], cos, sin, site.k_width // D)
    k, v = kv[:T].chunk(2, dim=1)
    y, lse = attention.attend(q, k, v, site.rotation, site.plan, D, site.prefix(kv[T:]))
    return _Attended(rstd, q, kv[:T], y, lse, kv[T:])


def _go_between(site: _Site, x: Tensor, attended: _Attended, *, twice: bool) -> tuple[_Between, Tensor]:
    """Compute a block from attention's output to the input of SwiGLU.

    Returns:
        What the backward pass needs, and the sum after attention, to which the MLP's output will be added; a
        copy if ``twice``.
    """
    weights, norm = site.weights, site.between
    middle, twin, normed, rstd = rows.add_and_norm(
        x if site.query_positions is None else x[site.query_positions],
        weights.o(weights.operand(attended.y)),
        norm.used_weight,
        norm.eps,
        quantised=weights.quantised,
        twice=twice,
    )
    return _Between(middle, rstd, weights.gate_up(normed)), twin


def _mlp_backward(site: _Site, between: _Between, dy: Tensor) -> tuple[Tensor, rows.Operand, Tensor | None]:
    """Return the gradient of the sum after attention, also as an operand, and of a trained norm's weight.

    ``dy`` is the gradient of the block's output.
    """
    weights, quantised = site.weights, site.weights.quantised
    dproduct = weights.down.backward(weights.operand(dy))
    dgate_up = rows.swiglu_backward(dproduct, between.gate_up, quantised=quantised)
    del dproduct
    return rows.norm_backward(
        weights.gate_up.backward(dgate_up),
        between.middle,
        site.between.used_weight,
        between.rstd,
        dy,
        quantised=quantised,
    )


def _scores_backward(
    site: _Site,
    attended: _Attended,
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
    k, v = attended.kv.chunk(2, dim=1)
    given = (do, attended.q, k, v, site.rotation, attended.y, attended.lse, site.plan, site.D)
    if site.adapter is None or site.strength is None:
        attention.attend_backward(*given, None, into, None)
        return None
    dprefix = attention.PrefixGradients(*below, torch.empty_like(site.strength))
    attention.attend_backward(*given, site.prefix(attended.prompt), into, dprefix)
    form, (H, _, D) = site.adapter.form, site.adapter.axes
    if form.per_token:
        return form.gradient(site.strength[..., None], dprefix.strength[..., None])
    return form.gradient(site.strength[:H, None, :D], dprefix.strength[:, None])


def _prefix_gradients(site: _Site, attended: _Attended, do: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a block's prompt and gate alone."""
    dkv = torch.empty_like(attended.prompt, memory_format=torch.contiguous_format)
    dgate = _scores_backward(site, attended, do, None, (dkv, None))
    if dgate is None:
        return None, None
    return site.kv.backward(site.weights.operand(dkv)).float(), dgate


def _attention_backward(
    site: _Site, x: Tensor, attended: _Attended, do: Tensor, dmiddle: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of the block's input, prompt, gate, and the weight of its trained norm."""
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
    if site.query_positions is None:
        dnormed, beside = weights.qkv.backward(weights.operand(dqkv)), dmiddle
    else:  # in fp32: many targets can share one position, in a preamble
        dnormed = site.kv.backward(weights.operand(dkv)).float()
        dnormed.index_add_(0, site.query_positions, site.q.backward(weights.operand(dq)).float())
        beside = dnormed.new_zeros(T, x.shape[1]).index_add_(0, site.query_positions, dmiddle.float())
    dx, _, dbefore = rows.norm_backward(dnormed[:T], x, site.before.used_weight, attended.rstd, beside)
    return dx, None if dgate is None else dnormed[T:].float(), dgate, dbefore
