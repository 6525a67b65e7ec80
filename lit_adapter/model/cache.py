"""Keys and values while decoding: allocated once, to the need; prefixes projected once.

A cache has one slot per text. Texts of unequal length share a forward pass: prompts are padded on the
right, and what padding wrote is overwritten before any later position could see it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adapter.model.attention import BaseView, KeyValue, attend_causally
from lit_adapter.model.llama import Llama
from lit_adapter.model.prefix import PrefixState, attend_prefix


class KeyValueCache:
    """Room for ``n_slots`` texts of up to ``length`` tokens.

    Args:
        model: whose keys and values are kept; its prefixes are projected once, so a changed adapter
            needs a new cache (a model with decode weights never changes).
        n_slots: texts decoded together (B).
        length: longest text with its answer, in tokens (S).
    """

    def __init__(self, model: Llama, n_slots: int, length: int) -> None:
        config, weight = model.config, model.embed_tokens.weight
        self.n_slots, self.length = n_slots, length
        shape = (config.n_layer, n_slots, config.n_kv_head // model.n_parts, length, config.head_dim)
        self.k = torch.zeros(shape, dtype=weight.dtype, device=weight.device)  # [N, B, G, S, D]
        self.v = torch.zeros_like(self.k)
        self.model = model

    @cached_property
    def prefix(self) -> list[PrefixState | None]:
        """Each layer's projected prefix, or None."""
        if self.model.decode_weights is not None:
            return self.model.decode_weights.prefix
        with torch.no_grad():
            return self.model.project_prefixes(self.k.dtype)


class _CacheView(BaseView):
    def __init__(self, cache: KeyValueCache, rotation: KeyValue) -> None:
        super().__init__(rotation)
        self.cache, self.prefix = cache, cache.prefix

    def attend_prefix(self, attention: Any, q: Tensor, dtype: torch.dtype) -> Tensor | None:
        state = self.prefix[attention.index]
        return None if state is None or attention.prefix is None else attend_prefix(q, state)


class PrefillView(_CacheView):
    """Whole prompts ``[B, T]``, padded on the right, into the slots ``slots [B]``."""

    def __init__(self, cache: KeyValueCache, rotation: KeyValue, slots: Tensor) -> None:
        super().__init__(cache, rotation)
        self.slots = slots

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None) -> Tensor:
        """Keep keys and values, attend causally among the prompt's own."""
        T = k.shape[2]
        self.cache.k[layer, self.slots, :, :T] = k
        self.cache.v[layer, self.slots, :, :T] = v
        return attend_causally(q, k, v, query_positions)


class DecodeView(_CacheView):
    """One new token in every slot, at ``position [B, 1]``; keys up to ``used`` are looked at.

    ``exact`` says that ``used`` is the longest text's length with its new token; more is allowed without.
    """

    def __init__(
        self, cache: KeyValueCache, rotation: KeyValue, position: Tensor, used: int, *, exact: bool = True
    ) -> None:
        super().__init__(cache, rotation)
        self.slot = torch.arange(cache.n_slots, device=position.device)
        self.position, self.used = position[:, 0], used
        seen = torch.arange(used, device=position.device) <= position  # [B, used]
        self.seen = None if exact and cache.n_slots == 1 else seen[:, None, None, :]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None) -> Tensor:
        """Keep the new key and value, attend to all so far."""
        keys, values = self.cache.k[layer], self.cache.v[layer]
        keys[self.slot, :, self.position] = k[:, :, 0]
        values[self.slot, :, self.position] = v[:, :, 0]
        return F.scaled_dot_product_attention(
            q, keys[:, :, : self.used], values[:, :, : self.used], attn_mask=self.seen, enable_gqa=True
        )
