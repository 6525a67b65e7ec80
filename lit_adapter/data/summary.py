"""A summary of the data, printed before training starts."""

from __future__ import annotations

import re
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from lit_adapter.data.record import Conversation
from lit_adapter.data.records import Records
from lit_adapter.data.sources import as_names, title
from lit_adapter.errors import counted, shorten, visible
from lit_adapter.streams import Shown
from lit_adapter.text.conversation import ANSWER, CONTEXT
from lit_adapter.text.tokenizer import CONTROL_SPELLING, Tokenizer

if TYPE_CHECKING:
    from lit_adapter.data.module import AlpacaDataModule

LOOKED_AT = 1000
"""Conversations that are compared with the template."""
_IDS = ("name", "tool_call_id", "id")
STEPS_SHOWN = 20
"""Steps over which the saving by packing is averaged."""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
REVERSE, NOT_REVERSE = "\x1b[7m", "\x1b[27m"
LOOK_ALIKE = re.compile(rf"{CONTROL_SPELLING.pattern}|</?s>")
"""Spellings of control tokens in templates of known bases."""


def describe(data: AlpacaDataModule, *, color: bool, n_shares: int = 1) -> list[str]:
    """Return lines about records, tokens, what was cut or dropped, packing, and one decoded example.

    With ``color`` the part that is not learned is dimmed, and control tokens are in reverse video; otherwise
    they are put in brackets and braces. A step's rows are divided into ``n_shares``, one for each process.
    """
    encoded, records = data.train_encoded, data.train_records
    length = encoded.length
    n_targets = data.train_packer.n_targets(np.arange(len(encoded)))
    lines = [
        f"data: {records.source}: {counted(encoded.n_read, 'training record')}, {int(length.sum()):,} tokens "
        f"(median {int(np.median(length))}, longest {int(length.max())}), {n_targets:,} learned"
    ]
    lines += [f"      {line}" for line in (*_formats(data), *_template(data), *_weights(data))]
    if data.val_encoded is not None:
        n_tokens = int(data.val_encoded.length.sum())
        lines.append(f"      {counted(data.val_encoded.n_read, 'held-out record')}, {n_tokens:,} tokens")
    lines += [f"      {count:,} ({count / total:.1%}) {what}" for count, total, what in _notes(data) if count]
    lines += [f"      {line}" for line in (*data.remarks, *_look_alikes(data), *_not_shown(data))]
    lines.append(f"      {_packed(data, n_shares)}")
    how = "dimmed: not learned; in reverse" if color else "in [[ ]]: not learned; in {{ }}"
    return [*lines, f"example ({how}: control tokens)", _example(data, color=color)]


def _formats(data: AlpacaDataModule) -> list[str]:
    """Return a line for each format; if there are several, with the sources that have it."""
    names, lines = as_names(data.config.train), []
    for known in data.train_records.formats:
        of = f" of {title([names[number] for number in known.sources])}" if len(names) > 1 else ""
        lines.append(f"format{of}: {known.name}; {known.why}")
    return lines


def _template(data: AlpacaDataModule) -> list[str]:
    """Return a line that names the template, unless all records are plain texts, which have none."""
    if all(known.name == "text" for known in data.train_records.formats):
        return []
    kind = data.template.kind
    own = shorten(data.config.template)
    of = {"chat": "the base's own chat template", "custom": own, "jinja": own}
    return [f"template: {kind}{f' ({of[kind]})' if kind in of else ''}"]


def _weights(data: AlpacaDataModule) -> list[str]:
    """Return a line that says how many records of each source an epoch has, if there are weights."""
    weights = data.config.weights
    if weights is None:
        return []
    order, kind = data.epoch_order(), "examples" if data.train_encoded.n_divided else "records"
    unit, parts = f" of an epoch's {order.n_records:,} {kind}", []
    for name, weight, size, count in zip(
        as_names(data.config.train), weights, order.sizes.tolist(), order.counts.tolist(), strict=True
    ):
        if not weight or not size:
            parts.append(f"{name}: {'has no record' if weight else 'not trained on (weight 0)'}")
            continue
        parts.append(f"{name}: {count:,}{unit}, from {size:,}")
        unit = ""
    if data.n_skipped:
        why = f"not a multiple of optim.batch_size {data.batch_size}"
        parts.append(f"{data.n_skipped} of the {order.n_records:,}, at random, are skipped: {why}")
    return [f"weights: {'; '.join(parts)}"]


def _packed(data: AlpacaDataModule, n_shares: int) -> str:
    packer, length, shown = data.train_packer, data.train_encoded.length, data.first_steps(STEPS_SHOWN)
    given = sum(int(length[records].sum()) for records in shown)
    computed = sum(packer.row_length(row) for records in shown for row in packer.assign(records, n_shares))
    share, shared = f"{computed / given:.0%}", packer.n_preamble.sum() / length.sum()
    if not shared:
        return f"packed without padding: {share} of a step's tokens are computed"
    preamble = f"the preamble, {shared:.0%} of the tokens, is computed once per row"
    return f"packed without padding; {preamble}: {share} of a step's tokens are computed"


