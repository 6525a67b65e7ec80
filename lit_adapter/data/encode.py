"""Records become token ids, once: encoded by worker processes, cut to length, counted and cached.

The cache file is keyed by the records' content, the tokenizer and the settings, and carries a checksum;
one that is damaged or belongs to something else is made anew.
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

from lit_adapter.data.records import Record, Records
from lit_adapter.data.worker import follow_parent, holding_signals
from lit_adapter.errors import UserError
from lit_adapter.files.locks import one_at_a_time
from lit_adapter.files.write import write_bytes
from lit_adapter.text.template import Template
from lit_adapter.text.tokenizer import Tokenizer

PARALLEL_FROM = 4000
"""Records from which starting worker processes pays."""
CHUNK = 50
"""Records sent to a worker together; after Ctrl-C each finishes two of these."""
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Encoded:
    """Encoded records, flat: record r is ``ids[start[r] : start[r + 1]]``."""

    ids: NDArray[np.int32]
    """All tokens, one record after another ``[tokens]``."""
    start: NDArray[np.int64]
    """Where each record starts ``[records + 1]``."""
    n_prompt: NDArray[np.int32]
    """Prompt tokens of each record (before its answer) ``[records]``."""
    variant: NDArray[np.int8]
    """Which text of the template each record uses ``[records]``."""
    whole: NDArray[np.bool_]
    """Whether the record was kept whole ``[records]``."""
    source_row: NDArray[np.int32]
    """Index of the record in its file ``[records]``."""
    n_dropped: NDArray[np.int32]
    """Records whose answer alone is too long ``[1]``."""

    def __len__(self) -> int:
        return len(self.n_prompt)

    def record(self, index: int) -> NDArray[np.int32]:
        """Return the tokens of one record."""
        return self.ids[self.start[index] : self.start[index + 1]]

    @property
    def length(self) -> NDArray[np.int64]:
        """Tokens of each record ``[records]``."""
        return np.diff(self.start)

    @property
    def n_cut(self) -> int:
        """Records that lost the start of their prompt."""
        return int((~self.whole).sum())


@dataclass(frozen=True)
class _Example:
    ids: list[int]
    n_prompt: int
    variant: int


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
    """Encode all records, from the cache where it holds them.

    A record longer than ``max_length`` loses the start of its prompt and keeps its answer and EOS; one
    whose answer alone does not fit (with one token of prompt before it) is dropped and counted.

    Args:
        records: what to encode.
        tokenizer: of the base; it is sent to worker processes, so it must pickle.
        template: turns a record into prompt and answer.
        max_length: longest record, in tokens.
        cache: folder of cache files, or None for no caching.
        tokenizer_key: fingerprint of the tokenizer, for the cache's key.
        say: gets a line when a damaged cache file is replaced, or none can be written.
    """
    key = _key(records, template, max_length, tokenizer_key)
    path = cache / f"tokens-{key[:32]}.safetensors" if cache else None
    found = _read_cache(path, key) if path else None
    if found is not None:
        return found
    if path is None:
        return _pack(_encode_all(records.rows, tokenizer, template), max_length)
    with one_at_a_time(path):  # the other processes of a run want the same
        found = _read_cache(path, key)
        if found is not None:
            return found
        if path.is_file():
            say(f"{path}: damaged cache of tokens; encoding again")
        encoded = _pack(_encode_all(records.rows, tokenizer, template), max_length)
        try:
            _write_cache(path, key, encoded)
        except UserError as error:  # the next run encodes again; this one goes on
            say(f"tokens are not cached: {error}; $LIT_ADAPTER_CACHE names another folder")
    return encoded


def _encode_all(rows: Sequence[Record], tokenizer: Tokenizer, template: Template) -> Iterable[_Example]:
    one = partial(_encode_one, tokenizer, template)
    workers = min(8, _n_cpus())
    if len(rows) < PARALLEL_FROM or workers == 1:
        return map(one, rows)
    # Forking a process that has started threads can hang; a fresh interpreter cannot.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=follow_parent)
    try:
        with holding_signals():  # workers start here; one that died would take the pool down with it
            results = pool.map(one, rows, chunksize=CHUNK)
        return list(results)
    except BrokenProcessPool:
        raise UserError(
            "a process that encodes records has died; it may have been killed for want of memory "
            '(a Python script that calls this needs `if __name__ == "__main__":`)'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _n_cpus() -> int:
    """Return the CPUs that this process may use: a queue or container may have given it a few of many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encode_one(tokenizer: Tokenizer, template: Template, record: Record) -> _Example:
    ids, n_prompt = template.encode_example(tokenizer, record.instruction, record.input, record.output)
    return _Example(ids, n_prompt, template.variant(bool(record.input)))


def _pack(examples: Iterable[_Example], max_length: int) -> Encoded:
    ids: list[NDArray[np.int32]] = []
    n_prompt, variant, whole, source_row, dropped = [], [], [], [], 0
    for row, example in enumerate(examples):
        excess = max(0, len(example.ids) - max_length)
        if excess >= example.n_prompt:
            dropped += 1
            continue
        ids.append(np.array(example.ids[excess:], dtype=np.int32))
        n_prompt.append(example.n_prompt - excess)
        variant.append(example.variant)
        whole.append(excess == 0)
        source_row.append(row)
    return Encoded(
        ids=np.concatenate(ids) if ids else np.empty(0, np.int32),
        start=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        n_prompt=np.array(n_prompt, np.int32),
        variant=np.array(variant, np.int8),
        whole=np.array(whole, np.bool_),
        source_row=np.array(source_row, np.int32),
        n_dropped=np.array([dropped], np.int32),
    )


def _key(records: Records, template: Template, max_length: int, tokenizer_key: str) -> str:
    parts = [FORMAT_VERSION, records.sha256, template.to_dict(), max_length, tokenizer_key]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _write_cache(path: Path, key: str, encoded: Encoded) -> None:
    arrays = {field.name: getattr(encoded, field.name) for field in fields(Encoded)}
    metadata = {"key": key, "checksum": _checksum(arrays)}
    write_bytes(path, save(arrays, metadata=metadata))


def _read_cache(path: Path, key: str) -> Encoded | None:
    """Return what a cache file holds, or None if there is none, or it is damaged or of another question."""
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
