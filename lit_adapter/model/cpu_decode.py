"""Decode steps on a CPU: the same arithmetic as `Llama.forward` in few calls, on matrices laid out for it.

One token's products read every weight once and are bound by memory; what is beside them is the cost of
calling small operations. Matrices that read the same input therefore lie side by side, each is read by all
threads at a time, and a layer takes some twenty operations instead of fifty.

Letters: B slots, C width, H query heads, G key/value heads, D head size, S cached tokens, K prompt length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapter.device import free_bytes
from lit_adapter.model.attention import KeyValue
from lit_adapter.model.cache import KeyValueCache
from lit_adapter.model.joining import join, joined
from lit_adapter.model.llama import Block, Llama, RMSNorm
from lit_adapter.model.precision import widen
from lit_adapter.model.prefix import GatedPrefix, PrefixState


class _Matrix:
    """The weights of layers that read the same input, which go on using them where `join` puts them.

    torch's product of a matrix with one column, or few, runs in one thread and reads fp32 at half its speed;
    a batch of such products does neither. So the outputs are cut into about as many parts as there are
    threads, at least two. In 16 bits one product is faster.
    """

    def __init__(self, *linears: Any) -> None:
        join(*linears)
        whole = joined(*linears)
        self.n_outputs, n_inputs = whole.shape
        n_parts = 1 if whole.itemsize == 2 else _n_parts(self.n_outputs)
        if missing := -self.n_outputs % n_parts:  # no such number divides them: this one is copied
            whole = F.pad(whole, (0, 0, 0, missing))
        self.parts = whole.view(n_parts, -1, n_inputs)

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x W^T [B, outputs]`` of ``x [B, inputs]``."""
        if len(self.parts) == 1:
            return F.linear(x, self.parts[0])
        y = torch.bmm(self.parts, x.T.expand(len(self.parts), -1, -1))
        return y.flatten(0, 1)[: self.n_outputs].T


def _n_parts(n_outputs: int) -> int:
    """Return how many parts of equal size there can be, about one for each thread."""
    wanted = max(2, torch.get_num_threads())
    candidates = (*range(wanted, 2 * wanted), *range(wanted - 1, 1, -1))
    return next((n for n in candidates if n_outputs % n == 0), wanted)


@dataclass
class _Layer:
    """A layer's matrices, and the weights of its norms as `_norm` takes them."""

    before: Tensor
    qkv: _Matrix
    o: _Matrix
    between: Tensor
    gate_up: _Matrix
    down: _Matrix


class DecodeWeights:
    """A model's matrices for `CpuDecode`, laid out when they are first asked for.

    Args:
        model: a frozen model on a CPU, with its adapter in use; its weights must not change any more.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model
        with torch.inference_mode(False), torch.no_grad():
            self.prefix: list[PrefixState | None] = model.project_prefixes(model.embed_tokens.weight.dtype)
        """Each layer's projected prefix, or None: projected once for all answers."""
        self.layers: list[_Layer] = []
        self.norm: Tensor
        self.head: _Matrix

    @cached_property
    def ready(self) -> bool:
        """Lay the matrices out; False for a model that is not plain, or where memory is too small for it.

        Decided once: whoever asks again, in the middle of an answer too, goes the same way.
        """
        if not all(_is_plain(block) for block in self.model.layers) or not _is_plain_head(self.model):
            return False
        free = free_bytes(torch.device("cpu"))
        if free is not None and _n_bytes(self.model) > free:
            return False
        with torch.inference_mode(False):  # the model goes on using them, perhaps in training
            self.norm, self.head = _doubled(self.model.norm), _Matrix(self.model.lm_head)
            self.layers = [_layer(block) for block in self.model.layers]
        return True


def _layer(block: Block) -> _Layer:
    attn, mlp = block.self_attn, block.mlp
    return _Layer(
        before=_doubled(block.input_layernorm),
        qkv=_Matrix(attn.q_proj, attn.k_proj, attn.v_proj),
        o=_Matrix(attn.o_proj),
        between=_doubled(block.post_attention_layernorm),
        gate_up=_Matrix(mlp.gate_proj, mlp.up_proj),
        down=_Matrix(mlp.down_proj),
    )


