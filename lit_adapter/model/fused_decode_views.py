"""The passes of `fused_decode` over tokens of any texts in one row, which are kept in the cache.

Letters: N queries, T tokens, M tokens with queries, C width, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_adapter.model.attention import KeyValue
from lit_adapter.model.fused_heads import HeadNorms
from lit_adapter.model.kernels import attention, decode_attention, prompt_prefix, rows
from lit_adapter.model.llama import Block
from lit_adapter.model.lora import JoinedLora
from lit_adapter.model.pieces import PieceRow
from lit_adapter.model.tiles import plan_tiles

if TYPE_CHECKING:
    from lit_adapter.model.fused_decode import FusedDecode


class _Rotations:
    """The cosines and sines of some positions ``[T]`` in each layer."""

    def __init__(self, decode: FusedDecode, position: Tensor) -> None:
        self.tables, self.position = decode.rotations, position
        self._found: dict[int, KeyValue] = {}

    def __getitem__(self, layer: int) -> KeyValue:
        """Return those of a layer, each ``[T, D/2]``."""
        cos, sin = self.tables[layer]
        if id(cos) not in self._found:  # layers share them
            self._found[id(cos)] = cos[self.position], sin[self.position]
        return self._found[id(cos)]


class CacheRowView:
    """Tokens of any texts in one row ``[1, T]``, for blocks that are computed whole.

    ``slot [T]`` and ``position [T]`` say where each token is kept.
    """

    def __init__(self, decode: FusedDecode, slot: Tensor, position: Tensor) -> None:
        self.decode, self.slot, self.position = decode, slot, position
        self.rotations = _Rotations(decode, position)

    def run(self, block: Block, x: Tensor, query_positions: Tensor | None) -> Tensor:
        """Compute a block for ``x [1, T, C]``, or for its positions ``query_positions [M]``."""
        decode, layer, x = self.decode, block.self_attn.index, x[0]
        weights, updates = decode.weights[layer], decode.updates[layer]
        in_fp8 = {group: weights.quantised and group not in updates for group in ("qkv", "gate_up", "down")}
        before, between = block.input_layernorm, block.post_attention_layernorm
        normed, _ = rows.norm(x, before.weight_of(len(x)), before.eps, None, quantised=in_fp8["qkv"])
        qkv = weights.qkv(weights.operand(normed))
        _add_update(updates.get("qkv"), qkv, normed)
        norms, kept = HeadNorms.of(block.self_attn), decode.q_width + decode.kv_width
        if norms is not None:
            norms.norm_(qkv[:, : decode.q_width], qkv[:, decode.q_width : kept])
        cache = decode.cache.layer(layer)
        decode_attention.rotate_and_keep(qkv, self.rotations[layer], self.slot, self.position, cache)
        y = self.attend(layer, qkv, query_positions)
        x = x if query_positions is None else x[query_positions]
        added = weights.o(weights.operand(y))
        _add_update(updates.get("o"), added, y)
        middle, _, normed, _ = rows.add_and_norm(
            x, added, between.weight_of(len(x)), between.eps, quantised=in_fp8["gate_up"], twice=False
        )
        gate_up = weights.gate_up(weights.operand(normed))
        _add_update(updates.get("gate_up"), gate_up, normed)
        hidden = rows.swiglu(gate_up, quantised=in_fp8["down"])
        weights.down.add_to(middle, weights.operand(hidden))
        _add_update(updates.get("down"), middle, hidden)
        return middle[None]

    @abstractmethod
    def attend(self, layer: int, qkv: Tensor, query_positions: Tensor | None) -> Tensor:
        """Return attention ``[T, H * D]`` of rotated ``qkv [T, (H + 2 G) * D]``, or ``[M, H * D]``."""


def _add_update(update: JoinedLora | None, y: Tensor, x: Any) -> None:
    """Add LoRA's updates of a group, if it has any, to its product ``y`` of ``x``."""
    if update is not None:
        update.add_to(y, update.reduce(x))


