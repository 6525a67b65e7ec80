"""The executor that decodes on a CPU: the arithmetic of `Llama.forward` in few calls, on joined matrices.

The products of one token read every weight once and are bound by memory; the rest is the cost of calling
small operations. Matrices that read the same input therefore lie side by side, all threads read each of them
together, and a layer takes about twenty operations instead of fifty. Products of several tokens read packed
copies of the matrices.

Letters: B slots, C width, H query heads, G key/value heads, D head size, S cached tokens, K prompt length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adapter.device import free_bytes
from lit_adapter.model import survey
from lit_adapter.model.affine import AdaptedNorm
from lit_adapter.model.attention import KeyValue, sees
from lit_adapter.model.cache import ModuleDecode
from lit_adapter.model.executors import Setting
from lit_adapter.model.joining import PackedWeights, grouped_linears, join, joined, joined_biases
from lit_adapter.model.layout import BlockLayout, block_layout
from lit_adapter.model.llama import Block, Llama, normalised
from lit_adapter.model.lora import JoinedLora, LoraLinear, join_updates
from lit_adapter.model.norms import Norms, StepNorms, normed
from lit_adapter.model.precision import widen
from lit_adapter.model.prefix import GatedPrefix, PrefixState
from lit_adapter.model.slot_prefixes import Prefixes
from lit_adapter.model.torch_internals import packed_linear, packs

FEW_ROWS = 3
"""Rows from which packed weights make a product in fp32 faster: a step of 3 by a sixth, one of 8 to twice."""
KNOWN = survey.FROZEN | {GatedPrefix, AdaptedNorm, LoraLinear}


class _Matrix:
    """The weights of layers that read the same input, side by side; the layers share them.

    torch's product of a matrix with one or few columns runs in one thread and reads fp32 at half the possible
    speed; a batch of such products has neither fault. The outputs are therefore divided into about as many
    parts as there are threads, and at least two. In 16 bits one product is faster.
    """

    packed: Tensor | None = None
    """A packed copy of the weights for products of ``packed_from`` rows or more."""

    def __init__(self, linears: Sequence[Any], update: JoinedLora | None = None) -> None:
        self.update, self.bias = update, joined_biases(*linears)
        join(*linears)
        self.whole = whole = joined(*linears)
        self.packed_from = 1 if whole.itemsize == 2 else FEW_ROWS
        self.n_outputs, n_inputs = whole.shape
        n_parts = 1 if whole.itemsize == 2 else _n_parts(self.n_outputs)
        if missing := -self.n_outputs % n_parts:  # no suitable number divides them: this matrix is copied
            whole = F.pad(whole, (0, 0, 0, missing))
        self.parts = whole.view(n_parts, -1, n_inputs)

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b [B, outputs]`` of ``x [B, inputs]``, with LoRA's updates."""
        if self.packed is not None and len(x) >= self.packed_from:
            y = packed_linear(x, self.packed, self.bias)
        elif len(self.parts) == 1:
            y = F.linear(x, self.parts[0], self.bias)
        else:
            y = torch.bmm(self.parts, x.T.expand(len(self.parts), -1, -1)).flatten(0, 1)[: self.n_outputs].T
            y = y if self.bias is None else y + self.bias
        return y if self.update is None else torch.addmm(y, self.update.reduce(x), self.update.b.T)


def _n_parts(n_outputs: int) -> int:
    """Return a number of equal parts, about one for each thread."""
    wanted = max(2, torch.get_num_threads())
    candidates = (*range(wanted, 2 * wanted), *range(wanted - 1, 1, -1))
    return next((n for n in candidates if n_outputs % n == 0), wanted)


class _Layer:
    """A layer's matrices, and its window and positions."""

    def __init__(self, block: Block, layout: BlockLayout, updates: dict[str, JoinedLora]) -> None:
        attention = block.self_attn
        self.window, self.is_rotated = attention.window, attention.is_rotated
        matrices = {
            group: _Matrix(linears, updates.get(group))
            for group, linears in grouped_linears(block, layout).items()
        }
        self.matrices = list(matrices.values())
        self.qkv, self.o = matrices["qkv"], matrices["o"]
        self.gate_up, self.down = matrices["gate_up"], matrices["down"]


