"""The records of a benchmark: real text, or random tokens whose lengths are like Alpaca's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_adapter.data.encode import Encoded, encode_records, kinds_of_tasks
from lit_adapter.data.records import read_records
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template

MAX_LENGTH = 512
PREAMBLES = (38, 33)
"""Tokens of the template's two preambles, without and with input."""
SHARE_WITH_INPUT = 0.43
PROMPT, ANSWER = (3.33, 0.45), (3.05, 1.03)
"""Mean and deviation of the logarithm of a record's own prompt tokens and of its answer's tokens."""


def alpaca_like(n_records: int, vocab: int, seed: int) -> Encoded:
    """Return random tokens in records of about 103 tokens, 36 of them the preamble and 36 the answer."""
    draw = np.random.default_rng(seed)
    low = min(10, vocab - 1)
    preambles = [draw.integers(low, vocab, length) for length in PREAMBLES]
    variant = (draw.random(n_records) < SHARE_WITH_INPUT).astype(np.int8)
    prompt, answer = (
        np.exp(draw.normal(*shape, n_records)).round().clip(2, 200).astype(np.int32)
        for shape in (PROMPT, ANSWER)
    )
    ids, n_prompt = [], []
    for kind, own, learned in zip(variant.tolist(), prompt.tolist(), answer.tolist(), strict=True):
        ids.append(np.concatenate([preambles[kind], draw.integers(low, vocab, own + learned)]))
        n_prompt.append(PREAMBLES[kind] + own)
    return Encoded(
        ids=np.concatenate(ids).astype(np.int32),
        start=np.cumsum([0, *map(len, ids[:-1])], dtype=np.int64),
        length=np.array([*map(len, ids)], np.int32),
        kinds=kinds_of_tasks(np.array([*map(len, ids)]), np.array(n_prompt)),
        n_prompt=np.array(n_prompt, np.int32),
        variant=variant,
        whole=np.ones(n_records, np.bool_),
        source_row=np.arange(n_records, dtype=np.int32),
    )


def from_file(path: str, tokenizer_folder: Path, vocab: int) -> Encoded:
    """Return the records of a file under the Alpaca template; ids are taken modulo ``vocab``."""
    tokenizer = load_tokenizer(tokenizer_folder)
    template = resolve_template("alpaca", tokenizer)
    encoded = encode_records(read_records(path), tokenizer, template, max_length=MAX_LENGTH)
    return replace(encoded, ids=np.mod(encoded.ids, vocab))


@dataclass(frozen=True)
class Workload:
    """Records and their order: a pass is ``steps`` optimizer steps of ``batch`` records."""

    encoded: Encoded
    source: str
    batch: int
    steps: int
    seed: int

    def records(self, number: int) -> list[NDArray[np.int64]]:
        """Return the records of pass ``number``, one array an optimizer step.

        Passes do not overlap until the data is used up.
        """
        size, n_records = self.batch * self.steps, len(self.encoded)
        epoch, place = divmod(number, max(1, n_records // size))
        order = np.random.default_rng((self.seed, epoch)).permutation(n_records)
        chosen = np.resize(order[place * size :], size)
        return list(chosen.reshape(self.steps, self.batch))

    def tokens(self, records: list[NDArray[np.int64]]) -> int:
        """Return the records' tokens, without padding and with a preamble for every record."""
        return int(sum(self.encoded.length[step].sum() for step in records))

    def describe(self) -> dict[str, float | str | int]:
        """Return the source and the mean lengths, for the header."""
        length = self.encoded.length
        return {
            "source": self.source,
            "records": len(length),
            "tokens_per_record": round(float(length.mean()), 1),
            "targets_per_record": round(float((length - self.encoded.n_prompt).mean()), 1),
        }
