"""The hidden states that enter the first adapted layer, kept in a file, part by part of the packed rows.

A part is a record without its shared head and last token, or a shared head; its tokens' hidden states depend
on the part alone (and on the head it continues), in whatever row it lies. The file is a safetensors file of

    hidden   [tokens, C]   one part after another
    crc32    [parts]       int64; of each part's bytes

so that a part is read, and known to be whole, without reading the rest.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.files import safetensors_header
from lit_adapter.model.precision import FLOAT_NAMES


class TrunkFile:
    """One file, to be written part by part and to be read.

    Args:
        path: of the file.
        lengths: tokens of each part.
        width: numbers of a token, C.
        dtype: float32 or bfloat16.
        key: what the file answers; one with another key is not used.
    """

    def __init__(
        self, path: Path, lengths: NDArray[np.int64], width: int, dtype: torch.dtype, key: str
    ) -> None:
        self.path, self.width, self.dtype, self.key = path, width, dtype, key
        self.start = np.concatenate([[0], np.cumsum(lengths)])

    @property
    def n_tokens(self) -> int:
        """Tokens of all parts."""
        return int(self.start[-1])

    @property
    def n_parts(self) -> int:
        """Parts."""
        return len(self.start) - 1

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return self._data + self._hidden_bytes + 8 * self.n_parts

    @property
    def _hidden_bytes(self) -> int:
        return self.n_tokens * self.width * self.dtype.itemsize

    @cached_property
    def _header(self) -> bytes:
        tensors = [
            ("hidden", FLOAT_NAMES[self.dtype], (self.n_tokens, self.width), self._hidden_bytes),
            ("crc32", "I64", (self.n_parts,), 8 * self.n_parts),
        ]
        return safetensors_header(tensors, {"key": self.key})

    @property
    def _data(self) -> int:
        return len(self._header)

    def reserve(self, path: Path) -> None:
        """Write the header to ``path`` and take the disk space of the rest.

        Raises:
            OSError: the disk is full.
        """
        with path.open("r+b") as stream:
            stream.write(self._header)
            stream.flush()
            os.posix_fallocate(stream.fileno(), 0, self.n_bytes)

    def write(self, descriptor: int, parts: Sequence[int], wanted: Collection[int], hidden: Tensor) -> None:
        """Write parts of a row.

        Args:
            descriptor: of the open file; several processes may write different parts.
            parts: what the row consists of, in order.
            wanted: which of them to write.
            hidden: of the row's tokens, at least ``[tokens of the parts, C]``.
        """
        hidden = hidden.to("cpu", self.dtype)
        lengths = [int(self.start[part + 1] - self.start[part]) for part in parts]
        ends = list(itertools.accumulate(lengths))
        for part, end, length in zip(parts, ends, lengths, strict=True):
            if part not in wanted:
                continue
            content = _bytes(hidden[end - length : end])
            offset = self._data + int(self.start[part]) * self.width * self.dtype.itemsize
            _write_all(descriptor, content, offset)
            checksum = zlib.crc32(content).to_bytes(8, "little")
            _write_all(descriptor, checksum, self._data + self._hidden_bytes + 8 * part)

    def is_there(self) -> bool:
        """Tell whether the file is there, of this size, and answers this key."""
        try:
            with safe_open(self.path, framework="pt") as file:
                fits = list(file.get_slice("hidden").get_shape()) == [self.n_tokens, self.width]
                return fits and (file.metadata() or {}).get("key") == self.key
        except (SafetensorError, OSError):
            return False

    def read(self, parts: Sequence[int], length: int) -> Tensor:
        """Return the hidden states of a row ``[length, C]``: its parts, and zeros for what pads it.

        Raises:
            UserError: a part is not what was written.
        """
        found = [self._part(part) for part in parts]
        missing = length - sum(map(len, found))
        return torch.cat([*found, torch.zeros(missing, self.width, dtype=self.dtype)])

    def _part(self, part: int) -> Tensor:
        hidden, checksums = self._open
        content = hidden[int(self.start[part]) : int(self.start[part + 1])]
        if zlib.crc32(_bytes(content)) != int(checksums[part]):
            raise UserError(f"{self.path}: damaged at part {part}; delete it, and it is made again")
        return content

    @cached_property
    def _open(self) -> tuple[Any, Tensor]:
        """The map of the file, made in the process that reads."""
        file = safe_open(self.path, framework="pt")
        return file.get_slice("hidden"), file.get_tensor("crc32")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open"}


def _bytes(x: Tensor) -> memoryview:
    return x.contiguous().view(torch.uint8).numpy().data.cast("B") if x.numel() else memoryview(b"")


def _write_all(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """Write at a place, however many calls the system makes of it."""
    view = memoryview(content)
    while view:
        n = os.pwrite(descriptor, view, offset)
        view, offset = view[n:], offset + n
