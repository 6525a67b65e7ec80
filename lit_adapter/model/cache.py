"""Keys and values while decoding, and the prefixes of the slots they are kept in.

A cache has one slot per request, and a slot has its own adapter. Prompts of unequal length share a forward
pass: they are padded on the right, and what padding wrote is overwritten before any later position sees it.

Letters: B slots, T positions, S cached positions, H query heads, G key/value heads, D head size, K prompt
length, N layers, L adapted layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_adapter.grouping import n_common
from lit_adapter.model.attention import BaseView, attend_causally, sees
from lit_adapter.model.llama import Attention, Llama
from lit_adapter.model.norms import Norms, SlotNorms
from lit_adapter.model.prefix import PrefixState, attend_prefix, queries_of

LEAST_SAVED = 64
"""Tokens, of all prompts that are read together, below which their common start is read with each of them."""


class KeyValueCache:
    """Keys and values of ``n_slots`` requests (B) of up to ``length`` tokens (S) each, prompt and answer."""

    def __init__(self, model: Llama, n_slots: int, length: int) -> None:
        config, weight = model.config, model.embed_tokens.weight
        self.n_slots, self.length = n_slots, length
        shape = (config.n_layer, n_slots, config.n_kv_head // model.n_shards, length, config.head_dim)
        self.k = torch.zeros(shape, dtype=weight.dtype, device=weight.device)  # [N, B, G, S, D]
        self.v = torch.zeros_like(self.k)


@dataclass(frozen=True, eq=False)
class Prefixes:
    """The projected prefixes of one adapter, or of several slots."""

    layers: tuple[int, ...] = ()
    """Indices of the adapted layers."""
    stacked: PrefixState | None = None
    """The states of these layers, all tensors ``[L, ...]``; None without a prefix."""
    norms: Norms | None = None
    """The norms that the adapter trains beside them, if those are not the executor's model's; or those of all
    slots."""

    @classmethod
    def of(cls, states: Sequence[PrefixState | None]) -> Prefixes:
        """Stack the states of all layers, None for a layer without a prefix."""
        found = {layer: state for layer, state in enumerate(states) if state is not None}
        if not found:
            return cls()
        k, v, strength = (
            torch.stack([getattr(state, name) for state in found.values()]) for name in ("k", "v", "strength")
        )
        some = next(iter(found.values()))
        return cls(tuple(found), PrefixState(k, v, strength, some.unrotated))

    @property
    def length(self) -> int:
        """K; 0 without a prefix."""
        return 0 if self.stacked is None else self.stacked.k.shape[-2]

    def layer(self, index: int) -> PrefixState | None:
        """Return one layer's prefix."""
        return _indexed(self.stacked, self.layers.index(index)) if index in self.layers else None


def _indexed(state: PrefixState | None, at: Any) -> PrefixState | None:
    if state is None:
        return None
    return PrefixState(**{name: x[at] if isinstance(x, Tensor) else x for name, x in vars(state).items()})


