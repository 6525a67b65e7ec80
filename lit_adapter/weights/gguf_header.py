"""The header of a GGUF file: its keys as plain values, and where its tensors lie. Sizes are checked first.

The gguf package reads as many elements as an array claims to have, and nested arrays by recursion, so it is
not used for this. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lit_adapter.errors import UserError
from lit_adapter.weights.shards import AGAIN

VERSIONS = (2, 3)
MAX_ENTRIES = 2**16
"""Keys, and tensors, of one file. A LLaMA of 405B has about 1,200 tensors."""
MAX_ELEMENTS = 2**21
"""Elements of all arrays together. The largest vocabularies have 1.3 million, merges included."""
MAX_BYTES = 2**26
"""Length of the header. Vocabularies take 15 MB at most."""
MAX_DIMENSIONS = 4
SCALARS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8")
"""Types of values by their number in the file."""
TEXT, ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in its file."""

    name: str
    kind: Any
    """A `gguf.GGMLQuantizationType`."""
    shape: tuple[int, ...]
    """Row-major, as in torch."""
    start: int
    """Offset of its first byte."""
    n_bytes: int


def read_header(path: Path) -> tuple[dict[str, Any], list[GGUFTensor]]:
    """Return a file's keys and its tensors.

    Raises:
        UserError: not a GGUF file, a big-endian one, damaged, truncated, or with impossible sizes.
    """
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{path}: is not a GGUF file; {AGAIN}")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _Header(content).read()
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            except (ValueError, LookupError, struct.error) as error:
                raise UserError(f"{path}: truncated or damaged ({error}); {AGAIN}") from None


class _Header:
    """A position in the file, which moves past everything that is read."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at, self.n_elements = content, 4, 0

    def read(self) -> tuple[dict[str, Any], list[GGUFTensor]]:
        version = self.number("I")
        if version and version & 0xFFFF == 0:
            raise UserError("is big-endian; use the little-endian version")
        if version not in VERSIONS:
            raise ValueError(f"version {version}, expected {' or '.join(map(str, VERSIONS))}")
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        if max(n_tensors, n_keys) > MAX_ENTRIES:
            raise ValueError(f"{n_tensors} tensors and {n_keys} keys, expected at most {MAX_ENTRIES}")
        fields: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.text()
            if key in fields:
                raise ValueError(f"key {key!r} appears twice")
            fields[key] = self.value(self.number("I"), key)
        found = [self.tensor() for _ in range(n_tensors)]
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"key 'general.alignment' is {alignment!r}, expected a power of two")
        data = -(-self.at // alignment) * alignment
        tensors = [replace(tensor, start=data + tensor.start) for tensor in found]
        for tensor in tensors:
            if tensor.start + tensor.n_bytes > len(self.content):
                raise UserError(f"truncated before the end of tensor {tensor.name}; {AGAIN}")
        return fields, tensors

    def skip(self, n_bytes: int) -> int:
        """Move past ``n_bytes``, which must exist, and return where they start."""
        start, self.at = self.at, self.at + n_bytes
        if self.at > len(self.content):
            raise ValueError(f"{n_bytes} bytes are missing at offset {start}")
        if self.at > MAX_BYTES:
            raise ValueError(f"the header is longer than {MAX_BYTES} bytes")
        return start

    def number(self, form: str) -> int:
        value: int = struct.unpack_from(f"<{form}", self.content, self.skip(struct.calcsize(f"<{form}")))[0]
        return value

    def text(self) -> str:
        n_bytes = self.number("Q")
        start = self.skip(n_bytes)
        return self.content[start : start + n_bytes].decode()

    def value(self, kind: int, key: str) -> Any:
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.scalars(kind, 1, key)[0]
        kind, count = self.number("I"), self.number("Q")
        self.n_elements += count
        if self.n_elements > MAX_ELEMENTS:
            raise ValueError(f"key {key!r} is an array of {count} elements")
        if kind == ARRAY:
            raise ValueError(f"key {key!r} is an array of arrays")
        return [self.text() for _ in range(count)] if kind == TEXT else self.scalars(kind, count, key)

    def scalars(self, kind: int, count: int, key: str) -> list[Any]:
        form = SCALARS[kind] if kind < len(SCALARS) else None
        if form is None:
            raise ValueError(f"key {key!r} is of the unknown type {kind}")
        size = np.dtype(form).itemsize
        start = self.skip(count * size)
        return list(np.frombuffer(self.content[start : self.at], form).tolist())

    def tensor(self) -> GGUFTensor:
        """Return the next tensor, with ``start`` counted from the first tensor's."""
        import gguf

        name, n_dims = self.text(), self.number("I")
        if n_dims > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {n_dims} dimensions")
        shape = tuple(reversed([self.number("Q") for _ in range(n_dims)]))
        kind = gguf.GGMLQuantizationType(self.number("I"))
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % block:
            raise ValueError(f"tensor {name!r} has rows of {shape[-1]}, not a multiple of {block}")
        return GGUFTensor(name, kind, shape, self.number("Q"), math.prod(shape) // block * n_bytes)
