"""The executor that reads prompts and decodes on CUDA, with the kernels of training and a few of its own.

It computes the models that the kernels of training compute; no weight is kept twice.

Letters: B slots, T tokens, C width, H query heads, G key/value heads, D head size, K prompt length,
V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapter.grouping import grouped
from lit_adapter.model.affine import join_affine
from lit_adapter.model.attention import KeyValue, PackedRow
from lit_adapter.model.block_weights import block_weights, join_groups
from lit_adapter.model.cache import ModuleDecode, Prefixes
from lit_adapter.model.fused_heads import HeadNorms, unturned
from lit_adapter.model.kernels import attention, decode_attention, decode_products, rows
from lit_adapter.model.kernels.attention import Prefix
from lit_adapter.model.layout import block_layout
from lit_adapter.model.llama import Block, Llama
from lit_adapter.model.lora import join_updates
from lit_adapter.model.tiles import plan_tiles

LONGEST_ROW = 32_768
"""Prompt tokens read together, unless one prompt is longer: more would take memory and save no time."""


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
        self.updates = join_updates(model, model.embed_tokens.weight.dtype)
        self.parts = decode_attention.Parts(B, (H, G), D, length, device)
        self.y = model.embed_tokens.weight.new_empty(B, H * D)
        self.slot = torch.arange(B, device=device)
        turned = model.rotation(torch.arange(length, device=device))  # of all positions, [S, D/2]
        still = unturned(turned) if config.unrotated_layers else turned
        self.rotations = [turned if block.self_attn.is_rotated else still for block in model.layers]
        self.windows = [block.self_attn.window for block in model.layers]
        head = model.lm_head
        plain = type(head) is nn.Linear and head.bias is None and not any(self.updates) and not any(affine)
        plain = plain and not any(weights.quantised for weights in self.weights)
        biased = {linear.group for linear in layout.linears if linear.bias}
        plain = plain and biased <= {"qkv"}  # what is added to the residual takes no bias there
        plain = plain and not config.head_norms  # a program there has half a head at most
        self.few = _FewTexts(self) if plain and decode_products.computes(B, D, self.y.device) else None

    def read(self, prompts: Sequence[Sequence[int]], slots: Sequence[int], prefixes: Prefixes) -> Tensor:
        """Read the prompts of requests with the same adapter; see `ModuleDecode.read`."""
        self.prefixes.assign(slots, prefixes)
        texts = zip(prompts, slots, strict=True)
        rows = grouped(texts, lambda text: len(text[0]), LONGEST_ROW)
        model = self.prefixes.reader(slots[0])
        prefix = [self._joined(prefixes, index) for index in range(len(self.weights))]
        return torch.cat([self._read_row(model, row, prefix) for row in rows])

    def _joined(self, prefixes: Prefixes, index: int) -> Prefix | None:
        """Return a layer's prefix as the kernel for prompts takes it."""
        state = prefixes.layer(index)
        if state is None:
            return None
        kv = torch.cat((state.k, state.v)).transpose(0, 1).flatten(1)
        unrotated = bool(state.unrotated)
        if state.strength.shape[1] > 1:
            return Prefix(kv, state.strength[..., 0].contiguous(), by_token=True, unrotated=unrotated)
        return Prefix(kv, state.strength[:, 0].expand(self.H, self.D).contiguous(), unrotated=unrotated)

    def _read_row(
        self, model: Llama, texts: Sequence[tuple[Sequence[int], int]], prefix: Sequence[Prefix | None]
    ) -> Tensor:
        """Read prompts, each with its slot, placed one after another in one row."""
        prompts, slots = zip(*texts, strict=True)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        segment = torch.repeat_interleave(torch.arange(len(prompts)), lengths)
        last = lengths.cumsum(0) - 1
        ids = torch.tensor([token for prompt in prompts for token in prompt])
        position = torch.arange(len(ids)) - (last + 1 - lengths)[segment]
        row = PackedRow(ids, position, segment, segment, last, last)
        view = _PromptView(self, row, torch.tensor(slots)[segment], prefix)
        return model(view.ids[None], view, view.last)[0]

    def go_on(self, prompt: Sequence[int], done: int, slot: int, prefixes: Prefixes) -> Tensor:
        """Read the rest of a prompt; see `ModuleDecode.go_on`."""
        self.prefixes.assign([slot], prefixes)
        prefix = [self._joined(prefixes, index) for index in range(len(self.weights))]
        view = _RestView(self, len(prompt), done, slot, prefix)
        ids = torch.tensor([prompt[done:]], device=self.device)
        return self.prefixes.reader(slot)(ids, view, view.last)[0]

    def captured_step(self, token: Tensor, position: Tensor, used: int) -> Tensor:
        """Put every slot's newest token into the cache; see `ModuleDecode.captured_step`."""
        model = self.prefixes.stepper
        if self.few is not None:
            return self.few.step(model, token, position)
        view = _StepView(self, self.slot, position)
        return self.model.logits(model(token[:, None], view)[:, 0])

    def attend(self, layer: int, q: Tensor, cache: KeyValue, position: Tensor) -> Tensor:
        """Return the attention of every slot's newest token ``[B, H * D]``, with its prefix branch.

        ``q [B, H * D]`` is rotated; ``cache`` is the layer's; ``position [B]`` is that of the tokens.
        """
        prefix, source = self.prefixes.joined.layer(layer), self.prefixes.source
        rotation, window = self.rotations[layer], self.windows[layer]
        decode_attention.attend(q, cache, rotation, position, prefix, source, self.parts, self.y, window)
        return self.y


