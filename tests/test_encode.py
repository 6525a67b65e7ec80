from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pytest

from lit_adapter.data import encode
from lit_adapter.data.encode import Encoded, encode_records
from lit_adapter.data.record import Record
from lit_adapter.data.records import Records, read_records
from lit_adapter.errors import UserError
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import Template, resolve_template
from lit_adapter.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return load_tokenizer(tiny_base)


@pytest.fixture(scope="session")
def template(tokenizer: Tokenizer) -> Template:
    return resolve_template("alpaca", tokenizer)


@pytest.fixture(scope="session")
def records(tiny_records: Path) -> Records:
    return read_records(tiny_records)


def assert_equal(a: Encoded, b: Encoded) -> None:
    for field in fields(Encoded):
        one, other = getattr(a, field.name), getattr(b, field.name)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other), field.name


def test_records_are_prompt_answer_and_eos(
    records: Records, tokenizer: Tokenizer, template: Template
) -> None:
    data = encode_records(records, tokenizer, template, max_length=10_000)
    assert len(data) == len(records) == 48
    assert data.n_cut == 0
    assert data.source_row.tolist() == list(range(48))
    assert data.length.sum() == len(data.ids) == data.start[-1]
    for index, record in enumerate(records):
        ids, n_prompt = data.record(index).tolist(), int(data.n_prompt[index])
        assert ids[0] == tokenizer.bos_id
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.eos_id not in ids[:-1]
        assert ids[:n_prompt] == template.encode_prompt(tokenizer, record.instruction, record.input)
        assert tokenizer.decode(ids[n_prompt:-1]) == record.output
        assert data.variant[index] == (0 if record.input else 1)


def test_cutting_takes_the_start_of_the_prompt(
    records: Records, tokenizer: Tokenizer, template: Template
) -> None:
    whole = encode_records(records, tokenizer, template, max_length=10_000)
    limit = int(np.median(whole.length))
    data = encode_records(records, tokenizer, template, max_length=limit)
    assert 0 < data.n_cut < len(data) == 48
    for index in range(48):
        full, short = whole.record(index), data.record(index)
        assert len(short) == min(limit, len(full))
        assert np.array_equal(short, full[len(full) - len(short) :])
        answer = full[whole.n_prompt[index] :]
        assert np.array_equal(short[data.n_prompt[index] :], answer)
        assert data.whole[index] == (len(full) <= limit)


def test_records_whose_answer_does_not_fit_are_dropped(
    records: Records, tokenizer: Tokenizer, template: Template
) -> None:
    whole = encode_records(records, tokenizer, template, max_length=10_000)
    n_answer = whole.length - whole.n_prompt
    limit = int(np.median(n_answer))
    data = encode_records(records, tokenizer, template, max_length=limit)
    fits = n_answer < limit  # one token of prompt has to precede it
    assert 0 < fits.sum() < 48
    assert data.source_row.tolist() == np.flatnonzero(fits).tolist()
    assert (data.n_prompt >= 1).all()
    assert (data.length <= limit).all()
    for place, row in enumerate(data.source_row.tolist()):
        assert tokenizer.decode(data.record(place)[data.n_prompt[place] : -1].tolist()) == records[row].output


def test_everything_dropped_leaves_empty_arrays_that_the_cache_keeps(
    records: Records, tokenizer: Tokenizer, template: Template, tmp_path: Path
) -> None:
    for _ in range(2):
        data = encode_records(records, tokenizer, template, max_length=1, cache=tmp_path)
        assert len(data) == 0
        assert data.start.tolist() == [0]


def forbid_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("encoded again instead of reading the cache")

    monkeypatch.setattr(encode, "_encode_all", fail)


def test_the_second_call_reads_the_cache(
    records: Records,
    tokenizer: Tokenizer,
    template: Template,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"max_length": 90, "cache": tmp_path / "new" / "folder", "tokenizer_key": "k"}
    first = encode_records(records, tokenizer, template, **settings)
    assert_equal(first, encode_records(records, tokenizer, template, max_length=90))
    forbid_encoding(monkeypatch)
    assert_equal(first, encode_records(records, tokenizer, template, **settings))


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


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    """One bit of a tensor: the file stays a valid safetensors file."""
    return content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": truncated,
    "flipped": flipped,
    "empty": lambda content: b"",
    "header": lambda content: content[:20] + b"\xff" + content[21:],
    "one-byte-short": lambda content: content[:-1],
    "text": lambda content: b"not a tensor file at all",
}


