"""Keys and values of the slots, one per request, and the executor that decodes every model with them.

Letters: B slots or pieces of prompts, T positions, S cached positions, H query heads, G key/value heads,
D head size, N layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adapter.grouping import grouped
from lit_adapter.model.attention import BaseView, KeyValue, attend_causally, sees
from lit_adapter.model.llama import Attention, Llama
from lit_adapter.model.pieces import Piece, PieceRow, common_starts
from lit_adapter.model.prefix import attend_prefix, queries_of
from lit_adapter.model.slot_prefixes import Prefixes, SlotPrefixes

LONGEST_ROW = 32_768
"""Prompt tokens read together, unless one prompt is longer: more would take memory and save no time."""


class KeyValueCache:
    """Keys and values of ``n_slots`` requests (B) of up to ``length`` tokens (S) each, prompt and answer."""

    def __init__(self, model: Llama, n_slots: int, length: int) -> None:
        config, weight = model.config, model.embed_tokens.weight
        self.n_slots, self.length = n_slots, length
        shape = (2, config.n_layer, n_slots, config.n_kv_head // model.n_shards, length, config.head_dim)
        self.both = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.k, self.v = self.both[0], self.both[1]  # each [N, B, G, S, D]

    def layer(self, index: int) -> KeyValue:
        """Return the keys and values of one layer, each ``[B, G, S, D]``."""
        return self.k[index], self.v[index]


class PromptView(BaseView):
    """Pieces of prompts, placed one after another ``[1, T]``.

    Each attends to itself and to what its slot holds of the prompt before it.
    """

    def __init__(self, decode: ModuleDecode, row: PieceRow) -> None:
        super().__init__(decode.model.rotation(row.position[None]))
        self.cache, self.row = decode.cache, row

    def attend(
        self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None
    ) -> Tensor:
        """Keep keys and values, and attend causally, or to those in the window, within each prompt."""
        found, row = [], self.row
        for piece, new, at in zip(row.pieces, row.spans, row.among(q.shape[2]), strict=True):
            length, n_queries = len(piece.prompt), at.stop - at.start
            keys, values = (x[piece.slot, :, :length] for x in self.cache.layer(attention.index))
            keys[:, piece.done :], values[:, piece.done :] = k[0, :, new], v[0, :, new]
            place = row.position[new.stop - n_queries : new.stop] if n_queries < length else None
            found.append(attend_causally(q[:, :, at], keys[None], values[None], place, attention.window))
        return torch.cat(found, 2)

    def attend_prefix(
        self, attention: Attention, rotated: Tensor, unrotated: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Attend to the prefix of each piece's adapter."""
        runs = [(of.layer(attention.index), at) for of, at in self.row.runs(rotated.shape[2])]
        if all(state is None for state, _ in runs):
            return None
        found = []
        for state, at in runs:
            q, still = rotated[:, :, at], unrotated[:, :, at]
            found.append(
                torch.zeros_like(q) if state is None else attend_prefix(queries_of(state, q, still), state)
            )
        return torch.cat(found, 2)