class SlotPrefixes:
    """The prefixes of every slot, in tensors that stay where they are until an adapter does not fit them.

    A slot without a prefix has keys, values and strengths of 0, which add nothing. From the first adapter
    with norms on, every slot has norms of its own.
    """

    norms: SlotNorms | None = None
    """None while all slots have the model's."""

    def __init__(self, model: Llama, n_slots: int) -> None:
        self.model = model
        self.n_head = model.config.n_head // model.n_shards
        self.rows = [Prefixes()] * n_slots
        self.source = torch.zeros(n_slots, dtype=torch.long, device=model.embed_tokens.weight.device)
        """The first slot with the same adapter, for each slot: kernels may read that one's row for all."""
        self.joined = Prefixes()
        """Of all slots, with tensors ``[L, B, ...]``; another object once the tensors are replaced."""
        self.form: tuple[tuple[int, ...], int, bool, bool] = ((), 0, False, False)
        """The tensors' adapted layers and K, whether a strength of theirs differs by prompt token, and
        whether unrotated queries attend to one of them."""

    def assign(self, slots: Sequence[int], prefixes: Prefixes) -> None:
        """Give slots the prefixes of one adapter."""
        for slot in slots:
            self.rows[slot] = prefixes
        self.source.copy_(torch.tensor([self.rows.index(row) for row in self.rows]))
        self._assign_norms(slots, prefixes.norms)
        states = [state for state in (self.joined.stacked, prefixes.stacked) if state is not None]
        if not states:
            return
        layers = tuple(sorted({*self.joined.layers, *prefixes.layers}))
        K = max(state.k.shape[-2] for state in states)
        by_token = any(_differs_by_token(state) for state in states)
        unrotated = any(state.unrotated is not False for state in states)
        if self.form == (layers, K, by_token, unrotated):
            self._write(slots, prefixes)
            return
        self.form = (layers, K, by_token, unrotated)
        some, L, B, H = states[0], len(layers), len(self.rows), self.n_head
        G, D = some.k.shape[-3], some.k.shape[-1]
        new = some.strength.new_zeros
        joined = PrefixState(
            k=some.k.new_zeros(L, B, G, K, D),
            v=some.v.new_zeros(L, B, G, K, D),
            strength=new(L, B, H, 1, D),
            unrotated=new(L, B, 1, 1, 1).bool() if unrotated else False,
            by_token=new(L, B, H, K, 1) if by_token else None,
            hidden=new(L, B, 1, K, 1),
        )
        self.joined = Prefixes(layers, joined, self.joined.norms)
        for row in set(self.rows):
            self._write([slot for slot, other in enumerate(self.rows) if other is row], row)

    def _assign_norms(self, slots: Sequence[int], norms: Norms | None) -> None:
        if norms is not None and self.norms is None:
            self.norms, self.reading = SlotNorms(self.model, len(self.rows)), SlotNorms(self.model, 1)
            self.joined = replace(self.joined, norms=self.norms.rows)
        if self.norms is not None:
            self.norms.put(slots, norms)

    @property
    def stepper(self) -> Llama:
        """The model with the norms of every slot, as steps need it."""
        return self.model if self.norms is None else self.norms.model

    def reader(self, slot: int) -> Llama:
        """Return the model with the norms of one slot, until the next call."""
        if self.norms is None or self.rows[slot].norms is None:
            return self.model
        self.reading.put([0], self.norms.at(slot))
        return self.reading.model

    def _write(self, slots: Sequence[int], prefixes: Prefixes) -> None:
        own, new, K = self.joined.stacked, prefixes.stacked, prefixes.length
        assert own is not None
        assert own.hidden is not None
        where = torch.tensor(slots, device=own.k.device)
        for x in vars(own).values():
            if isinstance(x, Tensor):
                x[:, where] = 0
        if new is not None:
            layers = [self.joined.layers.index(layer) for layer in prefixes.layers]
            at = (torch.tensor(layers, device=where.device)[:, None], where)
            own.k[..., :K, :][at], own.v[..., :K, :][at] = new.k[:, None], new.v[:, None]
            own.hidden[..., K:, :][at] = -torch.inf
            one = new.strength.new_ones(())
            by_channel, by_token = (
                (one, new.strength[:, None]) if _differs_by_token(new) else (new.strength[:, None], one)
            )
            own.strength[at] = by_channel
            if own.by_token is not None:
                own.by_token[..., :K, :][at] = by_token
            if isinstance(own.unrotated, Tensor):
                own.unrotated[at] = new.unrotated

    def first(self, B: int) -> Prefixes:
        """Return the prefixes of the first B slots: a row for each, or the adapter that all of them share."""
        if all(row is self.rows[0] for row in self.rows[:B]):
            return self.rows[0]
        first = _indexed(self.joined.stacked, (slice(None), slice(B)))
        return replace(self.joined, stacked=first)


def _differs_by_token(state: PrefixState) -> bool:
    return state.by_token is not None or state.strength.shape[-2] > 1