class _CacheRowView:
    """Tokens of any texts in one row ``[1, T]``, for blocks that are computed whole.

    ``slot [T]`` and ``position [T]`` say where each token is kept.
    """

    def __init__(self, decode: FusedDecode, slot: Tensor, position: Tensor) -> None:
        self.decode, self.slot, self.position = decode, slot, position
        self._rotations: dict[int, KeyValue] = {}

    def rotation(self, layer: int) -> KeyValue:
        """Return the cosines and sines of the tokens in a layer, each ``[T, D/2]``."""
        cos, sin = self.decode.rotations[layer]
        if id(cos) not in self._rotations:  # layers share them
            self._rotations[id(cos)] = cos[self.position], sin[self.position]
        return self._rotations[id(cos)]

    def run(self, block: Block, x: Tensor, query_positions: Tensor | None) -> Tensor:
        """Compute a block for ``x [1, T, C]``, or for its positions ``query_positions [M]``."""
        decode, layer, x = self.decode, block.self_attn.index, x[0]
        weights, updates = decode.weights[layer], decode.updates[layer]
        in_fp8 = {group: weights.quantised and group not in updates for group in ("qkv", "gate_up", "down")}
        before, between = block.input_layernorm, block.post_attention_layernorm
        normed, _ = rows.norm(x, before.used_weight, before.eps, None, quantised=in_fp8["qkv"])
        qkv = weights.qkv(weights.operand(normed))
        self._update("qkv", layer, qkv, normed)
        norms, kept = HeadNorms.of(block.self_attn), decode.q_width + decode.kv_width
        if norms is not None:
            norms.norm_(qkv[:, : decode.q_width], qkv[:, decode.q_width : kept])
        cache = (decode.cache.k[layer], decode.cache.v[layer])
        decode_attention.rotate_and_keep(qkv, self.rotation(layer), self.slot, self.position, cache)
        y = self.attend(layer, qkv, query_positions)
        x = x if query_positions is None else x[query_positions]
        added = weights.o(weights.operand(y))
        self._update("o", layer, added, y)
        middle, _, normed, _ = rows.add_and_norm(
            x, added, between.used_weight, between.eps, quantised=in_fp8["gate_up"], twice=False
        )
        gate_up = weights.gate_up(weights.operand(normed))
        self._update("gate_up", layer, gate_up, normed)
        hidden = rows.swiglu(gate_up, quantised=in_fp8["down"])
        weights.down.add_to(middle, weights.operand(hidden))
        self._update("down", layer, middle, hidden)
        return middle[None]

    def _update(self, group: str, layer: int, y: Tensor, x: Any) -> None:
        """Add LoRA's updates of a group to its product ``y`` of ``x``."""
        update = self.decode.updates[layer].get(group)
        if update is not None:
            update.add_to(y, update.reduce(x))

    @abstractmethod
    def attend(self, layer: int, qkv: Tensor, query_positions: Tensor | None) -> Tensor:
        """Return attention ``[T, H * D]`` of rotated ``qkv [T, (H + 2 G) * D]``, or ``[M, H * D]``."""


