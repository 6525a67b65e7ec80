"""Safetensors files written tensor by tensor, so that peak memory is one tensor and not one file.

Format: 8 bytes length of the header (little endian), the JSON header, then the raw tensors in order.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.files.write import durable_path, write_json
from lit_adapter.grouping import grouped
from lit_adapter.model.precision import FLOAT_NAMES
from lit_adapter.weights.base_folder import WEIGHTS, WEIGHTS_INDEX

CHUNK = 4_194_304
"""Elements that are checked, cast, hashed and written together."""


@dataclass(frozen=True)
class Entry:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """Writes entries in the order of their names into one or several files, and hashes them.

    Args:
        folder: an existing folder.
        load: returns a tensor by name; it is called once for each entry.
        label: returns where a tensor comes from, for messages.
        max_file_bytes: above this size, several files and an index are written.
        progress: called with (bytes done, bytes in all).
    """

    def __init__(
        self,
        folder: Path,
        load: Callable[[str], Tensor],
        label: Callable[[str], str],
        *,
        max_file_bytes: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.folder = folder
        self.load = load
        self.label = label
        self.max_file_bytes = max_file_bytes
        self.progress = progress
        self.n_done = 0
        self.n_total = 0

    def write(self, entries: Sequence[Entry]) -> str:
        """Write all entries.

        Returns:
            The SHA-256 over name, dtype, shape and bytes of every tensor in name order.

        Raises:
            UserError: a tensor that is not finite, before or after the cast; or a write that failed.
        """
        entries = sorted(entries, key=lambda entry: entry.name)
        self.n_total = sum(entry.n_bytes for entry in entries)
        digest = hashlib.sha256()
        groups = grouped(entries, lambda entry: entry.n_bytes, self.max_file_bytes)
        names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
        if len(groups) == 1:
            names = [WEIGHTS]
        for name, group in zip(names, groups, strict=True):
            with durable_path(self.folder / name) as temporary, temporary.open("wb") as stream:
                stream.write(_header(group))
                for entry in group:
                    self._write_tensor(stream, entry, digest)
        if len(groups) > 1:
            weight_map = {
                entry.name: name for name, group in zip(names, groups, strict=True) for entry in group
            }
            index = {"metadata": {"total_size": self.n_total}, "weight_map": weight_map}
            write_json(self.folder / WEIGHTS_INDEX, index)
        return digest.hexdigest()

    def _write_tensor(self, stream: BinaryIO, entry: Entry, digest: hashlib._Hash) -> None:
        digest.update(f"{entry.name} {FLOAT_NAMES[entry.dtype]} {list(entry.shape)}\n".encode())
        for chunk in self._chunks(entry):
            content = chunk.view(torch.uint8).numpy().data
            digest.update(content)
            stream.write(content)
            self.n_done += len(content)
            if self.progress is not None:
                self.progress(self.n_done, self.n_total)

    def _chunks(self, entry: Entry) -> Iterator[Tensor]:
        """Yield a tensor's elements in order, cast and checked to be finite."""
        for chunk in self.load(entry.name).contiguous().view(-1).split(CHUNK):
            if not torch.isfinite(chunk).all():
                raise UserError(
                    f"{self.label(entry.name)} holds NaN or infinite values; fetch the source again"
                )
            cast = chunk.to(entry.dtype)
            if cast.dtype != chunk.dtype and not torch.isfinite(cast).all():
                name = str(entry.dtype).removeprefix("torch.")
                raise UserError(
                    f"{self.label(entry.name)} holds values beyond the range of {name}; "
                    "use --dtype bfloat16 or float32"
                )
            yield cast


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        dtype, offsets = FLOAT_NAMES[entry.dtype], [offset, offset + entry.n_bytes]
        header[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": offsets}
        offset += entry.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
