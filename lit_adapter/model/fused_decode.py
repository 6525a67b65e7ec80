"""The executor that reads prompts and decodes on CUDA, with the kernels of training and a few of its own.

It computes the models that the kernels of training compute; no weight is kept twice.

Letters: B slots, T tokens, C width, H query heads, G key/value heads, D head size, K prompt length,
V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapter.model.affine import join_affine
from lit_adapter.model.attention import KeyValue
from lit_adapter.model.block_weights import block_weights, join_groups
from lit_adapter.model.cache import ModuleDecode
from lit_adapter.model.fused_heads import HeadNorms
from lit_adapter.model.joining import grouped_linears
from lit_adapter.model.kernels import attention, decode_attention, decode_products, prompt_prefix, rows
from lit_adapter.model.kernels.attention import Prefix
from lit_adapter.model.layout import block_layout
from lit_adapter.model.llama import Block, Llama
from lit_adapter.model.lora import JoinedLora, join_updates
from lit_adapter.model.pieces import Piece, PieceRow
from lit_adapter.model.rope import no_rotation
from lit_adapter.model.slot_prefixes import Prefixes
from lit_adapter.model.tiles import plan_tiles


class FusedDecode(ModuleDecode):
    """Reads prompts and takes decode steps with kernels of its own.

    ``model`` is one that `cuda_support.unsupported` accepts; its projections are moved side by side.
    """

    def __init__(self, model: Llama, n_slots: int, length: int) -> None:
        super().__init__(model, n_slots, length)
        if model.layers[0].fused_weights is None:
            with torch.inference_mode(False):  # the model may be trained later
                join_groups(model)
        config, B, device = model.config, n_slots, self.device
        H, G, D = config.n_head, config.n_kv_head, config.head_dim
        self.H, self.D = H, D
        self.q_width, self.kv_width = H * D, G * D
        layout = block_layout(config)
        affine = [join_affine(block, layout) for block in model.layers]
        found = zip(model.layers, affine, strict=True)
        self.weights = [block_weights(block, layout).adapted(own) for block, own in found]
        self.updates = join_updates(model)
        self.parts = decode_attention.Parts(B, (H, G), D, length, device)
        self.y = model.embed_tokens.weight.new_empty(B, H * D)
        self.slot = torch.arange(B, device=device)
        rotated = model.rotation(torch.arange(length, device=device))  # of all positions, [S, D/2]
        still = no_rotation(rotated) if config.unrotated_layers else rotated
        self.rotations = [rotated if block.self_attn.is_rotated else still for block in model.layers]
        self.windows = [block.self_attn.window for block in model.layers]
        head = model.lm_head
        biased = {linear.group for linear in layout.linears if linear.bias}
        plain = (
            type(head) is nn.Linear
            and head.bias is None
            and not any(self.updates)
            and not any(affine)
            and not any(weights.quantised for weights in self.weights)
            and biased <= {"qkv"}  # what is added to the residual takes no bias there
            and not config.head_norms  # a program there has half a head at most
        )
        self.few = _FewTexts(self) if plain and decode_products.computes(B, D, self.y.device) else None

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """Read pieces of prompts; see `ModuleDecode.read`. A common start would take a pass of its own."""
        self.prefixes.assign({piece.slot: piece.prefixes for piece in pieces})
        return self._read_rows(pieces)

    def _length_in_row(self, piece: Piece) -> int:
        return len(piece.prompt)  # keys before a piece are gathered into the row

    def _read_row(self, row: PieceRow) -> Tensor:
        view = _PromptView(self, row)
        hidden = self.prefixes.reader(row)(row.ids[None], view, row.last)[0]
        return hidden if view.lost is None else hidden + view.lost[row.slot[row.last], None].to(hidden.dtype)

    def kernel_prefix(self, prefixes: Prefixes, index: int) -> Prefix | None:
        """Return a layer's prefix in the form that the kernel for prompts takes."""
        state = prefixes.layer(index)
        if state is None:
            return None
        kv = torch.cat((state.k, state.v)).transpose(0, 1).flatten(1)
        unrotated = bool(state.unrotated)
        if state.strength.shape[1] > 1:
            return Prefix(kv, state.strength[..., 0].contiguous(), by_token=True, unrotated=unrotated)
        return Prefix(kv, state.strength[:, 0].expand(self.H, self.D).contiguous(), unrotated=unrotated)

    def captured_step(self, token: Tensor, position: Tensor, used: int) -> Tensor:
        """Put every slot's newest token into the cache; see `ModuleDecode.captured_step`."""
        model = self.prefixes.stepper
        if self.few is not None:
            return self.few.step(model, token, position)
        view = _StepView(self, self.slot, position)
        return self.model.logits(model(token[:, None], view)[:, 0])

    def attend(self, layer: int, q: Tensor, position: Tensor) -> Tensor:
        """Return the attention of every slot's newest token ``[B, H * D]``, with its prefix branch.

        ``q [B, H * D]`` is rotated; ``position [B]`` is that of the tokens.
        """
        cache, rotation, window = self.cache.layer(layer), self.rotations[layer], self.windows[layer]
        prefix, source = self.prefixes.joined.layer(layer), self.prefixes.source
        decode_attention.attend(q, cache, rotation, position, prefix, source, self.parts, self.y, window)
        return self.y


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


