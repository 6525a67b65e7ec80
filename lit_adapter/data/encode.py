"""Tokenization of records: encoded once by worker processes, cut to length, counted and cached.

The cache is a table on disk (`lit_adapter.files.table`), keyed by the records' content, the tokenizer and the
settings. Encoding that was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_adapter.data.records import Record, Records
from lit_adapter.data.worker import follow_parent, holding_signals
from lit_adapter.errors import UserError, counted
from lit_adapter.files.table import TableWriter, kept_table
from lit_adapter.progress import count_progress
from lit_adapter.text.chat import control_pattern
from lit_adapter.text.template import Template
from lit_adapter.text.tokenizer import Tokenizer

PARALLEL_FROM = 4000
"""Number of records from which worker processes pay."""
MOST_WORKERS = 8
ANNOUNCED_FROM = 50_000
"""Number of records from which encoding takes so long that a line says so."""
CHUNK = 500
"""Records encoded together: a tenth of a second; after Ctrl-C each worker finishes what it has begun."""
CHUNKS_AHEAD = 3
"""Chunks per worker that wait for it or for being written."""
FORMAT_VERSION = 3
Columns = dict[str, NDArray]
Chunk = tuple[int, Sequence[Record]]
"""The index of the first record, and the records."""
SCHEMA = {
    "ids": np.int32,
    "length": np.int32,
    "n_prompt": np.int32,
    "variant": np.int8,
    "whole": np.bool_,
    "source_row": np.int32,
    "look_alikes": np.int32,
}
"""Columns of the cache: the fields of `Encoded` without ``start``, which follows."""


@dataclass(frozen=True)
class Encoded:
    """Encoded records: record r is ``ids[start[r] : start[r] + length[r]]``."""

    ids: NDArray[np.int32]
    """The tokens of all records, perhaps also of others ``[tokens]``."""
    start: NDArray[np.int64]
    """Index of each record's first token ``[records]``."""
    length: NDArray[np.int32]
    """Number of tokens of each record ``[records]``."""
    n_prompt: NDArray[np.int32]
    """Number of tokens before each record's answer ``[records]``."""
    variant: NDArray[np.int8]
    """Which text of the template each record uses (`Template.variant`) ``[records]``."""
    whole: NDArray[np.bool_]
    """Whether each record was kept whole ``[records]``."""
    source_row: NDArray[np.int32]
    """Index of each record among those read ``[records]``."""
    look_alikes: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 2), np.int32))
    """Index of a record that was read, and a control token whose name is in its texts ``[pairs, 2]``."""

    def __len__(self) -> int:
        return len(self.n_prompt)

    def record(self, index: int) -> NDArray[np.int32]:
        """Return the tokens of one record."""
        return self.ids[self.start[index] : self.start[index] + self.length[index]]

    @property
    def n_cut(self) -> int:
        """Number of records that lost the start of their prompt."""
        return int((~self.whole).sum())

    def choose(self, rows: NDArray[np.int64], n_read: int) -> Encoded:
        """Return those of the records at ``rows``, ascending, of the ``n_read`` that were read.

        Their ``source_row`` is their place in ``rows``. No token is copied.
        """
        place = np.full(n_read, -1, np.int32)
        place[rows] = np.arange(len(rows), dtype=np.int32)
        here = np.flatnonzero(place[self.source_row] >= 0)
        row, token = self.look_alikes.T
        return Encoded(
            ids=self.ids,
            start=self.start[here],
            length=self.length[here],
            n_prompt=self.n_prompt[here],
            variant=self.variant[here],
            whole=self.whole[here],
            source_row=place[self.source_row[here]],
            look_alikes=np.stack([place[row], token], axis=1)[place[row] >= 0],
        )

    def __getstate__(self) -> dict[str, Any]:
        # The process that this goes to maps the file too; without the file, it gets a copy.
        path = self.ids.filename if isinstance(self.ids, np.memmap) else None
        return vars(self) | ({"ids": str(path)} if path is not None and os.path.exists(path) else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        is_mapped = isinstance(state["ids"], str)
        vars(self).update(state | {"ids": np.memmap(state["ids"], np.int32, "r")} if is_mapped else state)


def encode_records(
    records: Records,
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_length: int,
    cache: Path | None = None,
    tokenizer_key: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> Encoded:
    """Encode all records, or read them from the cache.

    A record longer than ``max_length`` loses the start of its prompt and keeps its answer and EOS. One
    whose answer does not fit after one token of its prompt is dropped.

    Worker processes get a pickle of the tokenizer. Its fingerprint, ``tokenizer_key``, is part of the key of
    the tables in the folder ``cache``. ``say`` gets a line if many records are encoded, and as `kept_table`.

    Raises:
        UserError: a worker process died, or a record cannot be encoded (see `Template.encode_example`).
    """
    key = _key(records, template, max_length, tokenizer_key)

    def fill(writer: TableWriter) -> dict[str, Any]:
        done = writer.notes.get("n_read", 0)
        _announce(len(records), done, say)
        with count_progress("encoding", len(records), done) as advance:
            for columns in _encode_all(records, done, tokenizer, template, max_length):
                writer.append(columns)
                n_new = min(CHUNK, len(records) - done)
                done += n_new
                advance(n_new)
                writer.commit({"n_read": done})
        return {"n_read": done}

    folder = cache / f"tokens-{key[:32]}" if cache is not None else None
    table = kept_table(folder, key, SCHEMA, fill, what="tokens", doing="encodes the data", say=say)
    columns = table.columns | {"look_alikes": table.columns["look_alikes"].reshape(-1, 2)}
    length = columns["length"]
    return Encoded(start=np.cumsum(length, dtype=np.int64) - length, **columns)


def _announce(n_records: int, done: int, say: Callable[[str], None]) -> None:
    if n_records >= ANNOUNCED_FROM:
        again = f"; {done:,} are done already" if done else ""
        say(f"encoding {counted(n_records, 'record')}, once{again}")


def _key(records: Records, template: Template, max_length: int, tokenizer_key: str) -> str:
    parts = [FORMAT_VERSION, records.sha256, template.to_dict(), max_length, tokenizer_key]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _encode_all(
    records: Records, done: int, tokenizer: Tokenizer, template: Template, max_length: int
) -> Iterator[Columns]:
    """Yield the columns of the records after the first ``done``, `CHUNK` records at a time."""
    chunks = ((first, records[first : first + CHUNK]) for first in range(done, len(records), CHUNK))
    # A job queue or container may allow this process only some of the CPUs.
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(MOST_WORKERS, n_cpus)
    if len(records) - done < PARALLEL_FROM or workers == 1:
        return (_encode_chunk(tokenizer, template, max_length, *chunk) for chunk in chunks)
    return _in_processes(workers, chunks, tokenizer, template, max_length)


def _in_processes(workers: int, chunks: Iterator[Chunk], *settings: Any) -> Iterator[Columns]:
    """Yield what `_encode_chunk` returns for each chunk, from processes that have got ``settings``."""
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),  # forking a process with threads can hang; spawning cannot
        initializer=_prepare,
        initargs=settings,
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


_settings: list[Any] = []
"""In a worker process: what it encodes with. Reading a tokenizer takes far longer than encoding a record."""


def _prepare(*settings: Any) -> None:
    follow_parent()
    _settings[:] = settings


def _encode_in_worker(*chunk: Any) -> Columns:
    return _encode_chunk(*_settings, *chunk)


def _encode_chunk(
    tokenizer: Tokenizer, template: Template, max_length: int, first: int, records: Sequence[Record]
) -> Columns:
    """Return the columns of records, the first of which has the index ``first``."""
    kept, facts, look_alikes = [], [], []
    pattern = control_pattern(tokenizer)
    for row, record in enumerate(records, start=first):
        ids, n_prompt = template.encode_example(tokenizer, record.instruction, record.input, record.output)
        excess = max(0, len(ids) - max_length)
        if excess < n_prompt:
            kept.append(np.array(ids[excess:], np.int32))
            facts.append(
                (len(kept[-1]), n_prompt - excess, template.variant(bool(record.input)), excess == 0, row)
            )
        texts = "\n".join(record.texts)
        found = set(pattern.findall(texts)) if pattern else set()
        look_alikes += [(row, tokenizer.control_tokens[name]) for name in sorted(found)]
    names = ("length", "n_prompt", "variant", "whole", "source_row")
    columns = dict(zip(names, np.array(facts, np.int32).reshape(-1, 5).T, strict=True))
    return columns | {
        "ids": np.concatenate([np.empty(0, np.int32), *kept]),
        "look_alikes": np.array(look_alikes, np.int32).reshape(-1),
    }
