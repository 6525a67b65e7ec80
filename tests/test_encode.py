from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pytest

from lit_adapter.data import encode
from lit_adapter.data.encode import Encoded, encode_few, encode_records
from lit_adapter.data.record import Record
from lit_adapter.data.records import Records, read_records
from lit_adapter.errors import UserError
from lit_adapter.files import table
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import Template, resolve_template
from lit_adapter.text.tokenizer import Tokenizer

Encode = Callable[..., Encoded]


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return load_tokenizer(tiny_base)


@pytest.fixture(scope="session")
def template(tokenizer: Tokenizer) -> Template:
    return resolve_template("alpaca", tokenizer)


@pytest.fixture(scope="session")
def records(tiny_records: Path) -> Records:
    return read_records(tiny_records)


@pytest.fixture(scope="session")
def encoded(records: Records, tokenizer: Tokenizer, template: Template) -> Encode:
    """Encodes the records; settings as those of `encode_records`."""
    return partial(encode_records, records, tokenizer, template, max_length=90)


def assert_equal(a: Encoded, b: Encoded) -> None:
    for field in fields(Encoded):
        one, other = getattr(a, field.name), getattr(b, field.name)
        assert one.dtype == other.dtype, field.name
        assert np.array_equal(one, other), field.name


def in_memory(data: Encoded) -> Encoded:
    """A copy that a change of the file does not change."""
    return Encoded(**{name: np.array(values) for name, values in vars(data).items()})


def test_records_are_prompt_answer_and_eos(
    encoded: Encode, records: Records, tokenizer: Tokenizer, template: Template
) -> None:
    data = encoded(max_length=10_000)
    assert len(data) == len(records) == 48
    assert data.n_cut == 0
    assert data.source_row.tolist() == list(range(48))
    assert data.length.sum() == len(data.ids)
    for index, record in enumerate(records):
        ids, n_prompt = data.record(index).tolist(), int(data.n_prompt[index])
        assert ids[0] == tokenizer.bos_id
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.eos_id not in ids[:-1]
        assert ids[:n_prompt] == template.encode_prompt(tokenizer, record.instruction, record.input)
        assert tokenizer.decode(ids[n_prompt:-1]) == record.output
        assert data.variant[index] == (0 if record.input else 1)


def test_cutting_takes_the_start_of_the_prompt(encoded: Encode) -> None:
    whole = encoded(max_length=10_000)
    limit = int(np.median(whole.length))
    data = encoded(max_length=limit)
    assert 0 < data.n_cut < len(data) == 48
    for index in range(48):
        full, short = whole.record(index), data.record(index)
        assert len(short) == min(limit, len(full))
        assert np.array_equal(short, full[len(full) - len(short) :])
        answer = full[whole.n_prompt[index] :]
        assert np.array_equal(short[data.n_prompt[index] :], answer)
        assert data.whole[index] == (len(full) <= limit)


def test_records_whose_answer_does_not_fit_are_dropped(
    encoded: Encode, records: Records, tokenizer: Tokenizer
) -> None:
    whole = encoded(max_length=10_000)
    n_answer = whole.length - whole.n_prompt
    limit = int(np.median(n_answer))
    data = encoded(max_length=limit)
    fits = n_answer < limit  # one token of prompt has to precede it
    assert 0 < fits.sum() < 48
    assert data.source_row.tolist() == np.flatnonzero(fits).tolist()
    assert (data.n_prompt >= 1).all()
    assert (data.length <= limit).all()
    for place, row in enumerate(data.source_row.tolist()):
        assert tokenizer.decode(data.record(place)[data.n_prompt[place] : -1].tolist()) == records[row].output


def test_everything_dropped_leaves_empty_arrays_that_the_cache_keeps(encoded: Encode, tmp_path: Path) -> None:
    for _ in range(2):
        data = encoded(max_length=1, cache=tmp_path)
        assert len(data) == 0
        assert data.start.tolist() == []


def forbid_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("encoded again instead of reading the cache")

    monkeypatch.setattr(encode, "_encode_all", fail)


def test_the_second_call_reads_the_cache(
    encoded: Encode,
    records: Records,
    tokenizer: Tokenizer,
    template: Template,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"cache": tmp_path / "new" / "folder", "tokenizer_key": "k"}
    first = encoded(**settings)
    assert_equal(first, encoded())
    few = encode_few(records, tokenizer, template, max_length=90)
    assert_equal(first, few)
    assert few.n_cut == first.n_cut > 0
    forbid_encoding(monkeypatch)
    assert_equal(first, encoded(**settings))


def test_what_decides_the_tokens_decides_the_file(
    records: Records, tokenizer: Tokenizer, template: Template, tmp_path: Path
) -> None:
    other_template = resolve_template("alpaca-newline", tokenizer)
    other_records = Records((Record("a", "", "b"), *records.rows), "other")
    reordered = Records(records.rows[::-1], "reordered")
    cases = [
        (records, template, 90, "key"),
        (records, template, 91, "key"),
        (records, template, 90, "another key"),
        (records, other_template, 90, "key"),
        (other_records, template, 90, "key"),
        (reordered, template, 90, "key"),
    ]
    for count, (rows, form, length, key) in enumerate(cases, start=1):
        encode_records(rows, tokenizer, form, max_length=length, cache=tmp_path, tokenizer_key=key)
        assert len(list(tmp_path.iterdir())) == count


