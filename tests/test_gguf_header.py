"""The header of a GGUF file, against the gguf package's reader; what is damaged is refused."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lit_adapter.errors import UserError
from lit_adapter.weights import gguf_header
from lit_adapter.weights.gguf_header import read_header


def written(path: Path, alignment: int | None = None) -> Path:
    """A file with a value of every type, arrays of them, and tensors of several types."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    numbers: dict[str, Any] = {"uint": 2**16 - 1, "int": -3}
    for bits in (8, 16, 32, 64):
        getattr(writer, f"add_uint{bits}")(f"u{bits}", numbers["uint"] % 2**bits)
        getattr(writer, f"add_int{bits}")(f"i{bits}", numbers["int"])
    writer.add_float32("f32", 1e-5)
    writer.add_float64("f64", 1 / 3)
    writer.add_bool("yes", True)
    writer.add_string("text", "Öl\0 \U0001f468")
    writer.add_array("texts", ["a", "", "Öl"])
    writer.add_array("floats", [0.5, -2.0])
    writer.add_array("wholes", [1, 2, 3])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("half", np.ones((1, 5), np.float16))
    packed = gguf.quants.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 256])
def test_keys_and_tensors_are_those_of_the_gguf_package(tmp_path: Path, alignment: int | None) -> None:
    path = written(tmp_path / "a.gguf", alignment)
    fields, tensors = read_header(path)
    theirs = gguf.GGUFReader(path)
    wanted = {name: f.contents() for name, f in theirs.fields.items() if not name.startswith("GGUF.")}
    assert fields == wanted
    assert {name: type(value) for name, value in fields.items()} == {n: type(v) for n, v in wanted.items()}
    assert len(fields) >= 15
    assert [(t.name, t.kind, list(t.shape), t.start, t.n_bytes) for t in tensors] == [
        (t.name, t.tensor_type, t.shape.tolist()[::-1], t.data_offset, t.n_bytes) for t in theirs.tensors
    ]


def test_every_cut_and_every_changed_byte_is_read_or_refused(tmp_path: Path) -> None:
    """In one line that names the file, and never by another exception."""
    whole = written(tmp_path / "a.gguf").read_bytes()
    n_header = min(tensor.start for tensor in read_header(tmp_path / "a.gguf")[1])
    path, draw, refusals = tmp_path / "b.gguf", random.Random(3), []
    damaged = [whole[:end] for end in range(4, n_header, 23)]
    for _ in range(200):
        place, byte = draw.randrange(4, n_header), draw.choice((0, 1, 9, 127, 255))
        damaged.append(whole[:place] + bytes([byte]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        try:
            read_header(path)
        except UserError as error:
            refusals.append(str(error))
    assert [text for text in refusals if not text.startswith(f"{path}: ")] == []
    assert len(refusals) > len(damaged) // 3


def header(*parts: bytes, tensors: int = 0, keys: int = 1) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys) + b"".join(parts)


def test_the_bounds_allow_the_largest_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays count together: elements up to the bound are read, one more is not."""
    monkeypatch.setattr(gguf_header, "MAX_ELEMENTS", 6)
    path = tmp_path / "a.gguf"

    def arrays(*counts: int) -> bytes:
        parts = [struct.pack("<Q1sIIQ", 1, bytes([97 + n]), 9, 0, count) for n, count in enumerate(counts)]
        return header(
            *(part + bytes(count) for part, count in zip(parts, counts, strict=True)), keys=len(counts)
        )

    path.write_bytes(arrays(4, 2, 0))
    assert read_header(path)[0] == {"a": [0] * 4, "b": [0] * 2, "c": []}
    path.write_bytes(arrays(4, 3))
    with pytest.raises(UserError, match="key 'b' is an array of 3 elements"):
        read_header(path)
