"""Fuzz record files, adapter files and prompts. A reader returns what it read or raises one line.

The number of examples is printed at the end of the run.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tokenizer_kinds import HARD, MAKERS, Kind

from lit_adapter.data.encode import encode_records
from lit_adapter.data.packing import Packer
from lit_adapter.data.record import Record
from lit_adapter.data.records import Records, read_records
from lit_adapter.errors import UserError
from lit_adapter.model.adapter import adapter_shapes
from lit_adapter.text.template import Template, resolve_template
from lit_adapter.weights.adapter_file import METADATA_KEY, read_adapter
from lit_adapter.weights.base_folder import read_config

QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
LOOK_ALIKES = [
    *HARD,
    "### Response:",
    "### Instruction:\n",
    "{output}",
    "\0",
    "<|endoftext|>",
    "[INST]",
    "\ud83d",
]
ANY_TEXT = st.text(max_size=10) | st.lists(
    st.sampled_from(LOOK_ALIKES) | st.text(max_size=4), max_size=4
).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
HUGE = st.sampled_from([2**31, 2**63, 10**30, -1, 0, 1e300])
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=6)), min_size=1, max_size=4
)


def edited(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """For every edit, replace ``cut`` bytes at ``place`` (0 to 1) by ``new``."""
    for place, cut, new in edits:
        at = round(place * len(content))
        content = content[:at] + new + content[at + cut :]
    return content


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Allow a `UserError` that names the file in one line, and nothing else."""
    try:
        yield
    except UserError as error:
        message = str(error)
        assert message.startswith(str(path)), message
        assert "\n" not in message
        message.encode()


@pytest.fixture
def examples(record_property: Callable[[str, object], None]) -> Iterator[list[int]]:
    """A list that grows by one with every example."""
    counted: list[int] = []
    yield counted
    record_property("examples", len(counted))


ROWS = [{"instruction": 'a, "b"\n', "input": "שלום", "output": "\U0001f468‍\U0001f469 </s>"}] * 3


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


FORMATS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1).encode(),
    ".jsonl": lambda rows: b"\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows),
    ".csv": as_csv,
    ".parquet": as_parquet,
}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_record_files(suffix: str, tmp_path: Path, examples: list[int]) -> None:
    whole = FORMATS[suffix](ROWS)

    @settings(max_examples=300, suppress_health_check=QUIET)
    @given(EDITS)
    def check(edits: list[tuple[float, int, bytes]]) -> None:
        examples.append(1)
        path = tmp_path / f"data{suffix}"
        path.write_bytes(edited(whole, edits))
        with one_line(path):
            assert all(record.output.strip() for record in read_records(path))

    check()


def test_records_of_any_json(tmp_path: Path, examples: list[int]) -> None:
    fields = st.fixed_dictionaries({}, optional=dict.fromkeys(("instruction", "input", "output", "x"), JSON))

    @settings(max_examples=300, suppress_health_check=QUIET)
    @given(st.lists(fields | JSON, max_size=3) | JSON, st.sampled_from([".json", ".jsonl"]))
    def check(value: Any, suffix: str) -> None:
        examples.append(1)
        path = tmp_path / f"data{suffix}"
        rows = value if isinstance(value, list) and suffix == ".jsonl" else [value]
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        with one_line(path):
            for record, row in zip(read_records(path), value, strict=False):
                assert record.instruction
                assert record.output == row["output"] or not row["output"].strip()

    check()


def test_damaged_adapter_files(tmp_path: Path, tiny_adapter: Path, examples: list[int]) -> None:
    whole = tiny_adapter.read_bytes()

    @settings(max_examples=400, suppress_health_check=QUIET)
    @given(EDITS)
    def check(edits: list[tuple[float, int, bytes]]) -> None:
        examples.append(1)
        path = tmp_path / "adapter.safetensors"
        path.write_bytes(edited(whole, edits))
        with one_line(path):
            info, state = read_adapter(path)
            shapes = adapter_shapes(info.adapter, info.model)
            assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
            assert all(bool(tensor.isfinite().all()) for tensor in state.values())

    check()


@pytest.mark.slow
def test_adapters_that_say_anything_of_themselves(
    tmp_path: Path, tiny_adapter: Path, examples: list[int]
) -> None:
    """The metadata with any JSON in any place."""
    state = load_file(tiny_adapter)
    good = _described(tiny_adapter)
    places = [
        (key, inner) for key in good for inner in [None, *(good[key] if isinstance(good[key], dict) else [])]
    ]

    @settings(max_examples=400, suppress_health_check=QUIET)
    @given(st.sampled_from(places), JSON | HUGE, st.booleans())
    def check(place: tuple[str, str | None], value: Any, remove: bool) -> None:
        examples.append(1)
        described = json.loads(json.dumps(good))
        key, inner = place
        target, name = (described, key) if inner is None else (described[key], inner)
        if remove:
            del target[name]
        else:
            target[name] = value
        path = tmp_path / "adapter.safetensors"
        save_file(state, path, metadata={METADATA_KEY: json.dumps(described)})
        with one_line(path):
            info, tensors = read_adapter(path)
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            assert shapes == adapter_shapes(info.adapter, info.model)

    check()


def test_configurations_of_any_json(tmp_path: Path, tiny_base: Path, examples: list[int]) -> None:
    """``config.json`` of a model with any JSON under any key."""
    good = json.loads((tiny_base / "config.json").read_text())
    more = ["rope_scaling", "rope_theta", "quantization_config", "head_dim", "hidden_act"]
    keys = st.sampled_from([*good, *more])
    rope = st.fixed_dictionaries(
        {"rope_type": st.sampled_from(["linear", "llama3"])}, optional={"factor": JSON}
    )

    @settings(max_examples=300, suppress_health_check=QUIET)
    @given(keys, JSON | HUGE | rope)
    def check(key: str, value: Any) -> None:
        examples.append(1)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(good | {key: value}))
        with one_line(path):
            assert read_config(tmp_path).n_embd > 0

    check()


def _described(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[METADATA_KEY])


@pytest.mark.parametrize("name", list(MAKERS))
def test_user_text_is_text_and_masks_are_positions(
    name: str, made: dict[str, Kind], examples: list[int]
) -> None:
    """Whatever the record holds, the targets are the answer's own tokens and the end token."""
    ours = made[name].ours
    control = set(ours.control_tokens.values())
    templates = [resolve_template(kind, ours) for kind in ("alpaca", "{instruction}\n{input} ### Response:")]

    @settings(max_examples=150, suppress_health_check=QUIET)
    @given(st.sampled_from(templates), ANY_TEXT, ANY_TEXT, ANY_TEXT)
    def check(template: Template, instruction: str, input_: str, output: str) -> None:
        examples.append(1)
        texts = (instruction, input_, output)
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            with pytest.raises(UserError, match="surrogate"):
                template.encode_example(ours, *texts)
            return
        ids, n_prompt = template.encode_example(ours, *texts)
        end = template.end_id(ours)
        assert ids[-1] == end
        assert not control & set(ids[n_prompt:-1])
        assert [token for token in ids[:n_prompt] if token in control] == (
            [ours.bos_id] if ours.add_bos and ours.bos_id in control else []
        )
        records = Records((Record(*texts),), "fuzz")
        encoded = encode_records(records, ours, template, max_length=len(ids))
        row = Packer(encoded, {}, mask_prompt=True, row_tokens=len(ids)).row([0])
        assert row.target_id.tolist() == ids[n_prompt:]
        assert row.target_index.tolist() == list(range(n_prompt - 1, len(ids) - 1))

    check()