class DecodeWeights:
    """A model's joined matrices, and its norms.

    Args:
        model: one for which `unsupported` returns None; it keeps using the joined matrices.
    """

    def __init__(self, model: Llama) -> None:
        with torch.inference_mode(False):  # the model may be trained later
            self.norms, self.head = Norms.of(model), _Matrix([model.lm_head])
            layout, blocks = block_layout(model.config), zip(model.layers, join_updates(model), strict=True)
            self.layers = [_Layer(block, layout, updates) for block, updates in blocks]
        self.may_pack = packs(self.head.whole.dtype)

    def __deepcopy__(self, memo: Any) -> None:
        """Return None: a copied model joins its own matrices."""

    def pack_for(self, n_rows: int, copies: PackedWeights) -> None:
        """Pack the matrices before the first step of ``n_rows`` for which it pays, where memory allows it."""
        if not self.may_pack or n_rows < self.head.packed_from:
            return
        self.may_pack = False
        matrices = [self.head, *(matrix for layer in self.layers for matrix in layer.matrices)]
        packed = copies.copies_of([matrix.whole for matrix in matrices])
        if packed is not None:
            for matrix, copy in zip(matrices, packed, strict=True):
                matrix.packed = copy


def unsupported(model: Llama, setting: Setting) -> str | None:
    """Return why `CpuDecode` cannot compute ``model``; None where it can."""
    free = free_bytes(torch.device("cpu"))
    parameters = list(model.parameters())
    n_bytes = sum(parameter.nbytes for parameter in parameters)
    reasons = (
        (any(parameter.requires_grad for parameter in parameters), "the model is being trained"),
        (
            model.decode_weights is None and free is not None and n_bytes > free,
            "joining the matrices takes more memory than is free",
        ),
    )
    return next((why for applies, why in reasons if applies), None) or survey.obstacle(model, KNOWN)


@dataclass
class _Step:
    """What all layers of a step share."""

    rotation: KeyValue
    """Cosines twice, and sines negated and plain, each ``[B, 1, D]``."""
    place: Tensor
    """The positions of the new tokens ``[B]``."""
    used: int
    """Tokens of the longest text with its new one (S)."""
    sights: dict[int | None, _Sight]
    """Keyed by the window of the layer; None for layers without one."""


@dataclass
class _Sight:
    """Which tokens the slots of a step see."""

    start: int
    """The first token that any slot sees."""
    hidden: Tensor | None
    """Minus infinity for tokens hidden from a slot, else 0 ``[B G, 1, S - start]``; None if all see all."""


@dataclass
class _Baked:
    """A layer's prefix, with the scale of the scores and c(g) multiplied in.

    Slots with the same adapter share it; otherwise every slot has its own, and H is B H in the shapes.
    """

    k: Tensor
    """``[H, D, K]``"""
    v: Tensor
    """``[H, K, D]``"""
    hidden: Tensor | None
    """Minus infinity beyond a slot's prompt, else 0 ``[B H, 1, K]``; None if it is shared."""
    unrotated: Tensor | bool
    """Whether queries attend to it before they are rotated; with several prefixes ``[B, 1, 1]``."""


