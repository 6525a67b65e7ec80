"""The projected prefixes of an adapter as a value, and those of all slots side by side.

Letters: B slots, H query heads, G key/value heads, D head size, K prompt length, L adapted layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from lit_adapter.model.attention import moved
from lit_adapter.model.llama import Llama
from lit_adapter.model.norms import Norms, SlotNorms
from lit_adapter.model.prefix import PrefixState

if TYPE_CHECKING:
    from lit_adapter.model.pieces import PieceRow


@dataclass(frozen=True, eq=False)
class Prefixes:
    """The projected prefixes of one adapter, or of several slots."""

    layers: tuple[int, ...] = ()
    """Indices of the adapted layers: the top ones."""
    stacked: PrefixState | None = None
    """The states of these layers, all tensors ``[L, ...]``; None without a prefix."""
    norms: Norms | None = None
    """The norms that the adapter trains, if the executor's model has others; or those of all slots."""

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

    @property
    def form(self) -> tuple[Hashable, ...]:
        """What slots must fit: adapted layers, sizes, whether queries are unrotated, and norms."""
        state = self.stacked
        of_state = () if state is None else (state.k.shape, state.strength.shape, state.unrotated)
        return (self.norms is not None, self.layers, *of_state)

    def layer(self, index: int) -> PrefixState | None:
        """Return one layer's prefix."""
        return _indexed(self.stacked, self.layers.index(index)) if index in self.layers else None


def _indexed(state: PrefixState | None, at: Any) -> PrefixState | None:
    if state is None:
        return None
    return PrefixState(**{name: x[at] if isinstance(x, Tensor) else x for name, x in vars(state).items()})


Form: TypeAlias = tuple[tuple[int, ...], int, bool, bool]


class SlotPrefixes:
    """The prefixes of every slot, in tensors that are replaced only when an adapter does not fit them.

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
        """Those of all slots, with tensors ``[L, B, ...]``; a new object when the tensors are replaced."""
        self.form: Form = ((), 0, False, False)
        """The tensors' adapted layers and K, whether a strength of theirs differs by prompt token, and
        whether unrotated queries attend to one of them."""

    def assign(self, given: Mapping[int, Prefixes]) -> None:
        """Give slots the prefixes of adapters; nothing is written to one that has them already."""
        new = {slot: prefixes for slot, prefixes in given.items() if self.rows[slot] is not prefixes}
        if not new:
            return
        for slot in new:
            self.rows[slot] = Prefixes()  # nobody's, until all of it is written
        joined, form = self._room_for(new.values())
        changed = new if form == self.form else dict(enumerate(self.rows)) | new
        slots_of: dict[Hashable, list[int]] = {}
        for slot, prefixes in changed.items():
            slots_of.setdefault(prefixes.form, []).append(slot)
        for slots in slots_of.values():  # a write for each adapter would be many launches
            where = moved(torch.tensor(slots), self.source.device)
            self._write(joined, where, [changed[slot] for slot in slots])
        self.joined, self.form = joined, form  # only now: an error before leaves the other slots as they were
        for slot, prefixes in new.items():
            self.rows[slot] = prefixes
        source = torch.tensor([self.rows.index(row) for row in self.rows])
        self.source.copy_(moved(source, self.source.device))

    def _room_for(self, new: Iterable[Prefixes]) -> tuple[Prefixes, Form]:
        """Return tensors that fit the new prefixes too, the current ones or new zeros, and their form."""
        new = list(new)
        if self.norms is None and any(prefixes.norms is not None for prefixes in new):
            self.norms = SlotNorms(self.model, len(self.rows))
            self.joined = replace(self.joined, norms=self.norms.rows)
        states = [of.stacked for of in (self.joined, *new) if of.stacked is not None]
        if not states:
            return self.joined, self.form
        layers = max((of.layers for of in (self.joined, *new)), key=len)
        K = max(state.k.shape[-2] for state in states)
        by_token = any(_differs_by_token(state) for state in states)
        unrotated = any(state.unrotated is not False for state in states)
        form = (layers, K, by_token, unrotated)
        if self.form == form:
            return self.joined, form
        some, L, B, H = states[0], len(layers), len(self.rows), self.n_head
        G, D = some.k.shape[-3], some.k.shape[-1]
        zeros = some.strength.new_zeros
        joined = PrefixState(
            k=some.k.new_zeros(L, B, G, K, D),
            v=some.v.new_zeros(L, B, G, K, D),
            strength=zeros(L, B, H, 1, D),
            unrotated=zeros(L, B, 1, 1, 1).bool() if unrotated else False,
            by_token=zeros(L, B, H, K, 1) if by_token else None,
            hidden=zeros(L, B, 1, K, 1),
        )
        return Prefixes(layers, joined, self.joined.norms), form

    def _write(self, joined: Prefixes, where: Tensor, given: Sequence[Prefixes]) -> None:
        """Give the slots ``where`` prefixes of one form."""
        if self.norms is not None:
            self.norms.put(where, [prefixes.norms for prefixes in given])
        own, some, K = joined.stacked, given[0], given[0].length
        if own is None:
            return
        assert own.hidden is not None
        for x in vars(own).values():
            if isinstance(x, Tensor):
                x[:, where] = 0
        if some.stacked is None:
            return
        top = slice(len(joined.layers) - len(some.layers), None)
        k, v, strength = (
            torch.stack([getattr(prefixes.stacked, name) for prefixes in given], 1)  # [L, n, ...]
            for name in ("k", "v", "strength")
        )
        own.k[top, where, :, :K], own.v[top, where, :, :K] = k, v
        own.hidden[top, where, :, K:] = -torch.inf
        one = strength.new_ones(())
        by_channel, by_token = (one, strength) if _differs_by_token(some.stacked) else (strength, one)
        own.strength[top, where] = by_channel
        if own.by_token is not None:
            own.by_token[top, where, :, :K] = by_token
        if isinstance(own.unrotated, Tensor):
            own.unrotated[top, where] = some.stacked.unrotated

    @property
    def stepper(self) -> Llama:
        """The model with the norms of every slot, as steps need it."""
        return self.model if self.norms is None else self.norms.stepper

    def reader(self, row: PieceRow) -> Llama:
        """Return the model with the norms that the tokens of a row have, until the next call."""
        given = {self.rows[piece.slot].norms for piece in row.pieces}
        if self.norms is None or given == {None}:
            return self.model
        some = row.pieces[0].slot
        self.norms.reading.set(*((row.slot, row.slot[row.last]) if len(given) > 1 else (some, some)))
        return self.norms.reader

    def first(self, B: int) -> Prefixes:
        """Return the prefixes of the first B slots: a row for each, or the adapter that all of them share."""
        if all(row is self.rows[0] for row in self.rows[:B]):
            return self.rows[0]
        return self.joined_of(B)

    def joined_of(self, B: int) -> Prefixes:
        """Return `joined` for the first B slots."""
        return replace(self.joined, stacked=_indexed(self.joined.stacked, (slice(None), slice(B))))


def _differs_by_token(state: PrefixState) -> bool:
    return state.by_token is not None or state.strength.shape[-2] > 1