class PackedPromptView(CacheRowView):
    """Pieces of prompts in one row, each attending to itself and to what its slot holds before it."""

    def __init__(self, decode: FusedDecode, row: PieceRow) -> None:
        super().__init__(decode, row.slot, row.position)
        # The keys of all texts, which of them have queries (None: all), and the rotation at their positions.
        self.keys, self.new, self.of_keys = row, None, self.rotations
        if any(piece.done for piece in row.pieces):  # then keys are read from the cache
            self.keys = PieceRow([replace(piece, done=0) for piece in row.pieces], decode.device)
            self.of_keys = _Rotations(decode, self.keys.position)
            pairs = zip(row.pieces, self.keys.spans, strict=True)
            self.new = torch.cat([torch.arange(at.stop - piece.n_new, at.stop) for piece, at in pairs])
        self.row, texts = row, self.keys.on_host
        plan = partial(plan_tiles, texts, device=decode.device)
        windows = dict.fromkeys(decode.windows)
        self.all_queries = {window: plan(self.new, window=window) for window in windows}
        self.last_queries = {window: plan(texts.target_index, window=window) for window in windows}
        prefixes, *others = {piece.prefixes for piece in row.pieces}
        self.shared = None if others else decode.kernel_prefixes(prefixes)
        self.all_tiles, self.last_tiles = (self._tiles(n) for n in (len(row.ids), len(row.pieces)))
        self.lost = (
            None if self.shared is not None else row.ids.new_zeros(decode.cache.n_slots, dtype=torch.float32)
        )
        """NaN for the slot of a text with a value that is not finite, which must not reach its neighbours."""

    def _tiles(self, n: int) -> Tensor | None:
        """Return the plan of the prefix programs for ``n`` queries; None if all have the same prefix."""
        if self.shared is not None:
            return None
        slots = [piece.slot for piece in self.row.pieces]
        return prompt_prefix.plan(self.row.among(n), slots, self.decode.device)

    def attend(self, layer: int, qkv: Tensor, query_positions: Tensor | None) -> Tensor:
        """Attend to the pieces themselves, and to what the cache holds before them."""
        decode, rotation = self.decode, self.of_keys[layer]
        q, k, v = qkv.split([decode.q_width, decode.kv_width, decode.kv_width], dim=1)
        plans, tiles = self.all_queries, self.all_tiles
        if query_positions is not None:
            q, plans, tiles = q[query_positions], self.last_queries, self.last_tiles
        if self.new is not None:
            at = (self.keys.slot, slice(None), self.keys.position)
            k, v = (x[at].flatten(1) for x in decode.cache.layer(layer))
        if self.lost is not None:
            self.lost.index_add_(0, self.keys.slot, (v - v).sum(1, dtype=torch.float32))
            v.nan_to_num_(0, 0, 0)  # a weight of 0 times NaN would reach the neighbours
        plan = plans[decode.windows[layer]]
        shared = None if self.shared is None else self.shared.get(layer)
        y = attention.attend(q, k, v, rotation, plan, decode.D, shared)[0]
        own = decode.prefixes.joined.layer(layer)
        if tiles is not None and own is not None:
            prompt_prefix.add(q, plan.place, rotation, own, tiles, y)
        return y


class QueryAttention:
    """The attention of N queries, each to its slot's keys: those of a step, or a few tokens of prompts.

    The queries of a tile, ``size`` of them, belong to one slot.
    """

    def __init__(self, decode: FusedDecode, n: int, slot: Tensor | None = None, size: int = 1) -> None:
        self.decode, self.slot, config = decode, slot, decode.model.config
        heads, length = (config.n_head, config.n_kv_head), decode.cache.length
        self.parts = decode_attention.Parts(n // size, size, heads, decode.D, length, decode.device)
        self.y = decode.model.embed_tokens.weight.new_empty(n, decode.q_width)

    def attend(self, layer: int, q: Tensor, position: Tensor) -> Tensor:
        """Return the attention of all queries ``[N, H * D]``, with their prefix branch, until the next call.

        ``q [N, H * D]`` is rotated; ``position [N]`` is that of the tokens.
        """
        decode = self.decode
        cache, rotation, window = decode.cache.layer(layer), decode.rotations[layer], decode.windows[layer]
        prefix, source = decode.prefixes.joined.layer(layer), decode.prefixes.source
        decode_attention.attend(
            q, cache, rotation, position, prefix, source, self.parts, self.y, window, self.slot
        )
        return self.y


class QueryView(CacheRowView):
    """A few tokens of any texts ``[1, N]``, each a query of its own."""

    def __init__(self, decode: FusedDecode, queries: QueryAttention, slot: Tensor, position: Tensor) -> None:
        super().__init__(decode, slot, position)
        self.queries = queries

    def attend(self, layer: int, qkv: Tensor, query_positions: Tensor | None) -> Tensor:
        """Attend to the keys in the cache."""
        return self.queries.attend(layer, qkv[:, : self.decode.q_width], self.position)


class StepView(QueryView):
    """One new token in each of the first slots, ``[N, 1]``."""

    def run(self, block: Block, x: Tensor, query_positions: Tensor | None) -> Tensor:
        """Compute a block for ``x [N, 1, C]`` as for one row."""
        return super().run(block, x.transpose(0, 1), None).transpose(0, 1)
