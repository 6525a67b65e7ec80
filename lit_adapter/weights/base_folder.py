"""What a converted base folder holds: names, shapes, configuration and fingerprint. No torch.

The folder is a plain Hugging Face layout: ``model.safetensors`` (or numbered shards with an index),
``config.json``, ``generation_config.json`` where known, tokenizer files, and ``fingerprint.json``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.files.paths import is_unicode
from lit_adapter.files.read import read_object
from lit_adapter.model.config import LlamaConfig

FORMAT_VERSION = 2
"""Format of fingerprints. Format 1, which lacks ``file_sha256`` and ``tensor_crc32``, is read too."""
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
FINGERPRINT = "fingerprint.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
"""In sources only; a converted base is always safetensors."""
BIN_INDEX = "pytorch_model.bin.index.json"
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model")
"""A folder holds at least one of them."""
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
SMALL_FILES = (CONFIG, GENERATION_CONFIG, WEIGHTS_INDEX, *TOKENIZER_FILES)
"""Files besides the weights that affect an answer; most of them may be absent."""
DOWNLOAD = "python scripts/download.py"


def weight_files(folder: Path) -> list[Path]:
    """Return a base's weight files; an adapter may be beside them."""
    return sorted(folder.glob("model*.safetensors"))


def tensor_line(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    """Return what a tensor's checksum covers before its bytes; ``dtype`` is safetensors' name for it."""
    return f"{name} {dtype} {list(shape)}\n".encode()


def read_config(folder: Path) -> LlamaConfig:
    """Read the model sizes of a Hugging Face or converted folder.

    Raises:
        UserError: no readable ``config.json``, or one that does not describe a LLaMA.
    """
    path = folder / CONFIG
    return LlamaConfig.from_hf(read_object(path), source=str(path))


def check_converted(folder: Path) -> None:
    """Refuse a folder that does not exist, or that ``scripts/convert.py`` has not made.

    Raises:
        UserError: says how to get a base, or that the path is not UTF-8.
    """
    if not is_unicode(str(folder)):
        raise UserError(f"{str(folder)!r}: not a UTF-8 path; rename the folder, or set PYTHONUTF8=1")
    if (folder / FINGERPRINT).is_file():
        return
    if (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {FINGERPRINT}, so not a converted base; run scripts/convert.py first")
    if folder == Path(Config.base):
        raise UserError(f"{folder}: no converted base there; {DOWNLOAD} {folder.name} fetches it")
    raise UserError(
        f"{folder}: no converted base there; {DOWNLOAD} ORG/NAME --out {folder} fetches one from the Hugging "
        "Face Hub, scripts/convert.py converts a model that you have"
    )


def read_fingerprint(folder: Path) -> dict[str, Any]:
    """Read what identifies a converted base.

    Returns:
        ``format`` (a version), ``weights`` and ``tokenizer`` (SHA-256, hex), ``files`` (name to size in
        bytes) and ``source`` (where the base came from). Since format 2 also ``file_sha256`` (of every file
        but the weights) and ``tensor_crc32`` (of `tensor_line` and bytes of every tensor), hex, by name.

    Raises:
        UserError: the folder was not made by ``scripts/convert.py``, or by a newer version of it.
    """
    path = folder / FINGERPRINT
    check_converted(folder)
    fingerprint = read_object(path)
    kinds = {"format": int, "weights": str, "tokenizer": str, "files": dict, "source": dict}
    if fingerprint.get("format") == FORMAT_VERSION:
        kinds |= {"file_sha256": dict, "tensor_crc32": dict}
    for key, kind in kinds.items():
        if type(fingerprint.get(key)) is not kind:  # True is no format 1
            raise UserError(f"{path}: key '{key}' is missing or of another type; convert the base again")
    if fingerprint["format"] not in (1, FORMAT_VERSION):
        raise UserError(
            f"{path}: format {fingerprint['format']}, but this version reads {FORMAT_VERSION}; "
            "convert the base again"
        )
    return fingerprint


def tokenizer_fingerprint(folder: Path) -> str:
    """Return the SHA-256 over names, sizes and contents of the folder's tokenizer files."""
    digest = hashlib.sha256()
    for name in sorted(TOKENIZER_FILES):
        path = folder / name
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()
