"""Tokenization of records: encoded once by worker processes, cut to length, counted and cached.

The cache is a table on disk (`lit_adapter.files.table`), keyed by the records' content, the tokenizer and the
settings. Interrupted encoding continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_adapter.data.examples import encode_examples
from lit_adapter.data.record import AnyRecord
from lit_adapter.data.records import Records
from lit_adapter.data.worker import follow_parent, holding_signals
from lit_adapter.errors import UserError, counted
from lit_adapter.files.table import TableWriter, kept_table
from lit_adapter.progress import count_progress
from lit_adapter.streams import Say
from lit_adapter.text.chat import control_pattern
from lit_adapter.text.conversation import ANSWER, CONTEXT
from lit_adapter.text.template import Template
from lit_adapter.text.tokenizer import Tokenizer

PARALLEL_FROM = 4000
"""Number of records from which worker processes pay off."""
MOST_WORKERS = 8
ANNOUNCED_FROM = 50_000
"""Number of records from which encoding takes so long that a line says so."""
CHUNK = 500
"""Records encoded together: a tenth of a second; after Ctrl-C each worker finishes what it has begun."""
CHUNKS_AHEAD = 3
"""Chunks per worker that wait for it, or to be written."""
FORMAT_VERSION = 6
Columns = dict[str, NDArray]
Chunk = tuple[int, Sequence[AnyRecord]]
"""The index of the first record, and the records."""
SCHEMA = {
    "ids": np.int32,
    "kinds": np.int8,
    "length": np.int32,
    "n_prompt": np.int32,
    "variant": np.int8,
    "whole": np.bool_,
    "source_row": np.int32,
    "look_alikes": np.int32,
    "left_out": np.int32,
}
"""Columns of the cache: the fields of `Encoded` without ``start``, which follows."""


@dataclass(frozen=True)
class Encoded:
    """Encoded records: record r is ``ids[start[r] : start[r] + length[r]]``.

    Each example counts as a record here, even if one record that was read has become several (`examples`).
    """

    ids: NDArray[np.int32]
    """The tokens of all records, perhaps also of others ``[tokens]``."""
    kinds: NDArray[np.int8]
    """What each token is to the loss: `NEVER`, `CONTEXT` or `ANSWER` ``[tokens]``."""
    start: NDArray[np.int64]
    """Index of each record's first token ``[records]``."""
    length: NDArray[np.int32]
    """Number of tokens of each record ``[records]``."""
    n_prompt: NDArray[np.int32]
    """Number of tokens before each record's first answer ``[records]``."""
    variant: NDArray[np.integer]
    """Which text of the template each record uses (`Template.variant`) ``[records]``."""
    whole: NDArray[np.bool_]
    """Whether each record was kept whole ``[records]``."""
    source_row: NDArray[np.int32]
    """Index of each record among those read ``[records]``."""
    look_alikes: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 2), np.int32))
    """Index of a record that was read, and a control token whose name is in its texts ``[pairs, 2]``."""
    left_out: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Index of a record that was read, for each of several examples of it that did not fit ``[examples]``."""

    def __len__(self) -> int:
        return len(self.n_prompt)

    def record(self, index: int) -> NDArray[np.int32]:
        """Return the tokens of one record."""
        return self.ids[self.start[index] : self.start[index] + self.length[index]]

    @property
    def n_read(self) -> int:
        """Number of records read that are included here, as one example or several."""
        return len(np.unique(self.source_row))

    @property
    def n_divided(self) -> int:
        """Number of records that were read and have become several examples."""
        rows, n_examples = np.unique(self.source_row, return_counts=True)
        return len(np.union1d(rows[n_examples > 1], self.left_out))

    @property
    def n_cut(self) -> int:
        """Number of records that lost the start of their prompt, their first turns, or the end of a text."""
        return int((~self.whole).sum())

    def choose(self, rows: NDArray[np.int64], n_read: int) -> Encoded:
        """Return the examples of the records at ``rows`` (ascending), out of ``n_read`` that were read.

        Their ``source_row`` is their index in ``rows``. No token is copied.
        """
        place = np.full(n_read, -1, np.int32)
        place[rows] = np.arange(len(rows), dtype=np.int32)
        here = np.flatnonzero(place[self.source_row] >= 0)
        row, token = self.look_alikes.T
        return Encoded(
            ids=self.ids,
            kinds=self.kinds,
            start=self.start[here],
            length=self.length[here],
            n_prompt=self.n_prompt[here],
            variant=self.variant[here],
            whole=self.whole[here],
            source_row=place[self.source_row[here]],
            look_alikes=np.stack([place[row], token], axis=1)[place[row] >= 0],
            left_out=place[self.left_out][place[self.left_out] >= 0],
        )

    def __getstate__(self) -> dict[str, Any]:
        # The receiving process maps the files too; if the files are gone, it gets copies.
        return {name: _MappedFile.of(values) or values for name, values in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        opened = {name: v.open() if isinstance(v, _MappedFile) else v for name, v in state.items()}
        vars(self).update(opened)


@dataclass(frozen=True)
class _MappedFile:
    """A column of a table, for another process."""

    path: str
    kind: str

    @classmethod
    def of(cls, values: NDArray) -> _MappedFile | None:
        """Return a whole column's file, if it is mapped and the file still exists."""
        path = values.filename if isinstance(values, np.memmap) else None
        if path is None or not os.path.exists(path) or os.path.getsize(path) != values.nbytes:
            return None
        return cls(str(path), values.dtype.str)

    def open(self) -> NDArray:
        return np.memmap(self.path, np.dtype(self.kind), "r")


