"""The pieces of prompts that are read together, placed one after another in one row.

A piece is a whole prompt, or some tokens of one whose earlier tokens its slot holds. Pieces of a row may have
different adapters.

Letters: B pieces, T tokens of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch

from lit_adapter.grouping import n_common
from lit_adapter.model.attention import PackedRow, moved
from lit_adapter.model.slot_prefixes import Prefixes

LEAST_SAVED = 64
"""Tokens, of all prompts that are read together, below which their common start is read with each of them."""

SHORT_READ = 256
"""Most tokens of prompts that CUDA reads by a captured graph: to launch kernels one by one would take the
host longer than the device needs for these."""


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of one prompt that is read."""

    prompt: Sequence[int]
    """Its token ids, up to the end of this piece."""
    slot: int
    prefixes: Prefixes
    """The prefixes of its adapter."""
    done: int = 0
    """How many of the tokens the slot holds already."""

    @property
    def n_new(self) -> int:
        """Number of tokens that are read."""
        return len(self.prompt) - self.done


class PieceRow:
    """The tokens of some pieces in one row, as tensors on a device.

    Args:
        pieces: B of them, in different slots.
        device: of the tensors.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        self.pieces = pieces
        n_new = [piece.n_new for piece in pieces]
        ends = list(accumulate(n_new))
        self.spans = [slice(end - n, end) for end, n in zip(ends, n_new, strict=True)]
        """The tokens of each piece within the row."""
        segment = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor(n_new))
        ids = torch.tensor([token for piece in pieces for token in piece.prompt[piece.done :]])
        position = torch.cat([torch.arange(piece.done, len(piece.prompt)) for piece in pieces])
        slot, last = torch.tensor([piece.slot for piece in pieces])[segment], torch.tensor(ends) - 1
        self.on_host = PackedRow(ids, position, segment, segment, last, last)
        """The same in the host's memory; the targets are the last tokens."""
        T = len(ids)
        parts = moved(torch.cat((ids, position, slot, last)), device).split([T, T, T, len(pieces)])
        self.ids, self.position, self.slot, self.last = parts
        """Of each token its id, position and slot ``[T]``; and the last token of each piece ``[B]``."""

    def among(self, n: int) -> list[slice]:
        """Return where the pieces are among ``n`` tokens: the whole row, or the last token of each piece."""
        return self.spans if n == self.spans[-1].stop else [slice(at, at + 1) for at in range(n)]

    def runs(self, n: int) -> list[tuple[Prefixes, slice]]:
        """Return where neighbouring pieces with the same adapter are among ``n`` tokens; see `among`."""
        pairs = groupby(zip(self.pieces, self.among(n), strict=True), lambda pair: pair[0].prefixes)
        spans = [(prefixes, [span for _, span in group]) for prefixes, group in pairs]
        return [(prefixes, slice(some[0].start, some[-1].stop)) for prefixes, some in spans]


def common_starts(pieces: Sequence[Piece]) -> list[tuple[Piece, list[Piece]]]:
    """Return the starts that prompts of one adapter have in common, each with the pieces that begin with it.

    Starts that would save little are left out. At least one token of each piece is left to read after the
    start.
    """
    groups: dict[Prefixes, list[Piece]] = {}
    for piece in pieces:
        if not piece.done:
            groups.setdefault(piece.prefixes, []).append(piece)
    found = []
    for group in groups.values():
        first = group[0]
        n = min(n_common(first.prompt, piece.prompt[:-1]) for piece in group)
        if n * (len(group) - 1) >= LEAST_SAVED:
            found.append((replace(first, prompt=first.prompt[:n]), group))
    return found
