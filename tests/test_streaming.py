"""Streamed records: their order, resuming at the exact record, bounded memory, and whole runs."""

from __future__ import annotations

import json
import pickle
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from finetune_runs import Stopper, arguments
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizer_kinds import MAKERS
from warm_runs import Run, run_code, two_ranks

from lit_adapter.config import Columns, Config, DataConfig
from lit_adapter.data import streaming
from lit_adapter.data.encode import encode_records
from lit_adapter.data.packing import Packer, share_of_step
from lit_adapter.data.record import AnyRecord
from lit_adapter.data.records import Records
from lit_adapter.data.sources import check_sources
from lit_adapter.data.store import Source
from lit_adapter.data.stream_module import StreamedSteps
from lit_adapter.data.streaming import Place, Stream, StreamReader
from lit_adapter.errors import UserError
from lit_adapter.text.template import resolve_template
from lit_adapter.training.finetune import finetune

SIZES = {"a.jsonl": 13, "b.parquet": 22, "c[1].ndjson": 9}
BUFFER = 7
STREAM = ("--data.stream", "true", "--data.val_size", "0", "--optim.max_steps", "9")


def rows(name: str, count: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"Say {name[0]} {n}.", "input": "", "output": f"{name[0]}{n} " * (n % 3 + 1)}
        for n in range(count)
    ]


def written(folder: Path, sizes: dict[str, int] = SIZES) -> list[Path]:
    """Files of records, one of each kind that can be streamed; lines may be blank."""
    folder.mkdir(exist_ok=True)
    for name, count in sizes.items():
        made = rows(name, count)
        if name.endswith("parquet"):
            table = pa.Table.from_pylist([row | {"unused": 1} for row in made])
            parquet.write_table(table, folder / name, row_group_size=5)
        else:
            lines = [json.dumps(row) for row in made]
            lines.insert(3, "  ")
            (folder / name).write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    return [folder / name for name in sizes]


def stream_of(paths: list[Path], seed: int = 3) -> Stream:
    return Stream([Source(path, path.name) for path in paths], Columns(), seed)


@pytest.fixture
def short_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BUFFER", BUFFER)


@pytest.fixture
def stream(tmp_path: Path, short_buffers: None) -> Stream:
    return stream_of(written(tmp_path / "files"))


def outputs(records: list[AnyRecord]) -> list[str]:
    return [record.texts[-1].split()[0] for record in records]


def expected(seed: int, epoch: int) -> list[str]:
    """An epoch's order, as the module's docstring says it."""
    names = list(SIZES)
    order = np.random.default_rng((seed, epoch)).permutation(len(names))
    flat = [f"{names[shard][0]}{n}" for shard in order for n in range(SIZES[names[shard]])]
    found = []
    for number, start in enumerate(range(0, len(flat), BUFFER)):
        buffer = flat[start : start + BUFFER]
        found += [buffer[n] for n in np.random.default_rng((seed, epoch, number)).permutation(len(buffer))]
    return found


def read(stream: Stream, count: int, place: Place = Place()) -> list[tuple[Place, list[AnyRecord]]]:  # noqa: B008
    return list(islice(stream.buffers(place), count))