def kinds_of_tasks(length: NDArray[np.integer], n_prompt: NDArray[np.integer]) -> NDArray[np.int8]:
    """Return `Encoded.kinds` of tasks of ``length`` tokens, the first ``n_prompt`` of a prompt."""
    parts = np.stack([n_prompt, length - n_prompt], axis=1).ravel()
    return np.repeat(np.tile(np.array([CONTEXT, ANSWER], np.int8), len(length)), parts)


def encode_records(
    records: Records,
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_length: int,
    cache: Path | None = None,
    tokenizer_key: str = "",
    last_answer_only: bool = False,
    say: Say = lambda line: None,
) -> Encoded:
    """Encode all records, or read them from the cache; `encode_examples` says how, and which are dropped.

    Worker processes get a pickle of the tokenizer. Its fingerprint, ``tokenizer_key``, is part of the key of
    the tables in the folder ``cache``. ``say`` gets a line if many records are encoded, and as `kept_table`.

    Raises:
        UserError: a worker process died, or a record cannot be encoded (see `encode_examples`).
    """
    key = _key(records, template, max_length, tokenizer_key, last_answer_only)
    settings = _Settings(tokenizer, template, max_length, last_answer_only)

    def fill(writer: TableWriter) -> dict[str, Any]:
        done = writer.notes.get("n_read", 0)
        _announce(len(records), done, say)
        with count_progress("encoding", len(records), done) as advance:
            for columns in _encode_all(records, done, settings):
                writer.append(columns)
                n_new = min(CHUNK, len(records) - done)
                done += n_new
                advance(n_new)
                writer.commit({"n_read": done})
        return {"n_read": done}

    folder = cache / f"tokens-{key[:32]}" if cache is not None else None
    table = kept_table(folder, key, SCHEMA, fill, what="tokens", doing="encodes the data", say=say)
    return _encoded(table.columns)


def encode_few(
    records: Sequence[AnyRecord],
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_length: int,
    last_answer_only: bool = False,
) -> Encoded:
    """Encode some records here and now, as `encode_records` does.

    Raises:
        UserError: as `encode_examples`.
    """
    columns = _encode_chunk(_Settings(tokenizer, template, max_length, last_answer_only), 0, records)
    return _encoded({name: values.astype(SCHEMA[name]) for name, values in columns.items()})


def _encoded(columns: Columns) -> Encoded:
    length, look_alikes = columns["length"], columns["look_alikes"].reshape(-1, 2)
    start = np.cumsum(length, dtype=np.int64) - length
    return Encoded(start=start, **columns | {"look_alikes": look_alikes})