def _doubled(norm: RMSNorm) -> Tensor:
    return torch.cat((norm.weight, torch.zeros_like(norm.weight)))


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the root mean square norm of ``x [B, C]``: the layer norm of x beside -x, whose mean is 0."""
    C = x.shape[-1]
    return F.layer_norm(torch.cat((x, -x), dim=-1), (2 * C,), weight, None, eps)[:, :C]


def _n_bytes(model: Llama) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _is_plain(block: Block) -> bool:
    """Whether a block has seven plain matrices, two norms and perhaps a prefix, and nothing else."""
    attn, mlp = block.self_attn, block.mlp
    linears = (
        *(attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )
    norms = (block.input_layernorm, block.post_attention_layernorm)
    plain = all(type(linear) is nn.Linear and linear.bias is None for linear in linears)
    prefix = attn.prefix is None or type(attn.prefix) is GatedPrefix
    return plain and prefix and all(type(norm) is RMSNorm for norm in norms)


def _is_plain_head(model: Llama) -> bool:
    return type(model.lm_head) is nn.Linear and model.lm_head.bias is None and type(model.norm) is RMSNorm


@dataclass
class _Step:
    """What all layers of a step share."""

    rotation: KeyValue
    """Cosines twice, and sines negated and plain, each ``[B, 1, D]``."""
    position: Sequence[int]
    place: Tensor
    """The positions as a tensor ``[B]``."""
    used: int
    """Tokens of the longest text, with its new one (S)."""
    hidden: Tensor | None
    """Minus infinity where a slot does not see a token, else 0 ``[B G, 1, S]``; None where all see all."""


class CpuDecode:
    """Takes decode steps of a model whose `DecodeWeights` are ready.

    Args:
        model: base with or without prefixes.
        cache: keys and values.
    """

    def __init__(self, model: Llama, cache: KeyValueCache) -> None:
        weights: DecodeWeights = model.decode_weights
        config = model.config
        self.model, self.cache, self.weights = model, cache, weights
        self.H, self.G, self.D = config.n_head, config.n_kv_head, config.head_dim
        self.scale = config.head_dim**-0.5
        self.prefix = [
            self._baked(state) if block.self_attn.prefix is not None else None
            for block, state in zip(model.layers, cache.prefix, strict=True)
        ]
        self.slot = torch.arange(cache.n_slots)

    def _baked(self, state: PrefixState | None) -> KeyValue | None:
        """Return a prompt's keys ``[H, D, K]``, scaled, and values ``[H, K, D]`` times c(g)."""
        if state is None:
            return None
        pk, pv = (x.repeat_interleave(self.H // self.G, dim=0) for x in (state.k, state.v))
        return (pk * self.scale).mT.contiguous(), (widen(pv) * state.strength).to(pv.dtype)

    def step(self, token: Sequence[int], position: Sequence[int]) -> Tensor:
        """Put every slot's newest token into the cache.

        Args:
            token: of each slot ``[B]``.
            position: of these tokens ``[B]``.

        Returns:
            Logits of the next token ``[B, V]``.
        """
        model, step = self.model, self._prepared(position)
        x = F.embedding(torch.tensor(token), model.embed_tokens.weight)
        eps = model.config.norm_eps
        for index, layer in enumerate(self.weights.layers):
            qkv = layer.qkv(_norm(x, layer.before, eps))
            x = x + layer.o(self._attend(index, qkv, step))
            gate, up = layer.gate_up(_norm(x, layer.between, eps)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate).mul_(up))
        return self.weights.head(_norm(x, self.weights.norm, eps))

    def _prepared(self, position: Sequence[int]) -> _Step:
        place, used = torch.tensor(position), max(position) + 1
        cos, sin = self.model.rotation(place)  # [B, D/2]
        rotation = (torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])
        hidden = None
        if min(position) < used - 1:
            unseen = torch.arange(used) > place[:, None]
            hidden = torch.zeros(unseen.shape, dtype=self.cache.k.dtype).masked_fill_(unseen, -torch.inf)
            hidden = hidden.repeat_interleave(self.G, dim=0)[:, None]
        return _Step(rotation, position, place, used, hidden)

    def _attend(self, index: int, qkv: Tensor, step: _Step) -> Tensor:
        """Keep the new keys and values, and return attention with its prefix branch ``[B, H D]``."""
        B, H, G, D = len(qkv), self.H, self.G, self.D
        heads = qkv.view(B, H + 2 * G, D)
        turned, (cos, sin) = widen(heads[:, : H + G]), step.rotation
        turned = torch.addcmul(turned * cos, turned.roll(D // 2, -1), sin).to(qkv.dtype)
        q, keys, values = turned[:, :H], self.cache.k[index], self.cache.v[index]
        if B == 1:
            place = step.position[0]
            keys[0, :, place], values[0, :, place] = turned[0, H:], heads[0, H + G :]
        else:
            at = (self.slot, slice(None), step.place)
            keys[at], values[at] = turned[:, H:], heads[:, H + G :]
        keys, values = (x[:, :, : step.used].reshape(B * G, step.used, D) for x in (keys, values))
        grouped = q.reshape(B * G, H // G, D)
        hidden = step.hidden
        start = grouped.new_zeros(1) if hidden is None else hidden
        score = torch.baddbmm(start, grouped, keys.mT, beta=0 if hidden is None else 1, alpha=self.scale)
        y = torch.bmm(widen(score).softmax(-1).to(q.dtype), values).view(B, H, D)
        prefix = self.prefix[index]
        if prefix is not None:
            weight = widen(torch.bmm(q.transpose(0, 1), prefix[0])).softmax(-1).to(q.dtype)
            y = torch.baddbmm(y.transpose(0, 1), weight, prefix[1]).transpose(0, 1)
        return y.reshape(B, H * D)
