"""Packs texts whose likelihoods are wanted, in rows that compute a shared start once.

The choices of a question continue one context, the questions of a task the same examples, and the records of
a file the same template. `groups` finds these starts in the token ids, whatever they mean; each becomes the
preamble of its group in the packed rows of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from lit_adapter.data.encode import Encoded, kinds_of_tasks
from lit_adapter.data.packing import SHORTEST_PREAMBLE, Packer
from lit_adapter.grouping import n_common
from lit_adapter.model.attention import PackedRow

ROW_TOKENS = 2048
"""A longer text has a row of its own."""


@dataclass(frozen=True)
class Scored:
    """A text whose tokens after a context are scored."""

    ids: Sequence[int]
    n_context: int
    """Tokens before the first one that is scored; 1 or more."""


@dataclass
class _Group:
    """Texts, by index, in sorted order."""

    texts: list[int]
    n_common: int
    """Tokens with which all of them begin; a text's last one is not counted."""
    n_tokens: int
    """Tokens of all texts, without the last of each, which is only predicted."""

    @property
    def n_shared(self) -> int:
        """Tokens that are computed once."""
        return self.n_common if len(self.texts) > 1 and self.n_common >= SHORTEST_PREAMBLE else 0

    @property
    def cost(self) -> int:
        """Tokens of a row that the group takes."""
        return self.n_tokens - (len(self.texts) - 1) * self.n_shared


def packed_rows(
    texts: Sequence[Scored], row_tokens: int = ROW_TOKENS
) -> Iterator[tuple[PackedRow, NDArray[np.int64]]]:
    """Yield packed rows, and for each the text, by index, that every target of the row belongs to ``[M]``."""
    if not texts:
        return
    found = groups(texts)
    variant, preambles = np.zeros(len(texts), np.int64), {}
    for number, group in enumerate(found):
        variant[group.texts] = number
        if group.n_shared:
            preambles[number] = np.array(texts[group.texts[0]].ids[: group.n_shared], np.int32)
    longest = max(len(text.ids) for text in texts)
    packer = _Packer(
        _encoded(texts, variant), preambles, mask_prompt=True, row_tokens=max(row_tokens, longest)
    )
    for row in _rows([group.texts for group in found], packer, row_tokens):
        yield packer.row(row), packer.target_records(row)


class _Packer(Packer):
    """Packs texts whose shared starts may reach into scored tokens, which then count for each text."""

    def _preamble_lengths(self) -> NDArray[np.int32]:
        lengths = [len(self.preambles.get(variant, ())) for variant in self.encoded.variant.tolist()]
        return np.array(lengths, np.int32)


def _rows(parts: list[list[int]], packer: Packer, row_tokens: int) -> Iterator[list[int]]:
    """Fill rows group by group; a group that does not fit is divided, and its start then repeated."""
    row: list[int] = []
    filled = 0
    for texts in parts:
        for place, text in enumerate(texts):
            own = int(packer.n_own[text])
            added = own + int(packer.n_preamble[text]) * (place == 0 or not row)
            if row and filled + added > row_tokens:
                yield row
                row, filled, added = [], 0, own + int(packer.n_preamble[text])
            row.append(text)
            filled += added
    yield row


def groups(texts: Sequence[Scored]) -> list[_Group]:
    """Return the groups whose shared starts save most, found greedily among neighbours in sorted order.

    Texts with the same context begin as a group. It is joined with the next one as long as a shorter common
    start of both takes fewer tokens than two starts.
    """
    ids = [tuple(text.ids) for text in texts]
    contexts = [of[: text.n_context] for of, text in zip(ids, texts, strict=True)]
    order = sorted(range(len(texts)), key=lambda i: (contexts[i], ids[i]))
    found: list[_Group] = []
    for _, members in groupby(order, key=contexts.__getitem__):
        same = list(members)
        n_common = min(_common(ids[same[0]], ids[i]) for i in same)
        new = _Group(same, n_common, sum(len(ids[i]) - 1 for i in same))
        if not found or not _join(found[-1], new, ids):
            found.append(new)
    return found


def _join(group: _Group, new: _Group, ids: list[tuple[int, ...]]) -> bool:
    """Join ``new`` to a group if that saves tokens."""
    n_common = min(group.n_common, new.n_common, _common(ids[group.texts[0]], ids[new.texts[0]]))
    n_texts, n_tokens = len(group.texts) + len(new.texts), group.n_tokens + new.n_tokens
    if n_common < SHORTEST_PREAMBLE or n_tokens - (n_texts - 1) * n_common >= group.cost + new.cost:
        return False
    group.texts += new.texts
    group.n_common, group.n_tokens = n_common, n_tokens
    return True


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Return how many tokens two texts share at their start, without the last one of either."""
    return n_common(a[:-1], b[:-1])


def _encoded(texts: Sequence[Scored], variant: NDArray[np.int64]) -> Encoded:
    length = np.array([len(text.ids) for text in texts], np.int32)
    n_context = np.array([text.n_context for text in texts], np.int32)
    return Encoded(
        ids=np.concatenate([np.array(text.ids, np.int32) for text in texts]),
        kinds=kinds_of_tasks(length, n_context),
        start=np.cumsum(length, dtype=np.int64) - length,
        length=length,
        n_prompt=n_context,
        variant=variant,
        whole=np.ones(len(texts), np.bool_),
        source_row=np.arange(len(texts), dtype=np.int32),
    )
