"""Checkpoint files: Lightning's checkpoint dictionary in one safetensors file, without pickle.

Tensors are stored as tensors; the rest (loops, callbacks, optimizer groups, position) is JSON in the
header's metadata, beside a SHA-256 over all of it. A file appears whole or not at all, and a damaged one
is recognised when it is read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_adapter import files
from lit_adapter.errors import UserError

METADATA_KEY = "lit_adapter_checkpoint"


class DurableCheckpointIO(CheckpointIO):
    """Reads and writes checkpoints for the Trainer."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, whole or not at all.

        Raises:
            UserError: the file cannot be written, or the adapter holds a number that is not finite.
        """
        tensors: dict[str, Tensor] = {}
        structure = json.dumps(_encode(checkpoint, tensors, ""), sort_keys=True)
        for name, tensor in checkpoint["state_dict"].items():
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(
                    f"{path}: not written: {name} is not finite; earlier checkpoints are unaffected"
                )
        metadata = {METADATA_KEY: structure, "sha256": _checksum(structure, tensors)}
        files.write_bytes(Path(path), save(tensors, metadata=metadata))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict:
        """Read and verify a checkpoint; see `read_checkpoint`."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint and verify its checksum.

    Raises:
        UserError: missing, cut short, changed, or not a checkpoint of ours.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; use --resume last, or a file of RUN_FOLDER/checkpoints")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a usable checkpoint: {error}") from None
    if METADATA_KEY not in metadata:
        raise UserError(f"{path}: not a checkpoint of a training run; an adapter file cannot be resumed")
    if metadata.get("sha256") != _checksum(metadata[METADATA_KEY], tensors):
        raise UserError(f"{path}: the checkpoint is damaged (its checksum differs)")
    return _decode(json.loads(metadata[METADATA_KEY]), tensors)


def _checksum(structure: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(structure.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _encode(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """Return ``value`` as JSON, its tensors moved to ``tensors`` under the name of their place.

    JSON has lists, objects with text keys, and plain values. What else a checkpoint holds becomes a list
    that starts with a tag: ["tensor", name], ["tuple", items], ["dict", [key, value] pairs], ["list", items].
    """
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous()
        return ["tensor", place]
    if isinstance(value, dict):
        return [
            "dict",
            [[_encode(k, tensors, ""), _encode(v, tensors, f"{place}.{k}")] for k, v in value.items()],
        ]
    if isinstance(value, list | tuple):
        items = [_encode(item, tensors, f"{place}.{number}") for number, item in enumerate(value)]
        return ["tuple" if isinstance(value, tuple) else "list", items]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__} (at {place})")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    tag, content = value
    if tag == "tensor":
        return tensors[content]
    if tag == "dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if tag == "tuple" else items
