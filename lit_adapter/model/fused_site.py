"""One block on one row, for the fused executor: what it reads, and what its backward pass needs.

Letters: T tokens of the row, C width, H query heads, G key/value heads, D head size; M width of the MLP, or
targets of the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_adapter.model.affine import join_affine
from lit_adapter.model.attention import KeyValue
from lit_adapter.model.block_weights import BlockWeights, block_weights
from lit_adapter.model.fused_heads import HeadNorms
from lit_adapter.model.kernels import attention, rows
from lit_adapter.model.llama import Block
from lit_adapter.model.lora import product
from lit_adapter.model.matrices import Matrix

if TYPE_CHECKING:
    from lit_adapter.model.fused import FusedView


class Site:
    """One block on one row: everything that its computation reads beside ``x``."""

    def __init__(self, block: Block, view: FusedView, query_positions: Tensor | None) -> None:
        attn = block.self_attn
        self.block, self.view, self.query_positions = block, view, query_positions
        self.affine = join_affine(block, view.layout)
        self.outputs: dict[str, Tensor] = {}  # of o and down, where biases and scales are trained
        self.learned: dict[str, list[Tensor]] = {}  # gradients of `trained`, in the backward pass
        self.weights = self._weights()
        self.is_gathered = block.fused_weights is None
        self.adapter = attn.prefix
        self.prompt = None if self.adapter is None else self.adapter.prompt.to(view.rotation[0].device)
        self.strength = view.strength.get(attn.index)  # of all heads
        self.updates = view.updates[attn.index]
        self.reduced: dict[str, Tensor] = {}  # ``x a^T`` of each of them: narrow, so it is kept
        self.seeds = view.seeds[attn.index]
        self.head_norms = HeadNorms.of(attn)
        self.before, self.between = block.input_layernorm, block.post_attention_layernorm
        self.D = attn.head_dim
        self.q_width = view.layout["self_attn.q_proj"].n_out
        self.k_width = view.layout["self_attn.k_proj"].n_out
        plans = view.all_queries if query_positions is None else view.target_queries
        self.plan = plans[attn.window]
        cos, sin = view.rotation if attn.is_rotated else view.no_rotation
        self.rotation = cos[0], sin[0]

    @property
    def query_rotation(self) -> KeyValue:
        """Cosines and sines of the queries."""
        if self.query_positions is None:
            return self.rotation
        cos, sin = self.rotation
        return cos[self.query_positions], sin[self.query_positions]

    def turned(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys in the form that attention takes, from what a block keeps of them."""
        if self.head_norms is None:  # they were rotated in place
            return q, kv
        return self.head_norms.turned(q, kv, self.query_rotation, self.rotation)

    def unturned(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries, keys and values as the product gave them, from what a block keeps of them.

        Rotated, a channel is rounded together with the one that it is rotated with. So if a V2 scale is 0.1
        of that channel's, its gradient is 1 % off in bf16, and 8 % off at 0.01 (random queries, 512 tokens).
        """
        if self.head_norms is not None:
            return q, kv
        q, kv = q.clone(), kv.clone()
        keys = kv[: len(self.rotation[0])]
        for x, (cos, sin), width in (
            (q, self.query_rotation, self.q_width),
            (keys, self.rotation, self.k_width),
        ):
            square = cos.square() + sin.square()  # yarn's rotation lengthens
            rows.rotate_(x, cos / square, -sin / square, width // self.D)
        return q, kv

    def reload(self) -> None:
        """Take the weights that FSDP2 has gathered again for the backward pass."""
        if self.is_gathered:
            self.weights = self._weights()

    def _weights(self) -> BlockWeights:
        return block_weights(self.block, self.view.layout).adapted(self.affine)

    @property
    def q(self) -> Matrix:
        """The matrix of the queries."""
        return self.weights.qkv.outputs(slice(self.q_width))

    @property
    def kv(self) -> Matrix:
        """The matrix of keys and values."""
        return self.weights.qkv.outputs(slice(self.q_width, None))

    def prefix(self, kv: Tensor) -> attention.Prefix | None:
        """Return the prompt with its projection ``[K, 2 G D]``, or None where there is no prompt."""
        if self.adapter is None or self.strength is None:
            return None
        adapter, seed = self.adapter, self.seeds["prefix"]
        form = (adapter.form.per_token, adapter.unrotated)
        return attention.Prefix(kv, self.strength[adapter.heads], *form, adapter.dropout_now, seed)

    def quantises(self, group: str) -> bool:
        """Whether a kernel writes a group's input in fp8; LoRA's updates need it in the base's precision."""
        return self.weights.quantised and group not in self.updates

    @property
    def trained(self) -> dict[str, Any]:
        """What is trained of the linear layers, by group: LoRA's updates, or biases and scales."""
        return self.updates or self.affine

    def add_down(self, product: rows.Operand, total: Tensor) -> None:
        """Add the MLP's output to ``total``, given the input of its last product."""
        if self.affine or self.view.is_part:
            total.add_(self.project_total("down", product))
        else:
            self.weights.down.add_to(total, self.weights.operand(product))
            self.add_updates("down", product, total)

    def project_total(self, group: str, x: Any) -> Tensor:
        """Return the product of ``o`` or ``down``, summed over the processes that have a part of it."""
        y = self.project(group, x)
        if self.affine:
            self.outputs[group] = y.clone() if self.view.is_part else y
        self.block.add_up_(y)
        return y

    def total(self, dy: Tensor) -> Tensor:
        """Return the gradient of such a product's sum, given this process's part of it."""
        if not self.view.is_part:
            return dy
        total = dy.clone()
        self.block.add_up_(total)
        return total

    def learn_affine(self, group: str, *parts: tuple[Any, Tensor]) -> None:
        """Note the gradients of a group's biases and scales in `learned`.

        ``parts`` are the gradients of its outputs and the outputs, in the order of the group's layers.
        """
        sums = torch.cat([rows.column_sums(dy, y) for dy, y in parts], dim=1)
        self.learned[group] = self.affine[group].gradients(*sums)

    def project(self, group: str, x: Any) -> Tensor:
        """Return a group's product of ``x``, with its updates."""
        y: Tensor = getattr(self.weights, group)(self.weights.operand(x))
        self.add_updates(group, x, y)
        return y

    def add_updates(self, group: str, x: Any, y: Tensor) -> None:
        """Add LoRA's updates of a group to its product ``y`` of ``x``, which is then not in fp8."""
        update = self.updates.get(group)
        if update is not None:
            update.add_to(y, self.reduce(group, x))

    def reduce(self, group: str, x: Any) -> Tensor:
        """Return ``x a^T`` of a group's updates, computed once."""
        if group not in self.reduced:
            self.reduced[group] = self.updates[group].reduce(self.dropped(group, x))
        return self.reduced[group]

    def dropped(self, group: str, x: Any) -> Tensor:
        """Return the input ``x`` of a group's updates, or its gradient, with the same places dropped."""
        share = self.updates[group].dropout
        return rows.dropout(x, share, self.seeds[group]) if share else x

    def reach(self, group: str, dy: Any, dx: Tensor) -> Any:
        """Add to ``dx`` what reaches a group's input through its updates.

        Args:
            group: of `layout`.
            dy: the gradient of its product.
            dx: the gradient of its input, without the updates.

        Returns:
            The gradient of ``x a^T``, for `learn`; None if the group has no updates.
        """
        update = self.updates.get(group)
        if update is None:
            return None
        dz = dy @ update.b
        if update.dropout:
            dx.add_(self.dropped(group, dz @ update.a))
        else:
            dx.addmm_(dz, update.a)
        return dz

    def learn(self, group: str, x: Any, dy: Any, dz: Any) -> None:
        """Note the gradients of a group's updates in `learned`: ``x`` is its input, ``dz`` from `reach`."""
        if dz is not None:
            update = self.updates[group]
            dyz = product(dy.T, self.reduce(group, x))
            self.learned[group] = update.gradients(dz, dyz, self.dropped(group, x))


@dataclass
class Attended:
    """What a block's backward pass needs of its attention."""

    rstd: Tensor
    """Reciprocal root mean square of the norm before attention, fp32 ``[T]``."""
    q: Tensor
    """Rotated ``[T, H D]``, or ``[M, H D]``; the product's output if the model has head norms."""
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
class Between:
    """What a block's backward pass needs of its MLP."""

    middle: Tensor
    """The sum after attention ``[T, C]``, or ``[M, C]``."""
    rstd: Tensor
    """Reciprocal root mean square of the norm of ``middle``, fp32 ``[T]`` or ``[M]``."""
    gate_up: Tensor
    """Gate and up, joined, ``[T, 2 M]``."""