def _announce(n_records: int, done: int, say: Say) -> None:
    if n_records >= ANNOUNCED_FROM:
        again = f"; {done:,} are done already" if done else ""
        say(f"encoding {counted(n_records, 'record')}, once{again}")


def _key(
    records: Records, template: Template, max_length: int, tokenizer_key: str, last_answer_only: bool
) -> str:
    settings = [template.to_dict(), max_length, tokenizer_key, last_answer_only]
    parts = [FORMAT_VERSION, records.sha256, *settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Settings:
    """The arguments of `encode_examples` with which records are encoded."""

    tokenizer: Tokenizer
    template: Template
    max_length: int
    last_answer_only: bool


def _encode_all(records: Records, done: int, settings: _Settings) -> Iterator[Columns]:
    """Yield the columns of the records after the first ``done``, `CHUNK` records at a time."""
    chunks = ((first, records[first : first + CHUNK]) for first in range(done, len(records), CHUNK))
    # A job queue or container may allow this process only some of the CPUs.
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(MOST_WORKERS, n_cpus)
    if len(records) - done < PARALLEL_FROM or workers == 1:
        return (_encode_chunk(settings, *chunk) for chunk in chunks)
    return _in_processes(workers, chunks, settings)


def _in_processes(workers: int, chunks: Iterator[Chunk], settings: _Settings) -> Iterator[Columns]:
    """Yield what `_encode_chunk` returns for each chunk, from processes that have got ``settings``."""
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),  # forking a process with threads can hang; spawning cannot
        initializer=_prepare,
        initargs=(settings,),
    )
    waiting: deque[Future[Columns]] = deque()
    try:
        for chunk in chunks:
            with holding_signals():  # workers start here; a signal that kills one would break the pool
                waiting.append(pool.submit(_encode_in_worker, *chunk))
            if len(waiting) > CHUNKS_AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a process that encodes records died; the system may have killed it for lack of memory "
            '(a Python script that calls this needs `if __name__ == "__main__":`)'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_own_settings: list[_Settings] = []
"""In a worker process: its arguments. Reading a tokenizer takes far longer than encoding a record."""


def _prepare(settings: _Settings) -> None:
    follow_parent()
    _own_settings[:] = [settings]


def _encode_in_worker(first: int, records: Sequence[AnyRecord]) -> Columns:
    return _encode_chunk(_own_settings[0], first, records)


def _encode_chunk(settings: _Settings, first: int, records: Sequence[AnyRecord]) -> Columns:
    """Return the columns of records, the first of which has the index ``first``."""
    found = [encode_examples(record, **vars(settings)) for record in records]
    every = [(row, example) for row, examples in enumerate(found, start=first) for example in examples]
    kept = [(row, example) for row, example in every if example is not None]
    has_some = {row for row, _ in kept}
    left_out = [row for row, example in every if example is None and row in has_some]
    facts = [(len(e.ids), e.n_prompt, e.variant, e.whole, row) for row, e in kept]
    names = ("length", "n_prompt", "variant", "whole", "source_row")
    columns = dict(zip(names, np.array(facts, np.int32).reshape(-1, 5).T, strict=True))
    return columns | {
        "ids": np.concatenate([np.empty(0, np.int32), *(example.ids for _, example in kept)]),
        "kinds": np.concatenate([np.empty(0, np.int8), *(example.kinds for _, example in kept)]),
        "look_alikes": np.array(_look_alikes(settings.tokenizer, first, records), np.int32).reshape(-1),
        "left_out": np.array(left_out, np.int32),
    }


def _look_alikes(tokenizer: Tokenizer, first: int, records: Sequence[AnyRecord]) -> list[tuple[int, int]]:
    """Return the index of each record whose texts have the name of a control token, with that token."""
    pattern = control_pattern(tokenizer)
    if pattern is None:
        return []
    return [
        (row, tokenizer.control_tokens[name])
        for row, record in enumerate(records, start=first)
        for name in sorted(set(pattern.findall("\n".join(record.texts))))
    ]
