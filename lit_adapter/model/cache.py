"""Keys and values while decoding, and the prefixes of the slots they are kept in.

A cache has one slot per request, and a slot has its own adapter. Prompts of unequal length share a forward
pass: they are padded on the right, and what padding wrote is overwritten before any later position sees it.

Letters: B slots, T positions, S cached positions, H query heads, G key/value heads, D head size, K prompt
length, N layers, L adapted layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adapter.model.attention import BaseView, KeyValue, attend_causally
from lit_adapter.model.llama import Llama
from lit_adapter.model.prefix import PrefixState, attend_prefix

PrefixOf = Callable[[int], PrefixState | None]
"""Returns the prefix of a layer by the layer's index."""


class KeyValueCache:
    """Keys and values of ``n_slots`` requests of up to ``length`` tokens each.

    Args:
        model: whose keys and values are kept.
        n_slots: B.
        length: longest prompt with its answer, in tokens (S).
    """

    def __init__(self, model: Llama, n_slots: int, length: int) -> None:
        config, weight = model.config, model.embed_tokens.weight
        self.n_slots, self.length = n_slots, length
        shape = (config.n_layer, n_slots, config.n_kv_head // model.n_parts, length, config.head_dim)
        self.k = torch.zeros(shape, dtype=weight.dtype, device=weight.device)  # [N, B, G, S, D]
        self.v = torch.zeros_like(self.k)

    def take(self, other: KeyValueCache) -> None:
        """Copy the contents of a cache that is no larger."""
        for own, old in ((self.k, other.k), (self.v, other.v)):
            own[:, : other.n_slots, :, : other.length] = old

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""
        for x in (self.k, self.v):
            x[:, target, :, :length] = x[:, source, :, :length]


@dataclass(frozen=True, eq=False)
class Prefixes:
    """The prefixes of one adapter, projected, with those of its adapted layers stacked."""

    layers: tuple[int, ...]
    """Indices of the adapted layers."""
    stacked: PrefixState | None
    """``k`` and ``v [L, G, K, D]``, ``strength [L, H or 1, K or 1, D or 1]``; None without a prefix."""

    @classmethod
    def of(cls, states: Sequence[PrefixState | None]) -> Prefixes:
        """Stack the states of all layers, None for a layer without a prefix."""
        found = {layer: state for layer, state in enumerate(states) if state is not None}
        if not found:
            return cls((), None)
        k, v, strength = (
            torch.stack([getattr(state, name) for state in found.values()]) for name in ("k", "v", "strength")
        )
        return cls(tuple(found), PrefixState(k, v, strength))

    @property
    def length(self) -> int:
        """K; 0 without a prefix."""
        return 0 if self.stacked is None else self.stacked.k.shape[2]

    def layer(self, index: int) -> PrefixState | None:
        """Return one layer's prefix."""
        if self.stacked is None or index not in self.layers:
            return None
        at = self.layers.index(index)
        return PrefixState(self.stacked.k[at], self.stacked.v[at], self.stacked.strength[at])


class SlotPrefixes:
    """The prefixes of every slot, in tensors that stay where they are until a longer prompt comes.

    A slot without a prefix has keys, values and strengths of 0, which add nothing.

    Args:
        model: whose attention heads are counted.
        n_slots: B.
    """

    def __init__(self, model: Llama, n_slots: int) -> None:
        self.model, self.rows = model, [Prefixes((), None)] * n_slots
        self.source = torch.zeros(n_slots, dtype=torch.long, device=model.embed_tokens.weight.device)
        """The first slot with the same adapter, for each slot: kernels may read that one's row for all."""
        self.length = 0
        self.adapted: frozenset[int] = frozenset()
        self.version = 0
        """Counts how often the tensors were replaced, or more layers began to have a prefix."""
        self.k: Tensor
        self.v: Tensor
        self.strength: Tensor
        self.hidden: Tensor

    def assign(self, slots: Sequence[int], prefixes: Prefixes) -> None:
        """Give slots the prefixes of one adapter."""
        for slot in slots:
            self.rows[slot] = prefixes
        self.source.copy_(torch.tensor([self.rows.index(row) for row in self.rows]))
        if prefixes.length > self.length or not self.adapted.issuperset(prefixes.layers):
            self._enlarge(prefixes)
        elif self.adapted:
            self._write(slots, prefixes)

    def _enlarge(self, prefixes: Prefixes) -> None:
        """Replace the tensors by larger ones."""
        assert prefixes.stacked is not None
        self.length = max(self.length, prefixes.length)
        self.adapted |= frozenset(prefixes.layers)
        self.version += 1
        config, B, K = self.model.config, len(self.rows), self.length
        G, D, new = prefixes.stacked.k.shape[1], config.head_dim, prefixes.stacked.k.new_zeros
        self.k, self.v = (new(config.n_layer, B, G, K, D) for _ in range(2))
        n_head, dtype = config.n_head // self.model.n_parts, prefixes.stacked.strength.dtype
        self.strength = new(config.n_layer, B, n_head, 1, D, dtype=dtype)
        self.hidden = new(config.n_layer, B, 1, K, 1, dtype=dtype)
        for row in {id(row): row for row in self.rows}.values():
            self._write([slot for slot, other in enumerate(self.rows) if other is row], row)

    def _write(self, slots: Sequence[int], prefixes: Prefixes) -> None:
        where, state, K = torch.tensor(slots, device=self.k.device), prefixes.stacked, prefixes.length
        for x in (self.k, self.v, self.strength, self.hidden):
            x[:, where] = 0
        if state is not None:
            at = (torch.tensor(prefixes.layers, device=where.device)[:, None], where)
            self.k[(*at, slice(None), slice(K))] = state.k[:, None]
            self.v[(*at, slice(None), slice(K))] = state.v[:, None]
            self.strength[at] = state.strength[:, None].expand(-1, -1, self.strength.shape[2], 1, -1)
            self.hidden[(*at, slice(None), slice(K, None))] = -torch.inf

    def layer(self, index: int) -> PrefixState | None:
        """Return one layer's prefixes, a row for each slot; None where no slot has had one."""
        if index not in self.adapted:
            return None
        return PrefixState(self.k[index], self.v[index], self.strength[index], self.hidden[index])


class _CacheView(BaseView):
    def __init__(self, cache: KeyValueCache, rotation: KeyValue, prefix: PrefixOf) -> None:
        super().__init__(rotation)
        self.cache, self.prefix = cache, prefix

    def attend_prefix(self, attention: Any, q: Tensor, dtype: torch.dtype) -> Tensor | None:
        state = self.prefix(attention.index)
        return None if state is None else attend_prefix(q, state)


class PrefillView(_CacheView):
    """Whole prompts ``[B, T]``, padded on the right, into the slots ``slots [B]``."""

    def __init__(self, cache: KeyValueCache, rotation: KeyValue, prefix: PrefixOf, slots: Tensor) -> None:
        super().__init__(cache, rotation, prefix)
        self.slots = slots

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None) -> Tensor:
        """Keep keys and values, and attend causally within each prompt."""
        T = k.shape[2]
        self.cache.k[layer, self.slots, :, :T] = k
        self.cache.v[layer, self.slots, :, :T] = v
        return attend_causally(q, k, v, query_positions)