class _CacheRowView:
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


class _PromptView(_CacheRowView):
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
        self.shared = None if others else prefixes
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
        shared = None if self.shared is None else decode.kernel_prefix(self.shared, layer)
        y = attention.attend(q, k, v, rotation, plan, decode.D, shared)[0]
        own = decode.prefixes.joined.layer(layer)
        if tiles is not None and own is not None:
            prompt_prefix.add(q, plan.place, rotation, own, tiles, y)
        return y


class _StepView(_CacheRowView):
    """One new token in every slot, ``[B, 1]``."""

    def run(self, block: Block, x: Tensor, query_positions: Tensor | None) -> Tensor:
        """Compute a block for ``x [B, 1, C]`` as for one row."""
        return super().run(block, x.transpose(0, 1), None).transpose(0, 1)

    def attend(self, layer: int, qkv: Tensor, query_positions: Tensor | None) -> Tensor:
        return self.decode.attend(layer, qkv[:, : self.decode.q_width], self.position)


class _FewTexts:
    """The steps of few texts: five or seven launches per layer, which read each weight once."""

    def __init__(self, decode: FusedDecode) -> None:
        self.decode, config, B = decode, decode.model.config, decode.cache.n_slots
        new = decode.y.new_empty
        self.x = new(B, config.n_embd)
        self.q = new(B, decode.q_width)
        self.hidden = new(B, config.n_hidden)
        self.logits = new(B, config.vocab_size, dtype=torch.float32)
        self.products = decode_products.Products(self.x)

    def step(self, model: Llama, token: Tensor, position: Tensor) -> Tensor:
        """Take a step with the norms of ``model``; see `FusedDecode.captured_step`."""
        decode, products, x = self.decode, self.products, self.x
        layout = block_layout(model.config)
        torch.index_select(model.embed_tokens.weight, 0, token, out=x)
        for index, block in enumerate(model.layers):
            qkv, (o,), (gate, up), (down,) = grouped_linears(block, layout).values()
            weights, biases = [linear.weight for linear in qkv], [linear.bias for linear in qkv]
            cache, norm, rotation = decode.cache.layer(index), block.input_layernorm, decode.rotations[index]
            products.project(
                x, norm.weight_of(len(x)), norm.eps, weights, biases, rotation, position, self.q, cache
            )
            products.add_linear(decode.attend(index, self.q, position), o.weight, x)
            norm = block.post_attention_layernorm
            products.gate_up(x, norm.weight_of(len(x)), norm.eps, gate.weight, up.weight, self.hidden)
            products.add_linear(self.hidden, down.weight, x)
        norm = model.norm
        products.norm_linear(x, norm.weight_of(len(x)), norm.eps, model.lm_head.weight, self.logits)
        return self.logits
