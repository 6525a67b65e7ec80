"""The fused executor: a block of CUDA training, forward and backward, as matrix products and a few kernels.

Autograd would keep tensors that no gradient needs and read every tensor several times between the products.
Here a block is one node of the graph. For each token it keeps 6 C + 2 M numbers (its input, q, k, v, the
output of attention, the sum after attention, gate and up), or its input alone with ``recompute``. It forms no
gradient of a frozen weight. The tests compare it with `Block.compute`.

Letters: T tokens of the row, C width, H query heads, G key/value heads, D head size, M width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.model.attention import KeyValue, PackedRow
from lit_adapter.model.cuda_support import unsupported
from lit_adapter.model.executors import Setting
from lit_adapter.model.fused_heads import HeadNorms, unturned
from lit_adapter.model.joining import join, joined, joined_biases
from lit_adapter.model.kernels import attention, rows
from lit_adapter.model.layout import BlockLayout, block_layout
from lit_adapter.model.llama import Block, Llama, RMSNorm
from lit_adapter.model.lora import JoinedLora, LoraLinear, join_updates, product
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
    if float8 and why is None and any(isinstance(module, LoraLinear) for module in model.modules()):
        why = "the updates of LoRA take inputs in the base's precision"
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
    found = {group: (joined(*linears), joined_biases(*linears)) for group, linears in groups.items()}
    return BlockWeights(**{group: Float8Matrix.of(*given) for group, given in found.items()})


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
        self.unturned = unturned(rotation) if model.config.unrotated_layers else rotation
        self.layout = block_layout(model.config)
        device = rotation[0].device
        windows = {block.self_attn.window for block in model.layers}
        self.all_queries = {window: plan_tiles(row, None, device, window) for window in windows}
        self.target_queries = {w: plan_tiles(row, row.target_index, device, w) for w in windows}
        self.strength = _strengths(model)
        self.updates = join_updates(model, model.embed_tokens.weight.dtype)

    def run(self, block: Block, x: Tensor, query_positions: Tensor | None) -> Tensor:
        """Compute a block for ``x [1, T, C]``, or for its ``query_positions``: the row's targets."""
        prefix, site = block.self_attn.prefix, _Site(block, self, query_positions)
        learned = (None, None) if prefix is None else (prefix.prompt, prefix.gate)
        norms = (site.before.used_weight, site.between.used_weight)
        updates = [parameter for update in site.updates.values() for parameter in update.parameters]
        of_heads = site.head_norms.weights if site.head_norms else []
        return _FusedBlock.apply(x.squeeze(0), site, *learned, *norms, *of_heads, *updates).unsqueeze(0)


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
        self.updates: dict[str, JoinedLora] = view.updates[attn.index]
        self.head_norms = HeadNorms.of(attn)
        self.before: RMSNorm = block.input_layernorm
        self.between: RMSNorm = block.post_attention_layernorm
        self.D: int = attn.head_dim
        self.q_width = view.layout["self_attn.q_proj"].n_out
        self.k_width = view.layout["self_attn.k_proj"].n_out
        plans = view.all_queries if query_positions is None else view.target_queries
        self.plan: TilePlan = plans[attn.window]
        cos, sin = view.rotation if attn.is_rotated else view.unturned
        self.rotation: KeyValue = (cos[0], sin[0])

    @property
    def query_rotation(self) -> KeyValue:
        """Cosines and sines of the queries."""
        cos, sin = self.rotation
        return (
            self.rotation
            if self.query_positions is None
            else (
                cos[self.query_positions],
                sin[self.query_positions],
            )
        )

    def turned(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys as attention takes them, from what a block keeps of them."""
        if self.head_norms is None:  # they were rotated in place
            return q, kv
        return self.head_norms.turned(q, kv, self.query_rotation, self.rotation)

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

    def add_updates(self, group: str, x: Any, y: Tensor) -> None:
        """Add LoRA's updates of a group to its product ``y`` of ``x``, which is not in fp8 then."""
        update = self.updates.get(group)
        if update is not None:
            update.add_to(y, update.reduce(x))

    def learn(
        self, group: str, x: Callable[[], Any], dy: Any, dx: Tensor, learned: dict[str, list[Tensor]]
    ) -> None:
        """Add to ``dx`` what reaches a group's input through its updates, and note their gradients.

        Args:
            group: of `layout`.
            x: computes the group's input again.
            dy: the gradient of its product.
            dx: the gradient of its input, without the updates.
            learned: receives the gradients by group.
        """
        update = self.updates.get(group)
        if update is None:
            return
        given = x()
        dz = dy @ update.b
        dx.addmm_(dz, update.a)
        learned[group] = update.gradients(dz, product(dy.T, update.reduce(given)), given)


@dataclass
class _Attended:
    """What a block's backward pass needs of its attention."""

    rstd: Tensor
    """Reciprocal root mean square of the norm before attention, fp32 ``[T]``."""
    q: Tensor
    """Rotated ``[T, H D]``, or ``[M, H D]``; as the product gave it if the model has norms of heads."""
    kv: Tensor
    """Keys and values of the row and of the prompt, joined, ``[T + K, 2 G D]``; keys as ``q``."""
    y: Tensor
    """The output, in the same layout as ``q``."""
    lse: Tensor
    """The log-sum-exp of the scores, fp32 ``[H, T]`` or ``[H, M]``."""

    @property
    def prompt(self) -> Tensor:
        """The prompt's keys and values ``[K, 2 G D]``; no rows without a prompt."""
        return self.kv[len(self.rstd) :]


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
    """A block. Autograd sees its input, its prompt and gate, its norms and the parameters of its updates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, site: _Site, *trained: Tensor | None) -> Tensor:
        attended = _attend(site, x)
        learns, recompute = any(ctx.needs_input_grad), site.view.recompute
        between, y = _go_between(site, x, attended, twice=learns and not recompute)
        if learns:
            ctx.site = site
            kept = () if recompute else (*vars(attended).values(), *vars(between).values())
            ctx.save_for_backward(x, *kept)
        product_of_mlp = rows.swiglu(between.gate_up, quantised=site.weights.quantised)
        site.weights.down.add_to(y, product_of_mlp)
        site.add_updates("down", product_of_mlp, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, *kept), site = ctx.saved_tensors, ctx.site
        site.reload()
        attended = _Attended(*kept[:-3]) if kept else _attend(site, x)
        between = _Between(*kept[-3:]) if kept else _go_between(site, x, attended, twice=False)[0]
        learned: dict[str, list[Tensor]] = {}
        of_heads: list[Tensor | None] = [None] * (2 if site.head_norms else 0)
        dmiddle, operand, dbetween = _mlp_backward(site, between, dy.contiguous(), learned)
        del between
        do = site.weights.o.backward(operand)
        site.learn("o", lambda: attended.y, dmiddle, do, learned)
        needs_x, _, _, _, needs_norms, *_ = ctx.needs_input_grad
        if needs_x or needs_norms or "qkv" in site.updates:
            dx, *dtrained, of_heads = _attention_backward(site, x, attended, do, dmiddle, learned)
        else:  # in the lowest block that learns
            dx, dtrained = None, [*_prefix_gradients(site, attended, do), None]
        dupdates = [gradient for group in site.updates for gradient in learned[group]]
        return dx, None, *dtrained, dbetween, *of_heads, *dupdates


def _attend(site: _Site, x: Tensor) -> _Attended:
    """Compute a block up to attention's output; the tokens' matrix product also projects the prompt."""
    D, T, weights = site.D, x.shape[0], site.weights
    norm = site.before
    normed, rstd = rows.norm(x, norm.used_weight, norm.eps, site.prompt, quantised=weights.quantised)
    if site.query_positions is None:
        qkv = weights.qkv(normed)
        site.add_updates("qkv", normed, qkv)
        q, kv = qkv[:T, : site.q_width], qkv[:, site.q_width :]
        if site.head_norms is None:
            rows.rotate_(qkv[:T], *site.rotation, (site.q_width + site.k_width) // D)
    else:
        q, kv = site.q(normed[site.query_positions]), site.kv(normed)
        _update_targets(site, normed, q, kv)
        if site.head_norms is None:
            rows.rotate_(q, *site.query_rotation, site.q_width // D)
            rows.rotate_(kv[:T], *site.rotation, site.k_width // D)
    turned_q, turned = site.turned(q, kv)
    k, v = turned[:T].chunk(2, dim=1)
    y, lse = attention.attend(turned_q, k, v, site.rotation, site.plan, D, site.prefix(turned[T:]))
    return _Attended(rstd, q, kv, y, lse)


def _norm_before(site: _Site, x: Tensor) -> rows.Operand:
    """Return the input of q, k and v, which is not kept: normed tokens, then the prompt."""
    return rows.norm(x, site.before.used_weight, site.before.eps, site.prompt)[0]


def _norm_between(site: _Site, middle: Tensor) -> rows.Operand:
    """Return the input of gate and up, which is not kept."""
    return rows.norm(middle, site.between.used_weight, site.between.eps, None)[0]


def _swiglu(between: _Between) -> rows.Operand:
    """Return the input of the last product of the MLP, which is not kept."""
    return rows.swiglu(between.gate_up)


def _update_targets(site: _Site, x: Any, q: Tensor, kv: Tensor) -> None:
    """Add LoRA's updates to the queries of the targets, and to the keys and values of all positions."""
    update = site.updates.get("qkv")
    if update is not None:
        z = update.reduce(x)
        update.add_to(q, z[site.query_positions], slice(site.q_width))
        update.add_to(kv, z, slice(site.q_width, None))


def _go_between(site: _Site, x: Tensor, attended: _Attended, *, twice: bool) -> tuple[_Between, Tensor]:
    """Compute a block from attention's output to the input of SwiGLU.

    Returns:
        What the backward pass needs, and the sum after attention, to which the MLP's output will be added; a
        copy if ``twice``.
    """
    weights, norm = site.weights, site.between
    attention_output = weights.o(weights.operand(attended.y))
    site.add_updates("o", attended.y, attention_output)
    middle, twin, normed, rstd = rows.add_and_norm(
        x if site.query_positions is None else x[site.query_positions],
        attention_output,
        norm.used_weight,
        norm.eps,
        quantised=weights.quantised,
        twice=twice,
    )
    gate_up = weights.gate_up(normed)
    site.add_updates("gate_up", normed, gate_up)
    return _Between(middle, rstd, gate_up), twin


def _mlp_backward(
    site: _Site, between: _Between, dy: Tensor, learned: dict[str, list[Tensor]]
) -> tuple[Tensor, rows.Operand, Tensor | None]:
    """Return the gradient of the sum after attention, also as an operand, and of a trained norm's weight.

    ``dy`` is that of the block's output; ``learned`` receives the gradients of LoRA's parameters.
    """
    weights, quantised = site.weights, site.weights.quantised
    dproduct = weights.down.backward(weights.operand(dy))
    site.learn("down", lambda: _swiglu(between), dy, dproduct, learned)
    dgate_up = rows.swiglu_backward(dproduct, between.gate_up, quantised=quantised)
    del dproduct
    dnormed = weights.gate_up.backward(dgate_up)
    site.learn("gate_up", lambda: _norm_between(site, between.middle), dgate_up, dnormed, learned)
    return rows.norm_backward(
        dnormed,
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
    q, kv = site.turned(attended.q, attended.kv)
    T = len(attended.rstd)
    k, v = kv[:T].chunk(2, dim=1)
    given = (do, q, k, v, site.rotation, attended.y, attended.lse, site.plan, site.D)
    if site.adapter is None or site.strength is None:
        attention.attend_backward(*given, None, into, None)
        return None
    dprefix = attention.PrefixGradients(*below, torch.empty_like(site.strength))
    attention.attend_backward(*given, site.prefix(kv[T:]), into, dprefix)
    form, (H, _, D) = site.adapter.form, site.adapter.axes
    if form.per_token:
        return form.gradient(site.strength[..., None], dprefix.strength[..., None])
    return form.gradient(site.strength[:H, None, :D], dprefix.strength[:, None])


def _prefix_gradients(site: _Site, attended: _Attended, do: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a block's prompt and gate alone."""
    if site.adapter is None:
        return None, None
    dkv = torch.empty_like(attended.prompt, memory_format=torch.contiguous_format)
    dgate = _scores_backward(site, attended, do, None, (dkv, None))
    if dgate is None:
        return None, None
    if site.head_norms is not None:
        width = site.k_width
        site.head_norms.keys_backward_(dkv[:, :width], attended.prompt[:, :width])
    return site.kv.backward(site.weights.operand(dkv)).float(), dgate


def _attention_backward(
    site: _Site,
    x: Tensor,
    attended: _Attended,
    do: Tensor,
    dmiddle: Tensor,
    learned: dict[str, list[Tensor]],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """Return the gradients of the block's input, prompt, gate, and the weights of its trained norms.

    Those of the norms of heads come last. ``learned`` receives the gradients of LoRA's parameters.
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
    if site.query_positions is None:
        dnormed, beside = weights.qkv.backward(weights.operand(dqkv)), dmiddle
        site.learn("qkv", lambda: _norm_before(site, x), dqkv, dnormed, learned)
    else:  # in fp32: many targets can share one position, in a preamble
        dnormed = site.kv.backward(weights.operand(dkv)).float()
        dnormed.index_add_(0, site.query_positions, site.q.backward(weights.operand(dq)).float())
        _learn_targets(site, x, (dq, dkv), dnormed, learned)
        beside = dnormed.new_zeros(T, x.shape[1]).index_add_(0, site.query_positions, dmiddle.float())
    dx, _, dbefore = rows.norm_backward(dnormed[:T], x, site.before.used_weight, attended.rstd, beside)
    return dx, None if dgate is None else dnormed[T:].float(), dgate, dbefore, of_heads


def _learn_targets(
    site: _Site,
    x: Tensor,
    dy: tuple[Tensor, Tensor],
    dnormed: Tensor,
    learned: dict[str, list[Tensor]],
) -> None:
    """Do what `_Site.learn` does for q, k and v where only the targets have queries.

    ``dy`` are the gradients of the targets' queries and of the keys and values; ``dnormed`` is fp32.
    """
    update, targets = site.updates.get("qkv"), site.query_positions
    if update is None or targets is None:
        return
    given: Any = _norm_before(site, x)
    (dq, dkv), split = dy, site.q_width
    z = update.reduce(given)
    dz = (dkv @ update.b[split:]).float()
    dz = dz.index_add_(0, targets, (dq @ update.b[:split]).float()).to(z.dtype)
    dnormed.add_(dz @ update.a)
    dyz = torch.cat((product(dq.T, z[targets]), product(dkv.T, z)))
    learned["qkv"] = update.gradients(dz, dyz, given)