class _PromptView(_CacheRowView):
    """Prompts placed one after another, each attending to itself.

    The targets of ``row`` are their last tokens; ``slot [T]`` is on the CPU; ``prefix`` is of each layer.
    """

    def __init__(
        self, decode: FusedDecode, row: PackedRow, slot: Tensor, prefix: Sequence[Prefix | None]
    ) -> None:
        device = decode.cache.k.device
        joined = torch.cat((row.ids, row.position, slot, row.target_index)).pin_memory()
        T = len(slot)
        parts = joined.to(device, non_blocking=True).split([T, T, T, len(row.target_index)])
        self.ids, position, slot, self.last = parts
        super().__init__(decode, slot, position)
        self.prefix = prefix
        windows = dict.fromkeys(decode.windows)
        self.all_queries = {window: plan_tiles(row, None, device, window) for window in windows}
        self.last_queries = {window: plan_tiles(row, row.target_index, device, window) for window in windows}

    def attend(self, layer: int, qkv: Tensor, query_positions: Tensor | None) -> Tensor:
        decode = self.decode
        q, k, v = qkv.split([decode.q_width, decode.kv_width, decode.kv_width], dim=1)
        plans = self.all_queries if query_positions is None else self.last_queries
        plan, q = plans[decode.windows[layer]], q if query_positions is None else q[query_positions]
        return attention.attend(q, k, v, self.rotation(layer), plan, decode.D, self.prefix[layer])[0]


class _RestView(_CacheRowView):
    """The tokens of a text of ``length`` after the first ``done``, which its slot holds."""

    def __init__(
        self, decode: FusedDecode, length: int, done: int, slot: int, prefix: Sequence[Prefix | None]
    ) -> None:
        device = decode.device
        everything, none = torch.arange(length), torch.zeros(length, dtype=torch.long)
        new = everything[done:]
        super().__init__(decode, torch.full((len(new),), slot, device=device), new.to(device))
        self.last = torch.tensor([len(new) - 1], device=device)
        self.length, self.own_slot, self.prefix = length, slot, prefix
        row = PackedRow(none, everything, none, none, new, new)
        windows = dict.fromkeys(decode.windows)
        self.all_queries = {window: plan_tiles(row, new, device, window) for window in windows}
        self.last_queries = {window: plan_tiles(row, new[-1:], device, window) for window in windows}

    def attend(self, layer: int, qkv: Tensor, query_positions: Tensor | None) -> Tensor:
        decode = self.decode
        k, v = (
            x[layer, self.own_slot, :, : self.length].transpose(0, 1).reshape(self.length, -1)
            for x in (decode.cache.k, decode.cache.v)
        )
        cos, sin = decode.rotations[layer]
        plans = self.all_queries if query_positions is None else self.last_queries
        q = qkv[:, : decode.q_width]
        q = q if query_positions is None else q[query_positions]
        rotation = cos[: self.length], sin[: self.length]
        plan, prefix = plans[decode.windows[layer]], self.prefix[layer]
        return attention.attend(q, k, v, rotation, plan, decode.D, prefix)[0]


class _StepView(_CacheRowView):
    """One new token in every slot, ``[B, 1]``."""

    def run(self, block: Block, x: Tensor, query_positions: Tensor | None) -> Tensor:
        """Compute a block for ``x [B, 1, C]`` as for one row."""
        return super().run(block, x.transpose(0, 1), None).transpose(0, 1)

    def attend(self, layer: int, qkv: Tensor, query_positions: Tensor | None) -> Tensor:
        decode = self.decode
        cache = (decode.cache.k[layer], decode.cache.v[layer])
        return decode.attend(layer, qkv[:, : decode.q_width], cache, self.position)


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
        groups = block_layout(model.config).groups
        torch.index_select(model.embed_tokens.weight, 0, token, out=x)
        for index, block in enumerate(model.layers):
            qkv, (o,), (gate, up), (down,) = (
                [block.get_submodule(name).weight for name in names] for names in groups.values()
            )
            biases = [block.get_submodule(name).bias for name in groups["qkv"]]
            cache, norm = (decode.cache.k[index], decode.cache.v[index]), block.input_layernorm
            rotation = decode.rotations[index]
            products.project(x, norm.used_weight, norm.eps, qkv, biases, rotation, position, self.q, cache)
            products.add_linear(decode.attend(index, self.q, cache, position), o, x)
            norm = block.post_attention_layernorm
            products.gate_up(x, norm.used_weight, norm.eps, gate, up, self.hidden)
            products.add_linear(self.hidden, down, x)
        norm = model.norm
        products.norm_linear(x, norm.used_weight, norm.eps, model.lm_head.weight, self.logits)
        return self.logits
