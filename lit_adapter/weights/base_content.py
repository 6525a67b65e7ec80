"""Checks that a base folder still holds what its fingerprint was made from. No torch.

Small files are compared at every start. Weights may have many gigabytes: they are compared in full on
request, and when a file is not the one of the last check (by size, times, inode); otherwise one page of every
tensor is compared. The results of a check are kept in the cache folder, in one file for each base folder.
Without that file everything is compared.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError
from lit_adapter.files.locks import one_at_a_time
from lit_adapter.files.paths import cache_folder
from lit_adapter.files.read import file_sha256, file_state, read_object, reading, refuse_stand_in
from lit_adapter.files.write import write_json
from lit_adapter.streams import Say
from lit_adapter.weights.base_folder import (
    FINGERPRINT,
    SMALL_FILES,
    TOKENIZER_FILES,
    read_fingerprint,
    tensor_line,
    tokenizer_fingerprint,
    weight_files,
)

VERSION = 1
"""Version of the files in the cache folder."""
PAGE = 4096
"""Bytes in the middle of each tensor that are compared at every start."""
THREADS = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
_PARTS = ("file_sha256", "tensor_crc32", "seen", "pages")
_WEIGHTS_REMEDY = "restore the file, or convert the base again"


@dataclass(frozen=True)
class _Tensor:
    path: Path
    line: bytes
    content: memoryview

    def crc32(self) -> str:
        return f"{zlib.crc32(self.content, zlib.crc32(self.line)):08x}"

    def page_crc32(self) -> str:
        middle = max(0, len(self.content) - PAGE) // 2
        return f"{zlib.crc32(self.content[middle : middle + PAGE], zlib.crc32(self.line)):08x}"


def check_content(folder: Path, *, everything: bool = False, say: Say = lambda line: None) -> None:
    """Check that a base's files are those that were converted: weights, configuration, tokenizer, stop ids.

    ``everything`` compares all weights, whatever an earlier check found, and the SHA-256 by which adapters
    identify the base; ``say`` then gets a line about it. A fingerprint of format 1 has no checksums of the
    configuration: it is accepted as it is at the first check, and compared from then on.

    Raises:
        UserError: not a converted base, or a file is missing, was added, or has changed; names it.
    """
    with reading(folder):
        fingerprint, last = read_fingerprint(folder), _LastCheck(folder)
        _check_presence(folder, fingerprint)
        small, is_old = small_file_digests(folder), fingerprint["format"] == 1
        known = last.content if is_old else fingerprint
        _check_small_files(folder, known.get("file_sha256", small), small)
        if is_old:
            _check_tokenizer(folder, fingerprint)
        if everything or not last.is_current():
            with last.locked():
                last.read()
                if everything or not last.is_current():  # another process may have compared them meanwhile
                    weights = _check_weights(folder, fingerprint, known, everything=everything)
                    last.write({"file_sha256": small, **weights})
    if everything:
        what = "weights and tokenizer" if is_old else "all files and tensors"
        lacks = "; its fingerprint, of format 1, lacks the configuration: convert the base again to add it"
        say(f"verified {folder}: {what} are those that were converted{lacks if is_old else ''}")


def small_file_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that affects an answer, except the weights, by name."""
    digests = {}
    for name in SMALL_FILES:
        path = folder / name
        with reading(path):
            if path.is_file():
                digests[name] = file_sha256(path)
    return digests


def tensor_checksums(folder: Path) -> dict[str, str]:
    """Return the CRC-32 of every tensor of a base, by name, as `write_tensors` does."""
    with _mapped(folder) as tensors:
        return _digests(tensors, identity=False)[0]


