"""Safetensors files written tensor by tensor, so that peak memory is one tensor and not one file.

Format: 8 bytes length of the header (little endian), the JSON header, then the raw tensors in order.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.files.write import durable_path, write_json
from lit_adapter.grouping import grouped
from lit_adapter.model.precision import FLOAT_NAMES
from lit_adapter.progress import Progress
from lit_adapter.weights.base_folder import WEIGHTS, WEIGHTS_INDEX, tensor_line

MAX_FILE_BYTES = 5_000_000_000
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


def write_tensors(
    folder: Path,
    entries: Sequence[Entry],
    load: Callable[[str], Tensor],
    label: Callable[[str], str],
    progress: Progress = None,
) -> tuple[str, dict[str, str]]:
    """Write entries in the order of their names into an existing folder.

    Above `MAX_FILE_BYTES`, these are several files and an index. ``load`` returns a tensor by name and is
    called once for each, ``label`` says where one comes from, for messages.

    Returns:
        The SHA-256 over `tensor_line` and bytes of all tensors in name order, and the CRC-32 over those of
        each tensor, by name; both in hex.

    Raises:
        UserError: a tensor that is not finite, before or after the cast; or a write that failed.
    """
    entries = sorted(entries, key=lambda entry: entry.name)
    n_total, n_done = sum(entry.n_bytes for entry in entries), 0
    digest = hashlib.sha256()
    groups = grouped(entries, lambda entry: entry.n_bytes, MAX_FILE_BYTES)
    weight_map, crc32 = {}, {}
    for number, group in enumerate(groups, 1):
        name = WEIGHTS if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        with durable_path(folder / name) as temporary, temporary.open("wb") as stream:
            stream.write(_header(group))
            for entry in group:
                weight_map[entry.name] = name
                line = tensor_line(entry.name, FLOAT_NAMES[entry.dtype], entry.shape)
                digest.update(line)
                crc = zlib.crc32(line)
                for chunk in _chunks(load(entry.name), entry.dtype, label(entry.name)):
                    content = chunk.view(torch.uint8).numpy().data
                    digest.update(content)
                    crc = zlib.crc32(content, crc)
                    stream.write(content)
                    n_done += len(content)
                    if progress is not None:
                        progress(n_done, n_total)
                crc32[entry.name] = f"{crc:08x}"
    if len(groups) > 1:
        index = {"metadata": {"total_size": n_total}, "weight_map": weight_map}
        write_json(folder / WEIGHTS_INDEX, index)
    return digest.hexdigest(), crc32


def _chunks(tensor: Tensor, dtype: torch.dtype, label: str) -> Iterator[Tensor]:
    """Yield a tensor's elements in order, cast and checked to be finite."""
    for chunk in tensor.contiguous().view(-1).split(CHUNK):
        if not torch.isfinite(chunk).all():
            raise UserError(f"{label} holds NaN or infinite values; fetch the source again")
        cast = chunk.to(dtype)
        if cast.dtype != chunk.dtype and not torch.isfinite(cast).all():
            name = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{label} holds values beyond the range of {name}; use --dtype bfloat16 or float32"
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