class CpuDecode(ModuleDecode):
    """Reads prompts by the model's own forward pass and takes decode steps on joined matrices.

    ``model`` is one for which `unsupported` returns None.
    """

    _norms: StepNorms
    """The norms of the last step's rows."""

    def __init__(self, model: Llama, n_slots: int, length: int) -> None:
        super().__init__(model, n_slots, length)
        config = model.config
        self.H, self.G, self.D = config.n_head, config.n_kv_head, config.head_dim
        self.scale = config.head_dim**-0.5
        self._rows: list[Prefixes] = []  # those whose prefixes are baked, and whose norms are joined
        self._baked: list[_Baked | None] = []

    def step(self, token: Sequence[int], position: Sequence[int]) -> Tensor:
        """Put the newest tokens of the first B slots into the cache; see `ModuleDecode.step`."""
        model = self.model
        if model.decode_weights is None:  # joined only now: the first token does not wait for it
            model.decode_weights = DecodeWeights(model)
        weights: DecodeWeights = model.decode_weights
        weights.pack_for(len(token), model.packed_weights)
        step = self._prepared(position, weights.norms)
        norms, eps = self._norms, model.config.norm_eps
        x = F.embedding(torch.tensor(token), model.embed_tokens.weight)
        for index, layer in enumerate(weights.layers):
            qkv = layer.qkv(normed(x, norms.wide[2 * index], eps))
            x = x + layer.o(self._attend(index, layer, qkv, step))
            gate, up = layer.gate_up(normed(x, norms.wide[2 * index + 1], eps)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate).mul_(up))
        return weights.head(normed(x, norms.wide[-1], eps))

    def _prepared(self, position: Sequence[int], norms: Norms) -> _Step:
        place, used = torch.tensor(position), max(position) + 1
        cos, sin = self.model.rotation(place)  # [B, D/2]
        rotation = (torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])
        windows = {layer.self_attn.window for layer in self.model.layers}
        sights = {window: self._sight(position, window) for window in windows}
        rows = self.prefixes.rows[: len(position)]
        if rows != self._rows:
            self._rows, prefixes = rows, self.prefixes.first(len(rows))
            self._baked = [self._bake(prefixes.layer(index)) for index in range(len(self.model.layers))]
            self._norms = StepNorms.of(prefixes.norms or norms, len(rows), self.model.config)
        return _Step(rotation, place, used, sights)

    def _sight(self, position: Sequence[int], window: int | None) -> _Sight:
        shortest, used = min(position), max(position) + 1
        start = 0 if window is None else max(0, shortest + 1 - window)
        if shortest == used - 1:
            return _Sight(start, None)
        seen = sees(torch.tensor(position)[:, None], torch.arange(start, used), window)
        hidden = torch.zeros(seen.shape, dtype=self.cache.k.dtype).masked_fill_(~seen, -torch.inf)
        return _Sight(start, hidden.repeat_interleave(self.G, dim=0)[:, None])

    def _bake(self, state: PrefixState | None) -> _Baked | None:
        if state is None:
            return None
        pk, pv = (x.repeat_interleave(self.H // self.G, dim=-3) for x in (state.k, state.v))
        v = (widen(pv) * state.whole_strength).to(pv.dtype)
        k, hidden = (pk * self.scale).mT.contiguous(), None
        if state.hidden is not None:
            hidden = state.hidden.mT.to(k.dtype).expand(-1, self.H, -1, -1).flatten(0, 1)
            k, v = k.flatten(0, 1), v.flatten(0, 1)
        unrotated = state.unrotated if isinstance(state.unrotated, bool) else state.unrotated[:, 0]
        return _Baked(k, v, hidden, unrotated)

    def _turned(self, heads: Tensor, step: _Step) -> Tensor:
        """Return queries and keys ``[B, H + G, D]`` rotated to their positions."""
        turned, (cos, sin) = widen(heads), step.rotation
        return torch.addcmul(turned * cos, turned.roll(self.D // 2, -1), sin).to(heads.dtype)

    def _keep(self, index: int, k: Tensor, v: Tensor, step: _Step, start: int) -> tuple[Tensor, Tensor]:
        """Keep new keys and values ``[B, G, D]``; return those from ``start`` on, ``[B G, S - start, D]``."""
        B = len(k)
        keys, values = self.cache.k[index, :B], self.cache.v[index, :B]
        if B == 1:
            keys[0, :, step.used - 1], values[0, :, step.used - 1] = k[0], v[0]
        else:
            at = (torch.arange(B), slice(None), step.place)
            keys[at], values[at] = k, v
        keys, values = (x[:, :, start : step.used].reshape(B * self.G, -1, self.D) for x in (keys, values))
        return keys, values

    def _attend(self, index: int, layer: _Layer, qkv: Tensor, step: _Step) -> Tensor:
        """Keep the new keys and values, and return attention with its prefix branch ``[B, H D]``."""
        B, H, G, D = len(qkv), self.H, self.G, self.D
        heads, new_values = qkv.view(B, H + 2 * G, D).split([H + G, G], dim=1)
        of_heads = self._norms.of_heads[index]
        if of_heads is not None:
            heads = (normalised(heads, self.model.config.norm_eps) * of_heads).to(qkv.dtype)
        turned, sight = self._turned(heads, step) if layer.is_rotated else heads, step.sights[layer.window]
        q, hidden = turned[:, :H], sight.hidden
        keys, values = self._keep(index, turned[:, H:], new_values, step, sight.start)
        grouped = q.reshape(B * G, H // G, D)
        start = grouped.new_zeros(1) if hidden is None else hidden
        score = torch.baddbmm(start, grouped, keys.mT, beta=0 if hidden is None else 1, alpha=self.scale)
        y = torch.bmm(widen(score).softmax(-1).to(q.dtype), values).view(B, H, D)
        prefix = self._baked[index]
        if prefix is None:
            return y.reshape(B, H * D)
        if isinstance(prefix.unrotated, Tensor):
            q = torch.where(prefix.unrotated, heads[:, :H], q)
        elif prefix.unrotated:
            q = heads[:, :H]
        if prefix.hidden is not None:
            score = torch.baddbmm(prefix.hidden, q.reshape(B * H, 1, D), prefix.k)
            weight = widen(score).softmax(-1).to(q.dtype)
            return torch.baddbmm(y.reshape(B * H, 1, D), weight, prefix.v).view(B, H * D)
        weight = widen(torch.bmm(q.transpose(0, 1), prefix.k)).softmax(-1).to(q.dtype)
        return torch.baddbmm(y.transpose(0, 1), weight, prefix.v).transpose(0, 1).reshape(B, H * D)
