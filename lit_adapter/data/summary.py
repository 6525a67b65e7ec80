"""What the data turned out to be, said before training starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lit_adapter.errors import counted

if TYPE_CHECKING:
    from lit_adapter.data.module import AlpacaDataModule

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def describe(data: AlpacaDataModule, *, color: bool) -> list[str]:
    """Return rows, tokens, shares cut and dropped, what packing saves, and one decoded example.

    Args:
        data: what was read and encoded.
        color: whether the part that is not learned can be dimmed; else it stands in brackets.
    """
    encoded, records = data.train_encoded, data.train_records
    length = encoded.length
    n_targets = data.train_packer.n_targets(np.arange(len(encoded)))
    lines = [
        f"data: {records.source}: {counted(len(encoded), 'training record')}, {int(length.sum()):,} tokens "
        f"(median {int(np.median(length))}, longest {int(length.max())}), {n_targets:,} learned",
    ]
    if data.val_encoded is not None:
        n_tokens = int(data.val_encoded.length.sum())
        lines.append(f"      {counted(len(data.val_encoded), 'held-out record')}, {n_tokens:,} tokens")
    notes = [
        (records.n_empty_output, "left out: empty output"),
        (int(encoded.n_dropped[0]), f"left out: answer longer than data.max_length {data.config.max_length}"),
        (encoded.n_cut, "lost the start of their prompt to data.max_length"),
        (records.n_duplicate, "repeat an earlier record"),
        (data.n_overlap, "held-out records are in the training set too"),
    ]
    total = len(records)
    lines += [f"      {count:,} ({count / total:.1%}) {what}" for count, what in notes if count]
    saved = int(data.train_packer.n_head.sum())
    if saved:
        lines.append(
            f"      {saved / length.sum():.0%} of the tokens are a shared start: computed once a row"
        )
    how = "dimmed" if color else "in [[ ]]"
    return [
        *lines,
        f"example ({how}: not learned)",
        _example(data, *((DIM, PLAIN) if color else ("[[", "]]"))),
    ]


def _example(data: AlpacaDataModule, before: str, after: str) -> str:
    """Decode the first record, its masked part between two marks."""
    ids = data.train_encoded.record(0).tolist()
    n_prompt = int(data.train_encoded.n_prompt[0]) if data.config.mask_prompt else 0
    raw = [data.tokenizer.piece(token) for token in ids]
    prompt, answer = (b"".join(part).decode("utf-8", "replace") for part in (raw[:n_prompt], raw[n_prompt:]))
    text = f"{before}{prompt}{after}{answer}" if prompt else answer
    return "\n".join(f"  | {line}" for line in text.split("\n"))