class DecodeView(_CacheView):
    """One new token in each of the first B slots, at ``position [B, 1]``, attending to ``used`` keys.

    ``exact``: ``used`` is the length of the longest text with its new token; otherwise it may be more.
    """

    def __init__(
        self,
        cache: KeyValueCache,
        rotation: KeyValue,
        prefix: PrefixOf,
        position: Tensor,
        used: int,
        *,
        exact: bool = True,
    ) -> None:
        super().__init__(cache, rotation, prefix)
        self.slot = torch.arange(len(position), device=position.device)
        self.position, self.used = position[:, 0], used
        seen = torch.arange(used, device=position.device) <= position  # [B, used]
        self.seen = None if exact and len(position) == 1 else seen[:, None, None, :]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None) -> Tensor:
        """Keep the new key and value, and attend to all so far."""
        keys, values = self.cache.k[layer, : len(q)], self.cache.v[layer, : len(q)]
        keys[self.slot, :, self.position] = k[:, :, 0]
        values[self.slot, :, self.position] = v[:, :, 0]
        return F.scaled_dot_product_attention(
            q, keys[:, :, : self.used], values[:, :, : self.used], attn_mask=self.seen, enable_gqa=True
        )


class ModuleDecode:
    """Reads prompts and takes decode steps by the model's own forward pass: the executor for every model.

    Args:
        model: its own prefixes, if it has any, are not used: each slot is given those of its request.
        n_slots: B.
        length: longest prompt with its answer, in tokens (S).
    """

    has_kernels = False
    """Whether its steps are kernels, each of which reads a slot's own number of keys."""

    def __init__(self, model: Llama, n_slots: int, length: int) -> None:
        self.model, self.cache = model, KeyValueCache(model, n_slots, length)
        self.device = self.cache.k.device
        self.prefixes = SlotPrefixes(model, n_slots)

    def assign(self, slots: Sequence[int], prefixes: Prefixes) -> None:
        """Give slots the prefixes of one adapter."""
        self.prefixes.assign(slots, prefixes)

    def take(self, other: Any) -> None:
        """Go on with the slots of an executor of the same class that is no larger."""
        self.cache.take(other.cache)
        rows = other.prefixes.rows
        for row in {id(row): row for row in rows}.values():
            self.assign([slot for slot, its in enumerate(rows) if its is row], row)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a request of ``length`` cached tokens from one slot to another."""
        self.cache.move(source, target, length)
        self.assign([target], self.prefixes.rows[source])

    def read(self, prompts: Sequence[Sequence[int]], slots: Sequence[int], prefixes: Prefixes) -> Tensor:
        """Read the prompts of requests with the same adapter.

        Args:
            prompts: token ids of each.
            slots: their slots.
            prefixes: of the adapter.

        Returns:
            Normed hidden states of the last tokens ``[B, C]``.
        """
        self.assign(slots, prefixes)
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        ids = ids.to(self.device)
        position = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        where = torch.tensor(slots, device=self.device)
        view = PrefillView(self.cache, self.model.rotation(position), prefixes.layer, where)
        last = torch.tensor(lengths, device=self.device) - 1
        if len(prompts) == 1:  # the last layer then computes the last position alone
            return self.model(ids, view, last)[:, 0]
        return self.model(ids, view)[torch.arange(len(prompts), device=self.device), last]

    def step(self, token: Sequence[int], position: Sequence[int]) -> Tensor:
        """Put the newest tokens of the first B slots into the cache.

        Args:
            token: of each slot ``[B]``.
            position: of these tokens ``[B]``.

        Returns:
            Logits of the next tokens ``[B, V]``.
        """
        ids, place = (torch.tensor(x, device=self.device)[:, None] for x in (token, position))
        view = DecodeView(
            self.cache, self.model.rotation(place), self.prefix(len(ids)), place, max(position) + 1
        )
        return self.model.logits(self.model(ids, view)[:, 0])

    def distinct(self, B: int) -> list[Prefixes]:
        """Return the prefixes of the first B slots, or the one that all of them share."""
        rows = self.prefixes.rows[:B]
        return rows[:1] if all(row is rows[0] for row in rows) else rows

    def prefix(self, B: int) -> PrefixOf:
        """Return the prefixes of the first B slots by layer: a row for each, unless all share one."""
        rows = self.distinct(B)
        return rows[0].layer if len(rows) == 1 else lambda layer: _first(self.prefixes.layer(layer), B)

    def captured_step(self, token: Tensor, position: Tensor, used: int) -> Tensor:
        """Do the same for all slots from ``token [B]`` and ``position [B]`` on the device.

        ``used`` may be more than the longest text has. The next call may overwrite the logits.
        """
        place = position[:, None]
        rotation, prefix = self.model.rotation(place), self.prefixes.layer
        view = DecodeView(self.cache, rotation, prefix, place, used, exact=False)
        return self.model.logits(self.model(token[:, None], view)[:, 0])


def _first(state: PrefixState | None, B: int) -> PrefixState | None:
    if state is None or state.hidden is None:
        return state
    return PrefixState(state.k[:B], state.v[:B], state.strength[:B], state.hidden[:B])