def test_the_order_is_a_function_of_seed_and_epoch(stream: Stream, tmp_path: Path) -> None:
    total = sum(SIZES.values())
    buffers = read(stream, 3 * -(-total // BUFFER))
    flat = [name for _, buffer in buffers for name in outputs(buffer)]
    epochs = [flat[n * total : (n + 1) * total] for n in range(3)]
    assert epochs == [expected(3, epoch) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(expected(4, 0))
    other = stream_of([file.path for file in stream.files], seed=4)
    assert outputs(read(other, 1)[0][1]) == expected(4, 0)[:BUFFER] != epochs[0][:BUFFER]


def test_records_have_their_file_and_line(stream: Stream) -> None:
    records = [record for _, buffer in read(stream, 7) for record in buffer]
    lines = {record.origin: outputs([record])[0] for record in records}
    assert lines["a.jsonl:1"] == "a0"
    assert lines["a.jsonl:5"] == "a3"  # after the blank line
    assert lines["b.parquet:22"] == "b21"
    assert len(lines) == sum(SIZES.values())


def test_from_the_place_of_any_buffer_the_order_goes_on(stream: Stream) -> None:
    buffers = read(stream, 10)
    n_before = 0
    for number, (place, buffer) in enumerate(buffers):
        assert place.record == n_before
        n_before += len(buffer)
        again = read(stream, min(3, 10 - number), Place(*json.loads(json.dumps([*place]))))
        assert again == buffers[number : number + 3]


@settings(max_examples=6)
@given(st.data())
def test_any_records_can_be_asked_for_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BUFFER", BUFFER)
        stream = stream_of(written(tmp_path_factory.getbasetemp() / "any"))
        flat = expected(3, 0) + expected(3, 1)
        reader = StreamReader(stream)
        for _ in range(4):
            first = data.draw(st.integers(0, 70))
            count = data.draw(st.integers(1, 17))
            assert outputs(reader.records(first, count)) == flat[first : first + count]
            stream.start = data.draw(st.sampled_from([Place(), reader.place or Place()]))
            if data.draw(st.booleans()):
                reader = pickle.loads(pickle.dumps(StreamReader(stream)))


def test_a_buffer_is_bounded_in_characters_too(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BUFFER_CHARACTERS", 40)
    buffers = [buffer for _, buffer in read(stream, 12)]
    lengths = [[sum(map(len, record.texts)) for record in buffer] for buffer in buffers]
    assert max(map(len, buffers)) < BUFFER
    assert all(sum(one) - max(one) < 40 for one in lengths)


def test_steps_are_packed_as_those_of_records_that_are_kept(tmp_path: Path, stream: Stream) -> None:
    tokenizer = MAKERS["json-bytes"](tmp_path).ours
    template = resolve_template("alpaca", tokenizer)

    def encode(records: list[AnyRecord]) -> Any:
        return encode_records(Records(tuple(records), "x"), tokenizer, template, max_length=400)

    def pack(encoded: Any) -> Packer:
        return Packer(encoded, {}, mask_prompt=True, row_tokens=600)

    for n_processes in (1, 2):
        for rank in range(n_processes):
            steps = StreamedSteps(StreamReader(stream), encode, pack, 8, rank, n_processes)
            for step in (0, 4, 5, 1):
                batch = steps[step]
                assert not isinstance(batch, UserError)
                records = StreamReader(stream).records(8 * step, 8)
                theirs = share_of_step(pack(encode(records)), np.arange(8), step, rank, n_processes)
                assert (batch.step, batch.n_targets, batch.n_tokens) == (
                    step,
                    theirs.n_targets,
                    theirs.n_tokens,
                )
                assert [row.ids.tolist() for row in batch.rows] == [row.ids.tolist() for row in theirs.rows]


def adapters(*configs: Config) -> list[bytes]:
    return [Path(config.out, "adapter.safetensors").read_bytes() for config in configs]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_at_the_exact_record(
    tiny: Callable[..., Config], tmp_path: Path, short_buffers: None, workers: int
) -> None:
    """Nine steps of eight records: more than an epoch of 44."""
    folder = str(written(tmp_path / "files")[0].parent)
    options = ("--data.train", folder, *STREAM)
    whole = tiny(*options)
    stopped = tiny(*options, "--data.workers", str(workers), out="stopped")
    lines: list[str] = []
    assert finetune(whole, say=lines.append) == 0
    for at in ("step 2/", "step 6/"):
        assert finetune(stopped, "last" if at == "step 6/" else None, say=Stopper(at)) == 143
    assert finetune(stopped, "last", say=lambda line: None) == 0
    first, second = adapters(whole, stopped)
    assert first == second
    said = "\n".join(lines)
    assert "files, a stream of 3 files; at its beginning: 7 training records" in said
    assert (
        "the rest is read during training: files in random order, their records shuffled within 10,000;"
        in said
    )
    assert "run: 9 steps of 8 records; lr" in said
    record = json.loads(Path(whole.out, "run.json").read_text())
    assert record["epochs"] is None
    assert record["data"]["train_records"] is None


@pytest.mark.slow
def test_a_killed_run_goes_on_at_the_exact_record(tiny_base: Path, tmp_path: Path) -> None:
    files = written(tmp_path / "files", {"a.jsonl": 300, "b.parquet": 200})[0].parent
    cache = {"LIT_ADAPTER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    options = (*STREAM[:-1], "30", "--trainer.save_every", "3", "--data.workers", "1")
    whole = Run(arguments(tiny_base, files, tmp_path / "whole", *options), tmp_path / "log", cache)
    assert whole.wait() == 0, whole.output
    killed = Run(arguments(tiny_base, files, tmp_path / "killed", *options), tmp_path / "log2", cache)
    killed.wait_for("step 11/")
    killed.process.kill()
    assert killed.wait() == -signal.SIGKILL
    command = arguments(tiny_base, files, tmp_path / "killed", *options, "--resume", "last")
    again = Run(command, tmp_path / "log3", cache)
    assert again.wait() == 0, again.output
    found = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("whole", "killed")]
    assert found[0] == found[1]


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+/\d+  loss (\S+)", output, re.MULTILINE)]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tiny_base: Path, tmp_path: Path) -> None:
    files = written(tmp_path / "files")[0].parent
    cache = {"LIT_ADAPTER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    one = Run(arguments(tiny_base, files, tmp_path / "one", *STREAM), tmp_path / "log", cache)
    assert one.wait() == 0, one.output
    two = two_ranks(arguments(tiny_base, files, tmp_path / "two", *STREAM), tmp_path / "log2", cache)
    for run in two:
        assert run.wait() == 0, run.output
    assert len(losses(one.output)) == 9
    assert losses(two[0].output) == pytest.approx(losses(one.output), abs=2e-4)


def test_a_stream_of_other_files_is_another_run(
    tiny: Callable[..., Config], tmp_path: Path, short_buffers: None
) -> None:
    files = written(tmp_path / "files")
    config = tiny("--data.train", str(files[0].parent), *STREAM)
    assert finetune(config, say=Stopper("step 2/")) == 143
    with files[0].open("a") as file:
        file.write(json.dumps(rows("d", 1)[0]) + "\n")
    with pytest.raises(
        UserError,
        match=r"cannot resume another run: data\.train .*: its files have changed \(3 files then, 3 files",
    ):
        finetune(config, "last", say=lambda line: None)


@pytest.mark.parametrize("offset", [40, -40])
def test_a_stream_whose_file_has_other_records_of_the_same_size_is_another_run(
    tiny: Callable[..., Config], tmp_path: Path, short_buffers: None, offset: int
) -> None:
    path = written(tmp_path / "files", {"a.jsonl": 5000})[0]
    config = tiny("--data.train", str(path.parent), *STREAM)
    assert finetune(config, say=Stopper("step 2/")) == 143
    before = path.read_bytes()
    at = before.index(b"Say", offset % len(before) - 40)
    path.write_bytes(before[:at] + b"Yas" + before[at + 3 :])
    with pytest.raises(
        UserError, match=r"cannot resume another run: data\.train .*: the content of its files has changed$"
    ):
        finetune(config, "last", say=lambda line: None)
    path.write_bytes(before)
    assert finetune(config, "last", say=Stopper("step 3/")) == 143


def test_a_path_that_would_be_taken_apart_is_refused(tmp_path: Path) -> None:
    (path,) = written(tmp_path / "a::b", {"a.jsonl": 3})
    config = DataConfig(train=str(path), stream=True, val_size=0)
    with pytest.raises(
        UserError, match=r"a\.jsonl: data\.stream would read the '::' in 'a::b' as a chained address"
    ) as found:
        check_sources(config)
    assert "\n" not in str(found.value)
    check_sources(replace(config, stream=False))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_malformed_record_in_the_middle_is_named_and_leaves_the_checkpoint(
    tiny: Callable[..., Config], tmp_path: Path, short_buffers: None, workers: int
) -> None:
    path = tmp_path / "long.jsonl"
    lines = [json.dumps(row) for row in rows("a", 40)]
    lines[30] = '{"instruction": "a", "output": 5}'
    path.write_text("\n".join(lines))
    options = ("--trainer.save_every", "1", "--data.workers", str(workers))
    config = tiny("--data.train", str(path), *STREAM, *options)
    with pytest.raises(
        UserError, match=r"long\.jsonl:31: .*'output' is the number 5; expected a string"
    ) as found:
        finetune(config, say=lambda line: None)
    assert "Traceback" not in str(found.value)
    assert [*Path(config.out).glob("checkpoints/*.ckpt")]


def test_a_dry_run_looks_at_the_beginning(tiny: Callable[..., Config], tmp_path: Path) -> None:
    lines: list[str] = []
    config = tiny("--data.train", str(written(tmp_path / "files")[0].parent), *STREAM)
    assert finetune(config, say=lines.append, dry_run=True) == 0
    said = "\n".join(lines)
    assert "at its beginning: 44 training records" in said
    assert "time: about" in said
    assert "%) of the training" not in said


def test_held_out_records_of_a_stream_are_a_source_of_their_own(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    files = written(tmp_path / "files")
    options = ("--data.train", str(files[1]), *STREAM[:2], "--data.val", str(files[0]))
    lines: list[str] = []
    assert finetune(tiny(*options, "--optim.max_steps", "2"), say=lines.append) == 0
    assert "13 held-out records" in "\n".join(lines)
    assert any("held-out loss" in line for line in lines)


def test_without_datasets_one_line_says_what_to_install(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"^data\.stream needs datasets; run: pip install 'datasets>=4'$"):
        finetune(tiny("--data.train", str(written(tmp_path / "f")[0]), *STREAM), say=lambda line: None)


PEAKS = """
import itertools, json, pathlib, resource, sys
from lit_adapter.config import Columns
from lit_adapter.data import streaming
from lit_adapter.data.store import Source
streaming.BUFFER = 2000
for count in (60_000, 240_000):
    path = pathlib.Path(sys.argv[1])
    with path.open("w") as file:
        for n in range(count):
            file.write(json.dumps({"instruction": f"Say {n}", "output": "word " * 100}) + "\\n")
    stream = streaming.Stream([Source(path, path.name)], Columns(), 0)
    buffers = itertools.islice(stream.buffers(streaming.Place()), count // 2000)
    assert sum(len(buffer) for _, buffer in buffers) == count
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_stream(tmp_path: Path) -> None:
    """A hundred megabytes more of records pass through buffers of one megabyte."""
    done = run_code(PEAKS, tmp_path / "long.jsonl")
    assert done.returncode == 0, done.stderr
    short, long = (1024 * int(line) for line in done.stdout.split())
    assert long < short + 60e6  # of records that were kept, more than twice as much
