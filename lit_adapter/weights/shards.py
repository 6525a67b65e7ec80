"""Safe reading of other people's tensor files: no code runs, and every error names the file.

Both kinds of file list shapes and dtypes without reading tensors, and are read one tensor at a time.
"""

from __future__ import annotations

import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.files.read import refuse_stand_in
from lit_adapter.model.precision import FLOATS

AGAIN = "fetch it again"
_EXPECTED = "expected float32, float16 or bfloat16"
OF_DAMAGE = (
    *(RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, OSError, MemoryError),
    *(ArithmeticError, AssertionError, struct.error, zipfile.BadZipFile),
)
"""Errors that PyTorch and zipfile raise on damaged files."""
REMAP_BYTES = 33_554_432
"""Bytes of a mapped file that may be read before its pages are released."""


def member(folder: Path, name: str) -> Path:
    """Return the path of a file that must be in ``folder``.

    A link may lead only into the blobs of the Hugging Face cache that the folder is part of.

    Raises:
        UserError: ``name`` is a path or a URL, or the file is absent, not a regular file, or elsewhere.
    """
    if not name or name in (".", "..") or any(mark in name for mark in ("/", "\\", ":", "\0")):
        raise UserError(f"{folder}: file name {name!r} leads out of the folder; expected a plain name")
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path}: file not found")
    real, home = path.resolve(), folder.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else None
    if real.parent != home and real.parent != blobs:
        raise UserError(f"{path}: is a link that leads out of the folder; copy the file itself there")
    return path


def _is_zipped(path: Path) -> bool:
    """Tell whether a ``torch.save`` file is a zip archive, as since PyTorch 1.6, which can be mapped."""
    with path.open("rb") as stream:
        start = stream.read(4)
    if start == b"PK\x03\x04":
        return True
    if len(start) < 4 or start[0] != 0x80:  # a pickle of protocol 2 or later
        raise UserError(f"{path}: truncated or damaged: it does not begin as a torch.save file; {AGAIN}")
    return False


def load_tensors(path: Path, instead: str, safe_globals: Sequence[type] = ()) -> Any:
    """Return what PyTorch's restricted unpickler reads from a ``torch.save`` file, mapped if possible.

    It may build ``safe_globals`` besides PyTorch's own types.

    Raises:
        UserError: damaged, or holding another type; the message ends with ``instead``, what the user can do.
            No code of the file has run.
    """
    mapped = _is_zipped(path)
    try:
        if mapped and not zipfile.is_zipfile(path):
            raise UserError(f"{path}: truncated or damaged; {AGAIN}")
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(safe_globals)):
            warnings.simplefilter("ignore")  # about pickle protocols, in damaged files
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: damaged, or holds other objects than tensors and plain values, which could run code "
            f"({_reason(error)}); {instead}"
        ) from None
    except OF_DAMAGE as error:
        raise UserError(f"{path}: truncated or damaged ({_reason(error)}); {AGAIN}") from None


def _reason(error: BaseException) -> str:
    """Return the line of PyTorch's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if any(word in line for word in ("GLOBAL", "instruction", "operand"))]
    return (telling or [line for line in lines if line] or [type(error).__name__])[0][:160]


def read_bytes(path: Path, offset: int, count: int) -> bytearray:
    """Read ``count`` bytes without a memory map, whose pages would stay in memory."""
    content = bytearray(count)
    with path.open("rb") as stream:
        stream.seek(offset)
        if stream.readinto(content) != count:
            raise UserError(f"{path}: ends before byte {offset + count:,}; {AGAIN}")
    return content


def named_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """Return what a file holds, if that is tensors by name.

    Raises:
        UserError: it is something else, or empty.
    """
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds a {type(content).__name__}; expected named tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: '{name}' is not a tensor; expected named tensors only")
    return dict(content)


def refuse_odd_tensor(tensor: Tensor, where: str) -> None:
    """Refuse a tensor of a ``torch.save`` file that is not dense and complete; messages name it ``where``.

    Raises:
        UserError: sparse, nested, quantised or without data, or larger than its storage.
    """
    odd = tensor.is_nested or tensor.is_quantized or tensor.is_meta
    if odd or tensor.layout != torch.strided:
        raise UserError(f"{where} is not a dense tensor; convert it to one")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{where} is declared larger than the file's data; {AGAIN}")


class SafetensorsShard:
    """A ``.safetensors`` file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_stand_in(path)
        try:
            with safe_open(path, framework="pt"):
                pass  # the library checks the header's sizes, offsets, overlaps and types
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or damaged ({error}); {AGAIN}") from None
        length = int.from_bytes(read_bytes(path, 0, 8), "little")
        self._header = json.loads(read_bytes(path, 8, length), object_pairs_hook=self._unique)
        self._header.pop("__metadata__", None)
        self._start = 8 + length
        self.shapes = {name: tuple(value["shape"]) for name, value in self._header.items()}
        self.dtypes = {name: FLOATS.get(value["dtype"]) for name, value in self._header.items()}

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise UserError(f"{self.path}: '{name}' appears twice in the header; {AGAIN}")
            found[name] = value
        return found

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        dtype = self.dtypes[name]
        if dtype is None:
            raise UserError(f"{self.path}: tensor {name} is {self._header[name]['dtype']}; {_EXPECTED}")
        begin, end = self._header[name]["data_offsets"]
        content = read_bytes(self.path, self._start + begin, end - begin)
        return torch.frombuffer(content, dtype=dtype).view(self.shapes[name])


class TorchShard:
    """A ``torch.save`` file (``.bin``, ``.pth``), read with the restricted unpickler only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_stand_in(path)
        self._mapped = _is_zipped(path)  # older files cannot be mapped and are held in memory
        self._n_read = 0
        self._tensors = self._load()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        floats = {dtype: dtype for dtype in FLOATS.values()}
        self.dtypes = {name: floats.get(tensor.dtype) for name, tensor in self._tensors.items()}

    def _load(self) -> dict[str, Tensor]:
        content = load_tensors(self.path, "use the safetensors version of this checkpoint")
        tensors = named_tensors(content, self.path)
        for name, tensor in tensors.items():
            refuse_odd_tensor(tensor, f"{self.path}: '{name}'")
        return tensors

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, as a view of the mapped file."""
        if self.dtypes[name] is None:
            raise UserError(f"{self.path}: tensor {name} is {self._tensors[name].dtype}; {_EXPECTED}")
        if self._mapped and self._n_read > REMAP_BYTES:
            self._tensors = self._load()  # the pages of the old map are released with it
            self._n_read = 0
        self._n_read += self._tensors[name].nbytes
        return self._tensors[name]


Shard = SafetensorsShard | TorchShard
"""One file of named tensors; a type other than float32, float16 and bfloat16 is None in its ``dtypes``."""