class _CacheView(BaseView):
    def __init__(self, decode: ModuleDecode, position: Tensor, prefixes: Prefixes) -> None:
        super().__init__(decode.model.rotation(position))
        self.cache, self.prefixes = decode.cache, prefixes

    def attend_prefix(
        self, attention: Any, rotated: Tensor, unrotated: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        state = self.prefixes.layer(attention.index)
        return None if state is None else attend_prefix(queries_of(state, rotated, unrotated), state)


class PrefillView(_CacheView):
    """Whole prompts ``[B, T]``, padded on the right, into the slots ``slots [B]``."""

    def __init__(self, decode: ModuleDecode, position: Tensor, prefixes: Prefixes, slots: Tensor) -> None:
        super().__init__(decode, position, prefixes)
        self.slots = slots

    def attend(
        self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None
    ) -> Tensor:
        """Keep keys and values, and attend causally within each prompt."""
        T, layer = k.shape[2], attention.index
        self.cache.k[layer, self.slots, :, :T] = k
        self.cache.v[layer, self.slots, :, :T] = v
        return attend_causally(q, k, v, query_positions, attention.window)


class RestView(_CacheView):
    """The rests of prompts at one ``position [B, T]``, whose earlier tokens the slots ``slots [B]`` hold.

    They are padded on the right.
    """

    def __init__(self, decode: ModuleDecode, position: Tensor, prefixes: Prefixes, slots: Tensor) -> None:
        super().__init__(decode, position, prefixes)
        self.slots, self.position = slots, position[0]
        self.start, self.end = int(position[0, 0]), int(position[0, -1]) + 1

    def attend(
        self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None
    ) -> Tensor:
        """Keep keys and values, and attend to all up to each token, or to those in the window."""
        layer = attention.index
        self.cache.k[layer, self.slots, :, self.start : self.end] = k
        self.cache.v[layer, self.slots, :, self.start : self.end] = v
        keys, values = (x[layer, self.slots, :, : self.end] for x in (self.cache.k, self.cache.v))
        place = self.position if query_positions is None else self.position[query_positions]
        seen = sees(place[:, None], torch.arange(self.end, device=place.device), attention.window)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)


class DecodeView(_CacheView):
    """One new token in each of the first B slots, at ``position [B, 1]``, attending to ``used`` keys.

    ``exact``: ``used`` is the length of the longest text with its new token; otherwise it may be more.
    """

    def __init__(
        self, decode: ModuleDecode, position: Tensor, prefixes: Prefixes, used: int, *, exact: bool
    ) -> None:
        super().__init__(decode, position, prefixes)
        self.slot = torch.arange(len(position), device=position.device)
        self.position, self.used, self.exact = position[:, 0], used, exact
        self._seen: dict[int | None, Tensor | None] = {}

    def seen(self, window: int | None) -> Tensor | None:
        """Return which keys the slots see with a window ``[B, 1, 1, used]``; None if they see all."""
        if window not in self._seen:
            sees_all = self.exact and len(self.position) == 1 and (window is None or window >= self.used)
            place = torch.arange(self.used, device=self.position.device)
            seen = sees(self.position[:, None], place, window)[:, None, None, :]
            self._seen[window] = None if sees_all else seen
        return self._seen[window]

    def attend(
        self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None
    ) -> Tensor:
        """Keep the new key and value, and attend to all so far, or to those in the window."""
        layer, seen = attention.index, self.seen(attention.window)
        keys, values = self.cache.k[layer, : len(q)], self.cache.v[layer, : len(q)]
        keys[self.slot, :, self.position] = k[:, :, 0]
        values[self.slot, :, self.position] = v[:, :, 0]
        return F.scaled_dot_product_attention(
            q, keys[:, :, : self.used], values[:, :, : self.used], attn_mask=seen, enable_gqa=True
        )