def _check_presence(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Refuse a file that is missing, of another size, or new and would affect an answer."""
    files = fingerprint["files"]
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: is missing; {_remedy(path)}")
        if path.stat().st_size != size:
            raise UserError(f"{path}: has {path.stat().st_size} bytes instead of {size}; {_remedy(path)}")
    weights = weight_files(folder)  # any entry counts, also a pipe or a broken link: loading would open it
    for path in [*weights, *(folder / name for name in SMALL_FILES)]:
        if path.name not in files and (path in weights or path.is_file()):
            raise UserError(
                f"{path}: was added after the base was converted; remove it, or {_new_base(path)}"
            )


def _check_small_files(folder: Path, known: dict[str, str], found: dict[str, str]) -> None:
    for name, digest in found.items():
        if known.get(name) != digest:
            raise UserError(
                f"{folder / name}: has changed since the base was converted; {_remedy(folder / name)}"
            )


def _check_tokenizer(folder: Path, fingerprint: dict[str, Any]) -> None:
    if tokenizer_fingerprint(folder) != fingerprint["tokenizer"]:
        names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
        raise UserError(
            f"{folder}: {' or '.join(names)} has changed since the base was converted; "
            f"{_remedy(folder / names[0])}"
        )


def _check_weights(
    folder: Path, fingerprint: dict[str, Any], known: dict[str, Any], *, everything: bool
) -> dict[str, dict[str, Any]]:
    """Compare tensors with their checksums, or without any the SHA-256 of all; return what was found."""
    seen = _seen(folder)  # before they are read, so that a later write is noticed
    with _mapped(folder) as tensors:
        found, sha256 = _digests(tensors, identity=everything or not known)
        _check_tensors(folder, tensors, known.get("tensor_crc32", found), found)
        if sha256 is not None:
            _check_identity(folder, fingerprint, sha256)
        return {"tensor_crc32": found, "seen": seen, "pages": _pages(tensors)}


def _check_tensors(
    folder: Path, tensors: Mapping[str, _Tensor], known: dict[str, str], found: dict[str, str]
) -> None:
    names = sorted(known.keys() | found.keys())
    changed = [name for name in names if known.get(name) != found.get(name)]
    if changed:
        path = tensors[changed[0]].path if changed[0] in tensors else folder
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{path}: tensor {changed[0]}{more} has changed since the base was converted; {_WEIGHTS_REMEDY}"
        )


def _check_identity(folder: Path, fingerprint: dict[str, Any], sha256: str) -> None:
    """Compare the digests by which adapters identify the base."""
    _check_tokenizer(folder, fingerprint)
    if sha256 != fingerprint["weights"]:
        files = weight_files(folder)
        which = files[0] if len(files) == 1 else folder
        raise UserError(f"{which}: the weights have changed since the base was converted; {_WEIGHTS_REMEDY}")


def _remedy(path: Path) -> str:
    if path.suffix == ".safetensors":
        return _WEIGHTS_REMEDY
    return f"restore the file, or, if you meant to change it, {_new_base(path)}"


def _new_base(path: Path) -> str:
    return f"make a new base: scripts/convert.py {path.parent} --out ANOTHER"


def _digests(tensors: Mapping[str, _Tensor], *, identity: bool) -> tuple[dict[str, str], str | None]:
    """Return the CRC-32 of every tensor, by name, and if ``identity`` the SHA-256 over all of them."""
    pool = ThreadPoolExecutor(THREADS)  # zlib and hashlib release the interpreter's lock
    try:
        crc32 = pool.map(_Tensor.crc32, tensors.values())
        sha256 = _sha256(tensors) if identity else None
        return dict(zip(tensors, crc32, strict=True)), sha256
    finally:
        pool.shutdown(cancel_futures=True)


def _sha256(tensors: Mapping[str, _Tensor]) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.line)
        digest.update(tensor.content)
    return digest.hexdigest()


@contextmanager
def _mapped(folder: Path) -> Iterator[dict[str, _Tensor]]:
    """Yield the tensors of a base by name, as views of its mapped files."""
    tensors: dict[str, _Tensor] = {}
    with ExitStack() as stack:
        for path in weight_files(folder):
            with reading(path):
                refuse_stand_in(path)  # an empty file cannot be mapped
            with reading(path), path.open("rb") as stream:
                mapped = stack.enter_context(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
            view = stack.enter_context(memoryview(mapped))
            for name, line, begin, end in _header(view, path):
                content = stack.enter_context(view[begin:end])
                tensors[name] = _Tensor(path, line, content)
        yield tensors


def _header(view: memoryview, path: Path) -> Iterator[tuple[str, bytes, int, int]]:
    """Yield name, `tensor_line`, begin and end of every tensor of a safetensors file."""
    length = int.from_bytes(view[:8], "little")
    try:
        header = json.loads(bytes(view[8 : 8 + min(length, MAX_HEADER_BYTES)]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + int(offset) for offset in entry["data_offsets"])
            yield name, tensor_line(name, entry["dtype"], entry["shape"]), begin, end
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise UserError(f"{path}: its header is damaged; {_WEIGHTS_REMEDY}") from None


def _seen(folder: Path) -> dict[str, list[int]]:
    """Return the state of every weight file."""
    return {path.name: file_state(path) for path in weight_files(folder)}


def _pages(tensors: Mapping[str, _Tensor]) -> dict[str, str]:
    return {name: tensor.page_crc32() for name, tensor in tensors.items()}


class _LastCheck:
    """The results of the last check of a folder; ``content`` is empty if there are none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path: Path | None = None
        self.about = {"version": VERSION, "fingerprint": file_sha256(folder / FINGERPRINT)}
        with suppress(UserError):  # no cache folder
            name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
            self.path = cache_folder() / f"base-{name}.json"
        self.read()

    def read(self) -> None:
        """Read it; a file that cannot be read, or has another fingerprint or version, counts as none."""
        self.content: dict[str, Any] = {}
        with suppress(UserError):
            content = read_object(self.path) if self.path is not None else {}
            is_own = self.about.items() <= content.items()
            if is_own and all(isinstance(content.get(part), dict) for part in _PARTS):
                self.content = content

    def write(self, content: dict[str, Any]) -> None:
        """Write it, if that is possible: without it, the next start compares everything again."""
        with suppress(UserError):
            if self.path is not None:
                write_json(self.path, {**self.about, "folder": str(self.folder), **content})

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from checking the same folder meanwhile."""
        return nullcontext() if self.path is None else one_at_a_time(self.path, doing="compares the base")

    def is_current(self) -> bool:
        """Tell whether the weights are those of the last check; compares one page of every tensor."""
        if self.content.get("seen") != _seen(self.folder):
            return False
        with _mapped(self.folder) as tensors:
            return bool(self.content["pages"] == _pages(tensors))
