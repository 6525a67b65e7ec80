"""A summary of the data, printed before training starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lit_adapter.errors import counted, visible
from lit_adapter.streams import Shown

if TYPE_CHECKING:
    from lit_adapter.data.module import AlpacaDataModule

STEPS_SHOWN = 20
"""Steps over which the saving by packing is averaged."""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def describe(data: AlpacaDataModule, *, color: bool) -> list[str]:
    """Return lines about records, tokens, what was cut or dropped, packing, and one decoded example.

    With ``color`` the part that is not learned is dimmed; otherwise it is put in brackets.
    """
    encoded, records = data.train_encoded, data.train_records
    length = encoded.length
    n_targets = data.train_packer.n_targets(np.arange(len(encoded)))
    lines = [
        f"data: {records.source}: {counted(len(encoded), 'training record')}, {int(length.sum()):,} tokens "
        f"(median {int(np.median(length))}, longest {int(length.max())}), {n_targets:,} learned"
    ]
    if data.val_encoded is not None:
        n_tokens = int(data.val_encoded.length.sum())
        lines.append(f"      {counted(len(data.val_encoded), 'held-out record')}, {n_tokens:,} tokens")
    lines += [f"      {count:,} ({count / total:.1%}) {what}" for count, total, what in _notes(data) if count]
    lines.append(f"      {_packed(data)}")
    how = "dimmed" if color else "in [[ ]]"
    marks = (DIM, PLAIN) if color else ("[[", "]]")
    return [*lines, f"example ({how}: not learned)", _example(data, *marks)]


def _packed(data: AlpacaDataModule) -> str:
    packer, steps, length = data.train_packer, data.training_steps(), data.train_encoded.length
    shown = [steps.records(step) for step in range(min(STEPS_SHOWN, steps.steps_per_epoch))]
    given = sum(int(length[records].sum()) for records in shown)
    computed = sum(packer.row_length(row) for records in shown for row in packer.assign(records))
    text = f"packed without padding: {computed / given:.0%} of a step's tokens are computed"
    shared = packer.n_preamble.sum() / length.sum()
    return text + (f"; {shared:.0%} are the preamble, computed once per row" if shared else "")


def _notes(data: AlpacaDataModule) -> list[tuple[int, int, str]]:
    """Return what is worth noting: number of records, out of how many, and what happened to them."""
    train, val = data.train_records, data.val_records or ()
    n_empty = train.n_empty_output + (data.val_records.n_empty_output if data.val_records else 0)
    n_val_dropped = len(val) - len(data.val_encoded or ())
    too_long = f"left out: answer longer than data.max_length {data.config.max_length}"
    cut = "lost the start of their prompt to data.max_length"
    n_skipped = len(data.train_encoded) % data.batch_size
    skipped = (
        f"are skipped in each epoch, different ones each time: {len(data.train_encoded)} is no multiple of "
        f"optim.batch_size {data.batch_size}"
    )
    return [
        (n_empty, len(train) + len(val) + n_empty, "of all records left out: empty output"),
        (len(train) - len(data.train_encoded), len(train), f"of the training records {too_long}"),
        (data.train_encoded.n_cut, len(train), f"of the training records {cut}"),
        (n_skipped, len(data.train_encoded), f"of the training records {skipped}"),
        (train.n_duplicate, len(train), "of the training records repeat an earlier one"),
        (n_val_dropped, len(val), f"of the held-out records {too_long}"),
        (data.n_overlap, len(val), "of the held-out records are in the training set too"),
    ]


def _example(data: AlpacaDataModule, before: str, after: str) -> str:
    ids = data.train_encoded.record(0).tolist()
    n_prompt = int(data.train_encoded.n_prompt[0]) if data.config.mask_prompt else 0
    raw = [data.tokenizer.piece(token) for token in ids]
    prompt, answer = (b"".join(part).decode("utf-8", "replace") for part in (raw[:n_prompt], raw[n_prompt:]))
    prompt, answer = visible(prompt), visible(answer)
    text = f"{before}{prompt}{after}{answer}" if prompt else answer
    return Shown("\n".join(f"  | {line}" for line in text.split("\n")))