def flipped(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "flipped": flipped,
    "empty": lambda content: b"",
    "short": lambda content: content[:-2],
    "text": lambda content: b"no numbers at all",
}


def test_a_cache_whose_name_is_refused_is_done_without(encoded: Encode, tmp_path: Path) -> None:
    said: list[str] = []
    long = tmp_path / ("a" * 300)
    first = encoded()
    assert_equal(first, encoded(cache=long, say=said.append))
    assert [line.startswith("tokens are not cached: ") for line in said] == [True]


@pytest.mark.parametrize("name", ["ids", "length", "about.json"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_cache_is_made_anew_with_a_line(
    encoded: Encode, tmp_path: Path, damage: Callable[[bytes], bytes], name: str
) -> None:
    said: list[str] = []

    def again() -> Encoded:
        return encoded(cache=tmp_path, say=said.append)

    first = in_memory(again())
    (folder,) = tmp_path.iterdir()
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    assert_equal(first, again())
    assert said == [f"{folder}: damaged cache of tokens, or of another version; it is made again"]
    assert_equal(first, again())
    assert len(said) == 1


def test_any_flipped_bit_of_the_cache_is_noticed(encoded: Encode, tmp_path: Path) -> None:
    def again() -> Encoded:
        return encoded(cache=tmp_path, say=said.append)

    said: list[str] = []
    first = in_memory(again())
    draw = np.random.default_rng(0)
    (folder,) = tmp_path.iterdir()
    paths = sorted(path for path in folder.iterdir() if path.stat().st_size)
    for path in [*paths, *draw.choice(paths, 20)]:
        content = bytearray(path.read_bytes())
        content[draw.integers(len(content))] ^= 1 << int(draw.integers(8))
        path.write_bytes(content)
        said.clear()
        assert_equal(first, again())
        assert len(said) == 1


def test_encoding_goes_on_where_it_was_interrupted(
    encoded: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was committed is not encoded again, and what was written after that is."""
    monkeypatch.setattr(encode, "CHUNK", 5)
    monkeypatch.setattr(table, "SECONDS", -1)
    encode_chunk, firsts = encode._encode_chunk, []

    def stop_at(limit: int) -> Callable:
        def chunk(*arguments: Any) -> Any:
            firsts.append(arguments[-2])
            if arguments[-2] >= limit:
                raise KeyboardInterrupt
            return encode_chunk(*arguments)

        return chunk

    whole = encoded()
    for limit in (20, 30):
        monkeypatch.setattr(encode, "_encode_chunk", stop_at(limit))
        with pytest.raises(KeyboardInterrupt):
            encoded(cache=tmp_path)
        (folder,) = tmp_path.iterdir()
        with (folder / "ids").open("ab") as file:
            file.write(b"more than was committed")
    firsts.clear()
    monkeypatch.setattr(encode, "_encode_chunk", stop_at(100))
    said: list[str] = []
    found = encoded(cache=tmp_path, say=said.append)
    assert_equal(found, whole)
    assert (firsts, said) == ([30, 35, 40, 45], [])


KILLED = """
import sys, time
from pathlib import Path
from lit_adapter.data import encode
from lit_adapter.data.records import read_records
from lit_adapter.files import table
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template

base, records, cache = map(Path, sys.argv[1:])
encode_chunk, encode.CHUNK, table.SECONDS = encode._encode_chunk, 2, -1

def slowly(*arguments):
    print(arguments[-2], flush=True)
    time.sleep(0.02)
    return encode_chunk(*arguments)

encode._encode_chunk = slowly
tokenizer = load_tokenizer(base)
template = resolve_template("alpaca", tokenizer)
encode.encode_records(read_records(records), tokenizer, template, max_length=90, cache=cache)
"""


def test_encoding_goes_on_after_a_kill(
    encoded: Encode, tiny_base: Path, tiny_records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", KILLED, *map(str, (tiny_base, tiny_records, tmp_path))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = next(int(line) for line in process.stdout if int(line) >= 20)
        process.kill()
    firsts = []

    def noted(*arguments: Any) -> Any:
        firsts.append(arguments[-2])
        return encode_chunk(*arguments)

    encode_chunk = encode._encode_chunk
    monkeypatch.setattr(encode, "_encode_chunk", noted)
    found = encoded(cache=tmp_path)
    assert last - 2 <= firsts[0] < 48
    assert_equal(found, encoded())


def test_what_was_committed_and_then_damaged_is_encoded_again(
    encoded: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "CHUNK", 20)
    monkeypatch.setattr(table, "SECONDS", -1)
    encode_chunk = encode._encode_chunk

    def first_only(*arguments: Any) -> Any:
        if arguments[-2]:
            raise KeyboardInterrupt
        return encode_chunk(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "_encode_chunk", first_only)
        with pytest.raises(KeyboardInterrupt):
            encoded(cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "ids").write_bytes(flipped((folder / "ids").read_bytes()))
    said: list[str] = []
    found = encoded(cache=tmp_path, say=said.append)
    assert_equal(found, encoded())
    assert len(said) == 1


def test_a_full_disk_leaves_no_half_cache(
    encoded: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(table, "fsync", full)
    said: list[str] = []
    found = encoded(cache=tmp_path, say=said.append)
    assert_equal(found, encoded())
    assert list(tmp_path.iterdir()) == []
    (line,) = said
    assert re.fullmatch(r"tokens are not cached: .*No space left on device \(needs [\d,]+ bytes, .*", line)


def test_chosen_records_are_those_of_the_whole(
    records: Records, tokenizer: Tokenizer, template: Template, tmp_path: Path
) -> None:
    """Some are dropped for their length; tokens are shared, also with another process."""
    typed = Record("say </s>", "", "what </s> is")
    every = Records((*records, typed), "all")
    lengths = encode_records(every, tokenizer, template, max_length=1000)
    limit = int(np.median(lengths.length - lengths.n_prompt))
    whole = encode_records(every, tokenizer, template, max_length=limit, cache=tmp_path)
    rows = np.flatnonzero(np.arange(len(every)) % 3 == 0)
    chosen, again = whole.choose(rows, len(every)), every.choose(rows, "some")
    alone = encode_records(again, tokenizer, template, max_length=limit)
    assert 0 < len(chosen) < len(rows)
    pickled = pickle.dumps(chosen)
    for found in (chosen, pickle.loads(pickled)):
        assert [found.record(i).tolist() for i in range(len(found))] == [
            alone.record(i).tolist() for i in range(len(alone))
        ]
        for name in ("length", "n_prompt", "variant", "whole", "source_row", "look_alikes"):
            assert np.array_equal(getattr(found, name), getattr(alone, name)), name
        assert found.look_alikes.tolist() == [[16, tokenizer.eos_id]]
    assert str(tmp_path).encode() in pickled
    shutil.rmtree(tmp_path)
    copied = pickle.loads(pickle.dumps(chosen))  # a cache may be deleted at any time
    assert np.array_equal(copied.ids, whole.ids)


def test_worker_processes_give_the_same_arrays(encoded: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    here = encoded()
    started: list[object] = []

    class Counted(encode.ProcessPoolExecutor):
        def __init__(self, workers: int, **settings: object) -> None:
            started.append(workers)
            super().__init__(2, **settings)

    monkeypatch.setattr(encode, "PARALLEL_FROM", 10)
    monkeypatch.setattr(encode, "ProcessPoolExecutor", Counted)
    monkeypatch.setattr(encode.os, "sched_getaffinity", lambda process: {3, 5})
    assert_equal(here, encoded())
    assert started == [2]


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_an_error_in_one_line(
    encoded: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "PARALLEL_FROM", 10)
    monkeypatch.setattr(encode.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(encode, "_encode_in_worker", die)
    with pytest.raises(UserError, match=r"a process that encodes records died; .* lack of memory"):
        encoded()


def test_processes_that_want_the_same_encode_it_once(
    encoded: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand for them: such a lock belongs to an open file. The first one fails half way."""
    calls: list[float] = []

    def slowly(*arguments: Any) -> Any:
        calls.append(time.monotonic())
        time.sleep(0.3)
        if len(calls) == 1:
            raise MemoryError
        return encode_all(*arguments)

    encode_all = encode._encode_all
    monkeypatch.setattr(encode, "_encode_all", slowly)
    with ThreadPoolExecutor(4) as pool:
        tries = [pool.submit(encoded, cache=tmp_path) for _ in range(4)]
    assert Counter(type(one.exception()) for one in tries) == {NoneType: 3, MemoryError: 1}
    assert len(calls) == 2
    assert calls[1] - calls[0] > 0.29
    assert [path.name[:7] for path in tmp_path.iterdir()] == ["tokens-"]


def test_nobody_waits_for_a_process_that_was_killed(encoded: Encode, tmp_path: Path) -> None:
    encoded(cache=tmp_path)
    (path,) = tmp_path.iterdir()
    shutil.rmtree(path)
    code = f"""
from pathlib import Path
from lit_adapter.files.locks import one_at_a_time
with one_at_a_time(Path({str(path)!r})):
    print(flush=True)
    input()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"\n"
        assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]
        start = time.monotonic()
        threading.Timer(0.5, first.kill).start()
        encoded(cache=tmp_path)
        assert time.monotonic() - start > 0.4
    assert list(tmp_path.iterdir()) == [path]


def test_a_control_token_typed_by_a_user_stays_text(tokenizer: Tokenizer, template: Template) -> None:
    rows = Records((Record("say </s>", "<s>", "it is </s> here"),), "typed")
    data = encode_records(rows, tokenizer, template, max_length=1000)
    ids = data.record(0).tolist()
    assert ids.count(tokenizer.eos_id) == 1
    assert ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids[data.n_prompt[0] :]) == "it is </s> here"