class DecodeView(BaseView):
    """One new token in each of the first B slots, at ``position [B, 1]``, attending to ``used`` keys.

    ``exact``: ``used`` is the length of the longest text with its new token; otherwise it may be more.
    """

    def __init__(
        self, decode: ModuleDecode, position: Tensor, prefixes: Prefixes, used: int, *, exact: bool
    ) -> None:
        super().__init__(decode.model.rotation(position))
        self.cache, self.prefixes = decode.cache, prefixes
        self.slot = torch.arange(len(position), device=position.device)
        self.position, self.used, self.exact = position[:, 0], used, exact
        self._seen: dict[int | None, Tensor | None] = {}

    def seen(self, window: int | None) -> Tensor | None:
        """Return which keys the slots see with a window ``[B, 1, 1, used]``; None if they see all."""
        if window not in self._seen:
            sees_all = self.exact and len(self.position) == 1 and (window is None or window >= self.used)
            key = torch.arange(self.used, device=self.position.device)
            query = self.position[:, None, None, None]
            self._seen[window] = None if sees_all else sees(query, key, window)
        return self._seen[window]

    def attend(
        self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None
    ) -> Tensor:
        """Keep the new key and value, and attend to all so far, or to those in the window."""
        seen = self.seen(attention.window)
        keys, values = (x[: len(q)] for x in self.cache.layer(attention.index))
        keys[self.slot, :, self.position] = k[:, :, 0]
        values[self.slot, :, self.position] = v[:, :, 0]
        return F.scaled_dot_product_attention(
            q, keys[:, :, : self.used], values[:, :, : self.used], attn_mask=seen, enable_gqa=True
        )

    def attend_prefix(
        self, attention: Attention, rotated: Tensor, unrotated: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Attend to the prefix of each slot."""
        state = self.prefixes.layer(attention.index)
        return None if state is None else attend_prefix(queries_of(state, rotated, unrotated), state)


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
        """Return one that continues with the slots of another executor, in the same memory."""
        decode = cls.__new__(cls)
        decode.model, decode.cache, decode.device = other.model, other.cache, other.device
        decode.prefixes = other.prefixes
        return decode

    def take(self, other: ModuleDecode) -> None:
        """Continue with the slots of an executor of the same class that is no larger."""
        self.cache.both[:, :, : other.cache.n_slots, :, : other.cache.length] = other.cache.both
        self.prefixes.assign(dict(enumerate(other.prefixes.rows)))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a request of ``length`` cached tokens from one slot to another."""
        both = self.cache.both
        both[:, :, target, :, :length] = both[:, :, source, :, :length]
        self.prefixes.assign({target: self.prefixes.rows[source]})

    def clear(self, slot: int) -> None:
        """Leave nothing in a slot whose request failed: NaN there would reach texts that come to it later."""
        self.cache.both[:, :, slot] = 0
        self.prefixes.assign({slot: Prefixes()})

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange two slots of up to ``length`` cached tokens."""
        for x in self.cache.both:  # one after the other: a copy takes memory
            x[:, [one, other], :, :length] = x[:, [other, one], :, :length]
        rows = self.prefixes.rows
        self.prefixes.assign({one: rows[other], other: rows[one]})

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """Read pieces of prompts into their slots; a start that prompts of one adapter share is read once.

        Returns:
            Normed hidden states of the last tokens ``[B, C]``.
        """
        self.prefixes.assign({piece.slot: piece.prefixes for piece in pieces})
        starts = common_starts(pieces)
        if not starts:
            return self._read_rows(pieces)
        self._read_rows([start for start, _ in starts])
        n_read: dict[int, int] = {}
        both = self.cache.both
        for start, group in starts:
            n, slots = len(start.prompt), [piece.slot for piece in group]
            n_read |= dict.fromkeys(slots, n)
            both[:, :, slots, :, :n] = both[:, :, start.slot, None, :, :n]
        return self._read_rows([replace(p, done=n_read.get(p.slot, p.done)) for p in pieces])

    def _read_rows(self, pieces: Sequence[Piece]) -> Tensor:
        rows = grouped(pieces, self._length_in_row, LONGEST_ROW)
        return torch.cat([self._read_row(PieceRow(row, self.device)) for row in rows])

    def _length_in_row(self, piece: Piece) -> int:
        """Return how many tokens of a row a piece takes."""
        return piece.n_new

    def _read_row(self, row: PieceRow) -> Tensor:
        """Read one row; return the hidden states of its last tokens ``[B, C]``."""
        return self.prefixes.reader(row)(row.ids[None], PromptView(self, row), row.last)[0]

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

    def capture_reads(self) -> None:
        """Capture what reads short prompts, if this executor does so by graphs; slot 0 must be free."""

    def prepare(self, n: int) -> None:
        """Allocate what `captured_step` uses for the first ``n`` slots; called before a capture."""

    def captured_step(self, token: Tensor, position: Tensor, used: int) -> Tensor:
        """Do the same for the first B slots from ``token [B]`` and ``position [B]`` on the device.

        ``used`` may be more than the longest text has. A slot whose position is the cache's last place has no
        text; what is computed for it means nothing. The next call may overwrite the logits.
        """
        view = DecodeView(self, position[:, None], self.prefixes.joined_of(len(token)), used, exact=False)
        return self.model.logits(self.prefixes.stepper(token[:, None], view)[:, 0])
