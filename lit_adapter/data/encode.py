"""Tokenization of records: encoded once by worker processes, cut to length, counted and cached.

A cache file is keyed by the records' content, the tokenizer and the settings, and has a checksum. A damaged
one is replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lit_adapter.data.examples import Example, encode_example
from lit_adapter.data.record import AnyRecord
from lit_adapter.data.records import Records
from lit_adapter.data.worker import follow_parent, holding_signals
from lit_adapter.errors import UserError
from lit_adapter.files.locks import one_at_a_time
from lit_adapter.files.write import write_bytes
from lit_adapter.text.conversation import ANSWER, CONTEXT
from lit_adapter.text.template import Template
from lit_adapter.text.tokenizer import Tokenizer

PARALLEL_FROM = 4000
"""Number of records from which worker processes pay."""
CHUNK = 50
"""Records sent to a worker at a time; after Ctrl-C each worker finishes two chunks."""
FORMAT_VERSION = 3


Examples = Iterable[Example | None]


@dataclass(frozen=True)
class Encoded:
    """Encoded records, concatenated: record r is ``ids[start[r] : start[r + 1]]``."""

    ids: NDArray[np.int32]
    """The tokens of all records ``[tokens]``."""
    start: NDArray[np.int64]
    """Index of each record's first token, and the end ``[records + 1]``."""
    kinds: NDArray[np.int8]
    """What each token is to the loss: `NEVER`, `CONTEXT` or `ANSWER` ``[tokens]``."""
    n_prompt: NDArray[np.int32]
    """Number of tokens before each record's first answer ``[records]``."""
    variant: NDArray[np.int8]
    """Which text of the template each record uses (`Template.variant`) ``[records]``."""
    whole: NDArray[np.bool_]
    """Whether each record was kept whole ``[records]``."""
    source_row: NDArray[np.int32]
    """Index of each record among those read ``[records]``."""

    def __len__(self) -> int:
        return len(self.n_prompt)

    def record(self, index: int) -> NDArray[np.int32]:
        """Return the tokens of one record."""
        return self.ids[self.start[index] : self.start[index + 1]]

    @property
    def length(self) -> NDArray[np.int64]:
        """Number of tokens of each record ``[records]``."""
        return np.diff(self.start)

    @property
    def n_cut(self) -> int:
        """Number of records that lost the start of their prompt, their first turns, or the end of a text."""
        return int((~self.whole).sum())


def kinds_of_tasks(length: NDArray[np.int64], n_prompt: NDArray[np.int32]) -> NDArray[np.int8]:
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
    say: Callable[[str], None] = lambda line: None,
) -> Encoded:
    """Encode all records, or read them from the cache; `encode_example` says how, and which are dropped.

    Worker processes get a pickle of the tokenizer. Its fingerprint, ``tokenizer_key``, is part of the key of
    the cache files in the folder ``cache``. ``say`` gets a line when a damaged cache file is replaced, or a
    cache file cannot be written.

    Raises:
        UserError: a worker process died, or a record cannot be encoded.
    """
    one = partial(
        encode_example,
        tokenizer=tokenizer,
        template=template,
        max_length=max_length,
        last_answer_only=last_answer_only,
    )
    if cache is None:
        return _pack(_encode_all(records.rows, one))
    key = _key(records, template, max_length, tokenizer_key, last_answer_only)
    path = cache / f"tokens-{key[:32]}.safetensors"
    with one_at_a_time(path, doing="encodes the data"):  # a run's processes all need this file
        found = _read_cache(path, key)
        if found is not None:
            return found
        if os.path.isfile(path):  # false also for a name that the file system refuses
            say(f"{path}: damaged token cache; encoding again")
        encoded = _pack(_encode_all(records.rows, one))
        arrays = vars(encoded)
        try:
            write_bytes(path, save(arrays, metadata={"key": key, "checksum": _checksum(arrays)}))
        except UserError as error:  # this run goes on; the next one encodes again
            say(f"tokens are not cached: {error}; $LIT_ADAPTER_CACHE names another folder")
    return encoded


def _encode_all(rows: Sequence[AnyRecord], one: Callable[[AnyRecord], Example | None]) -> Examples:
    # A job queue or container may allow this process only some of the CPUs.
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(8, n_cpus)
    if len(rows) < PARALLEL_FROM or workers == 1:
        return map(one, rows)
    # Forking a process with threads can hang; spawning cannot.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=follow_parent)
    try:
        with holding_signals():  # workers start here; a signal that kills one would break the pool
            results = pool.map(one, rows, chunksize=CHUNK)
        return list(results)
    except BrokenProcessPool:
        raise UserError(
            "a process that encodes records died; the system may have killed it for lack of memory "
            '(a Python script that calls this needs `if __name__ == "__main__":`)'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _pack(examples: Examples) -> Encoded:
    kept = [(row, example) for row, example in enumerate(examples) if example is not None]
    facts = [(example.n_prompt, example.variant, example.whole, row) for row, example in kept]
    columns = np.array(facts, np.int32).reshape(-1, 4).T.copy()
    return Encoded(
        ids=np.concatenate([np.empty(0, np.int32), *(example.ids for _, example in kept)]),
        start=np.cumsum([0, *(len(example.ids) for _, example in kept)], dtype=np.int64),
        kinds=np.concatenate([np.empty(0, np.int8), *(example.kinds for _, example in kept)]),
        n_prompt=columns[0],
        variant=columns[1].astype(np.int8),
        whole=columns[2].astype(np.bool_),
        source_row=columns[3],
    )


def _key(
    records: Records, template: Template, max_length: int, tokenizer_key: str, last_answer_only: bool
) -> str:
    how = [template.to_dict(), max_length, tokenizer_key, last_answer_only]
    parts = [FORMAT_VERSION, records.sha256, *how]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_cache(path: Path, key: str) -> Encoded | None:
    """Return a cache file's content; None if it is missing, damaged or has another key."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError):
        return None
    names = {field.name for field in fields(Encoded)}
    if metadata.get("key") != key or arrays.keys() != names or metadata.get("checksum") != _checksum(arrays):
        return None
    return Encoded(**arrays)


def _checksum(arrays: dict[str, NDArray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