def _notes(data: AlpacaDataModule) -> list[tuple[int, int, str]]:
    """Return the notes: number of records, out of how many, and what happened to them."""
    train, val = data.train_records, data.val_records or ()
    n_empty = train.n_empty_output + (data.val_records.n_empty_output if data.val_records else 0)
    encoded, held_out = data.train_encoded, data.val_encoded
    kind = "examples" if encoded.n_divided else "records"
    n_examples = len(encoded) + len(encoded.left_out)
    divided = (
        f"are learned one answer at a time, {n_examples:,} examples in all: the template writes earlier "
        "answers differently from the last one"
    )
    n_val_dropped = len(val) - held_out.n_read if held_out is not None else 0
    lost, left = _words(train)
    too_long = f"left out: {left} longer than data.max_length {data.config.max_length}"
    cut = f"lost {lost} to data.max_length"
    n_skipped = data.n_skipped if data.config.weights is None else 0  # else `_weights` says it
    skipped = (
        f"are skipped in each epoch, different ones each time: {len(encoded)} is not a multiple "
        f"of optim.batch_size {data.batch_size}"
    )
    hint = ", see data.drop_duplicates"
    repeated = data.n_duplicate, len(train), f"of the training records repeat an earlier one{hint}"
    hint = "" if data.n_duplicate else hint  # once is enough
    held_out_too = data.n_overlap, len(val), f"of the held-out records are in the training set too{hint}"
    if data.config.drop_duplicates:
        n_before = len(train) + data.n_duplicate + data.n_held_out_too
        dropped = "of the training records left out: they"
        repeated = data.n_duplicate, n_before, f"{dropped} repeat an earlier one"
        held_out_too = data.n_held_out_too, n_before, f"{dropped} are held out too"
    return [
        (n_empty, len(train) + len(val) + n_empty, f"of all records left out: {_nothing(train)}"),
        (len(train) - encoded.n_read, len(train), f"of the training records {too_long}"),
        (encoded.n_cut, max(len(train), len(encoded)), f"of the training {kind} {cut}"),
        (n_skipped, len(encoded), f"of the training records {skipped}"),
        repeated,
        (n_val_dropped, len(val), f"of the held-out records {too_long}"),
        held_out_too,
        (encoded.n_divided, len(train), f"of the training records {divided}"),
        (len(encoded.left_out), n_examples, f"of the training examples {too_long}"),
    ]


def _words(records: Records) -> tuple[str, str]:
    """Return what records that are too long lose, and what must fit."""
    kinds = {known.name for known in records.formats}
    if kinds <= {"messages", "conversations"}:
        return "their first turns", "the last turns are"
    if kinds == {"text"}:
        return "their end", "the text is"
    if kinds == {"alpaca"}:
        return "the start of their prompt", "answer"
    return "the start of their prompt, their first turns or their end", "what must stay whole is"


def _nothing(records: Records) -> str:
    return "empty output" if {known.name for known in records.formats} == {"alpaca"} else "nothing to learn"


def _look_alikes(data: AlpacaDataModule) -> list[str]:
    """Return warnings of plain text that looks like control tokens, in the template and in records."""
    control, template, lines = data.tokenizer.control_tokens, data.template, []
    own = set(LOOK_ALIKE.findall(template.text + (template.text_without_input or ""))) - set(control)
    if own:
        names = ", ".join(sorted(own))
        lines.append(f"warning: the template's {names} is plain text: no control token of this base")
    name_of = {id_: name for name, id_ in control.items()}
    found = Counter(name_of[id_] for id_ in data.train_encoded.look_alikes[:, 1].tolist())
    if found:
        shown = ", ".join(f"{name} in {counted(count, 'record')}" for name, count in found.most_common(3))
        lines.append(
            f"warning: {shown}: plain text, not the control token; write control tokens into data.template"
        )
    return lines


def _not_shown(data: AlpacaDataModule) -> list[str]:
    """Return a warning about fields of the first conversations that the template never reads."""
    talks = [row for row in data.train_records[:LOOKED_AT] if isinstance(row, Conversation)]
    held = {key for row in talks for message in row.messages for key in message.more if key not in _IDS}
    held |= {"tools"} if any(row.tools for row in talks) else set()
    source = data.template.conversation_source(data.tokenizer) if held else ""
    unseen = sorted(key for key in held if key not in source)
    what = ", ".join(map(shorten, unseen[:4]))
    return [f"warning: the template does not show what conversations hold as {what}"] if unseen else []


def _example(data: AlpacaDataModule, *, color: bool) -> str:
    """Return the first record, with the parts that are not learned marked; a conversation turn by turn.

    If its answers are examples of their own, these follow one another.
    """
    source_row = data.train_encoded.source_row
    n_examples = int((source_row == source_row[0]).sum())
    shown = [_shown(data, number, color=color) for number in range(n_examples)]
    return Shown("\n  |---\n".join(shown))


def _shown(data: AlpacaDataModule, number: int, *, color: bool) -> str:
    encoded = data.train_encoded
    ids = encoded.record(number).tolist()
    kinds = encoded.kinds[encoded.start[number] :][: encoded.length[number]]
    learned = kinds >= (ANSWER if data.config.mask_prompt else CONTEXT)
    before, after = (DIM, PLAIN) if color else ("[[", "]]")
    parts = []
    for is_learned, run in groupby(zip(learned.tolist(), ids, strict=True), lambda pair: pair[0]):
        text = _decoded(data.tokenizer, [token for _, token in run], color=color)
        parts.append(text if is_learned else f"{before}{text}{after}")
    return "\n".join(f"  | {line}" for line in "".join(parts).split("\n"))


def _decoded(tokenizer: Tokenizer, ids: list[int], *, color: bool) -> str:
    """Return the visible text of ``ids`` with their control tokens, which are marked."""
    before, after = (REVERSE, NOT_REVERSE) if color else ("{{", "}}")
    spelled = {id_: f"{before}{visible(name)}{after}" for name, id_ in tokenizer.control_tokens.items()}
    parts = []
    for mark, run in groupby(ids, spelled.get):
        tokens = list(run)
        text = b"".join(map(tokenizer.piece, tokens)).decode("utf-8", "replace")
        parts.append(mark * len(tokens) if mark else visible(text))
    return "".join(parts)