class ModuleDecode:
    """Reads prompts and takes decode steps by the model's own forward pass: the executor for every model.

    Args:
        model: its own prefixes, if it has any, are not used: each slot is given those of its request.
        n_slots: B.
        length: longest prompt with its answer, in tokens (S).
    """

    def __init__(self, model: Llama, n_slots: int, length: int) -> None:
        self.model, self.cache = model, KeyValueCache(model, n_slots, length)
        self.device = self.cache.k.device
        self.prefixes = SlotPrefixes(model, n_slots)

    @classmethod
    def in_place_of(cls, other: ModuleDecode) -> ModuleDecode:
        """Return one that goes on with the slots of another executor, in the same memory."""
        decode = cls.__new__(cls)
        decode.model, decode.cache, decode.device = other.model, other.cache, other.device
        decode.prefixes = other.prefixes
        return decode

    def take(self, other: Any) -> None:
        """Go on with the slots of an executor of the same class that is no larger."""
        for own, old in ((self.cache.k, other.cache.k), (self.cache.v, other.cache.v)):
            own[:, : other.cache.n_slots, :, : other.cache.length] = old
        for slot, row in enumerate(other.prefixes.rows):
            self.prefixes.assign([slot], row)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a request of ``length`` cached tokens from one slot to another."""
        for x in (self.cache.k, self.cache.v):
            x[:, target, :, :length] = x[:, source, :, :length]
        self.prefixes.assign([target], self.prefixes.rows[source])

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange two slots of up to ``length`` cached tokens."""
        for x in (self.cache.k, self.cache.v):
            x[:, [one, other], :, :length] = x[:, [other, one], :, :length]
        rows = self.prefixes.rows
        first, second = rows[one], rows[other]
        self.prefixes.assign([one], second)
        self.prefixes.assign([other], first)

    def go_on(self, prompt: Sequence[int], done: int, slot: int, prefixes: Prefixes) -> Tensor:
        """Read the rest of a prompt whose first ``done`` tokens are in its slot.

        Returns:
            The normed hidden state of its last token ``[1, C]``.
        """
        self.prefixes.assign([slot], prefixes)
        return self._read_from(done, [prompt], [slot], prefixes)

    def read(self, prompts: Sequence[Sequence[int]], slots: Sequence[int], prefixes: Prefixes) -> Tensor:
        """Read the prompts of requests with the same adapter, and their common start once.

        Args:
            prompts: token ids of each.
            slots: their slots.
            prefixes: of the adapter.

        Returns:
            Normed hidden states of the last tokens ``[B, C]``.
        """
        self.prefixes.assign(slots, prefixes)
        n = min(n_common(prompts[0], prompt[:-1]) for prompt in prompts)
        if n * (len(prompts) - 1) < LEAST_SAVED:
            return self._read_from(0, prompts, slots, prefixes)
        self._read_from(0, [prompts[0][:n]], slots[:1], prefixes)
        for x in (self.cache.k, self.cache.v):
            x[:, list(slots[1:]), :, :n] = x[:, slots[:1], :, :n]
        return self._read_from(n, prompts, slots, prefixes)

    def _read_from(
        self, n: int, prompts: Sequence[Sequence[int]], slots: Sequence[int], prefixes: Prefixes
    ) -> Tensor:
        """Read prompts whose first ``n`` tokens are in their slots; return last hidden states ``[B, C]``."""
        rests = [torch.tensor(prompt[n:]) for prompt in prompts]
        ids = pad_sequence(rests, batch_first=True).to(self.device)
        position = torch.arange(n, n + ids.shape[1], device=self.device).expand_as(ids)
        where = torch.tensor(slots, device=self.device)
        view = (RestView if n else PrefillView)(self, position, prefixes, where)
        model = self.prefixes.reader(slots[0])
        last = torch.tensor([len(rest) - 1 for rest in rests], device=self.device)
        if len(prompts) == 1:  # the last layer then computes the last position alone
            return model(ids, view, last)[:, 0]
        return model(ids, view)[torch.arange(len(prompts), device=self.device), last]

    def step(self, token: Sequence[int], position: Sequence[int]) -> Tensor:
        """Put the newest tokens of the first B slots into the cache.

        Args:
            token: of each slot ``[B]``.
            position: of these tokens ``[B]``.

        Returns:
            Logits of the next tokens ``[B, V]``.
        """
        ids, place = (torch.tensor(x, device=self.device)[:, None] for x in (token, position))
        view = DecodeView(self, place, self.prefixes.first(len(ids)), max(position) + 1, exact=True)
        return self.model.logits(self.prefixes.stepper(ids, view)[:, 0])

    def captured_step(self, token: Tensor, position: Tensor, used: int) -> Tensor:
        """Do the same for all slots from ``token [B]`` and ``position [B]`` on the device.

        ``used`` may be more than the longest text has. The next call may overwrite the logits.
        """
        view = DecodeView(self, position[:, None], self.prefixes.joined, used, exact=False)
        return self.model.logits(self.prefixes.stepper(token[:, None], view)[:, 0])