def test_a_cache_whose_name_is_refused_is_done_without(
    records: Records,
    tokenizer: Tokenizer,
    template: Template,
    tmp_path: Path,
) -> None:
    said: list[str] = []
    long = tmp_path / ("a" * 300)
    first = encode_records(records, tokenizer, template, max_length=90, cache=None)
    assert_equal(
        first, encode_records(records, tokenizer, template, max_length=90, cache=long, say=said.append)
    )
    assert [line.startswith("tokens are not cached: ") for line in said] == [True]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_cache_is_made_anew_with_a_line(
    records: Records,
    tokenizer: Tokenizer,
    template: Template,
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
) -> None:
    said: list[str] = []

    def again() -> Encoded:
        return encode_records(records, tokenizer, template, max_length=90, cache=tmp_path, say=said.append)

    first = again()
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert_equal(first, again())
    assert said == [f"{path}: damaged token cache; encoding again"]
    assert_equal(first, again())
    assert len(said) == 1


def test_any_flipped_bit_of_the_tensors_is_noticed(
    records: Records, tokenizer: Tokenizer, template: Template, tmp_path: Path
) -> None:
    first = encode_records(records, tokenizer, template, max_length=90, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    draw = np.random.default_rng(0)
    for place in draw.integers(header, len(content), 25).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(damaged)
        said: list[str] = []
        again = encode_records(records, tokenizer, template, max_length=90, cache=tmp_path, say=said.append)
        assert_equal(first, again)
        assert said


def test_any_flipped_bit_of_the_header_is_noticed(
    records: Records, tokenizer: Tokenizer, template: Template, tmp_path: Path
) -> None:
    first = encode_records(records, tokenizer, template, max_length=90, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    key = encode._key(records, template, 90, "", False)
    assert_equal(first, encode._read_cache(path, key))
    for place in range(8 + int.from_bytes(content[:8], "little")):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        found = encode._read_cache(path, key)
        if found is not None:  # a bit that changes nothing, such as one of the padding's
            assert_equal(first, found)


def test_worker_processes_give_the_same_arrays(
    records: Records, tokenizer: Tokenizer, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = encode_records(records, tokenizer, template, max_length=90)
    started: list[object] = []

    class Counted(encode.ProcessPoolExecutor):
        def __init__(self, workers: int, **settings: object) -> None:
            started.append(workers)
            super().__init__(2, **settings)

    monkeypatch.setattr(encode, "PARALLEL_FROM", 10)
    monkeypatch.setattr(encode, "ProcessPoolExecutor", Counted)
    monkeypatch.setattr(encode.os, "sched_getaffinity", lambda process: {3, 5})
    assert_equal(here, encode_records(records, tokenizer, template, max_length=90))
    assert started == [2]


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_an_error_in_one_line(
    records: Records, tokenizer: Tokenizer, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "PARALLEL_FROM", 10)
    monkeypatch.setattr(encode.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(encode, "encode_example", die)
    with pytest.raises(UserError, match=r"a process that encodes records died; .* lack of memory"):
        encode_records(records, tokenizer, template, max_length=90)


def test_processes_that_want_the_same_encode_it_once(
    records: Records,
    tokenizer: Tokenizer,
    template: Template,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
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
        tries = [
            pool.submit(encode_records, records, tokenizer, template, max_length=90, cache=tmp_path)
            for _ in range(4)
        ]
    assert Counter(type(one.exception()) for one in tries) == {NoneType: 3, MemoryError: 1}
    assert len(calls) == 2
    assert calls[1] - calls[0] > 0.29
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_nobody_waits_for_a_process_that_was_killed(
    records: Records, tokenizer: Tokenizer, template: Template, tmp_path: Path
) -> None:
    encode_records(records, tokenizer, template, max_length=90, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.unlink()
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
        threading.Timer(0.5, first.kill).start()
        start = time.monotonic()
        encode_records(records, tokenizer, template, max_length=90, cache=tmp_path)
        assert time.monotonic() - start > 0.4
    assert list(tmp_path.iterdir()) == [path]


def test_a_control_token_typed_by_a_user_stays_text(tokenizer: Tokenizer, template: Template) -> None:
    rows = Records((Record("say </s>", "<s>", "it is </s> here"),), "typed")
    data = encode_records(rows, tokenizer, template, max_length=1000)
    ids = data.record(0).tolist()
    assert ids.count(tokenizer.eos_id) == 1
    assert ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids[data.n_prompt[0] :]) == "it is </s> here"
