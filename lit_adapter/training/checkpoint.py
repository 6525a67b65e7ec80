"""Checkpoint files: Lightning's checkpoint dictionary in one safetensors file, without pickle.

Tensors are stored as tensors. The rest (loops, callbacks, optimizer groups, position) is JSON in the
header's metadata, with a SHA-256 of both. A file appears whole or not at all, and damage is found when it is
read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.files.write import write_bytes
from lit_adapter.model.adapter import check_adapter_state
from lit_adapter.training.lightning_internals import CHECKPOINT_KEYS

METADATA_KEY = "lit_adapter_checkpoint"
PARTS = CHECKPOINT_KEYS | {"lit_adapter", "measured"}
"""The keys that every checkpoint has: Lightning's, and what `Checkpoints` and `LitAdapter` add."""


class DurableCheckpointIO(CheckpointIO):
    """Reads and writes checkpoints for the Trainer."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, whole or not at all.

        Raises:
            UserError: the file cannot be written, or the adapter has NaN or infinite values.
        """
        tensors: dict[str, Tensor] = {}
        structure = json.dumps(_encode(checkpoint, tensors, ""), sort_keys=True, allow_nan=False)
        for name, tensor in checkpoint["state_dict"].items():
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(
                    f"{path}: not written: {name} has NaN or infinite values; earlier checkpoints are "
                    "unaffected; lower optim.lr and go on with --resume last"
                )
        metadata = {METADATA_KEY: structure, "sha256": _checksum(structure, tensors)}
        write_bytes(Path(path), save(tensors, metadata=metadata))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict:
        """Read and verify a checkpoint; see `read_checkpoint`."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint and verify its checksum.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint written by this package.
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
        raise UserError(f"{path}: not a checkpoint of a run; a run cannot be resumed from an adapter file")
    if metadata.get("sha256") != _checksum(metadata[METADATA_KEY], tensors):
        raise UserError(f"{path}: the checkpoint is damaged (its checksum differs)")
    checkpoint = _decode(json.loads(metadata[METADATA_KEY]), tensors)
    missing = sorted(PARTS - checkpoint.keys())
    if missing:
        raise UserError(f"{path}: not a usable checkpoint: it lacks {', '.join(missing)}")
    return checkpoint


def check_contents(path: Path, checkpoint: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that a checkpoint holds this adapter and its optimizer's moments: names, shapes, fp32, finite.

    ``shapes`` has every adapter tensor, by name.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape or type, or not finite; names it.
    """
    check_adapter_state(shapes, checkpoint["state_dict"], str(path))
    moments = {
        f"optimizer {number}.{key}": state[key]
        for number, state in checkpoint["optimizer_states"][0]["state"].items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    odd = Counter(tuple(moment.shape) for moment in moments.values()) - Counter([*shapes.values()] * 2)
    if odd:
        raise UserError(f"{path}: the optimizer has an unexpected moment of shape {list(next(iter(odd)))}")
    for name, tensor in (checkpoint["state_dict"] | moments).items():
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path}: {name} is not fp32, or has NaN or infinite values")


def _checksum(structure: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(structure.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _encode(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """Return ``value`` as JSON; its tensors move to ``tensors``, named by their path in the checkpoint.

    Plain values stay as they are. Everything else becomes a list that starts with a tag: ["tensor", name],
    ["tuple", items], ["dict", [key, value] pairs], ["list", items], ["float", "nan"].

    Raises:
        TypeError: a value of any other type.
    """
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous()
        return ["tensor", place]
    if isinstance(value, dict):
        pairs = [[_encode(k, tensors, ""), _encode(v, tensors, f"{place}.{k}")] for k, v in value.items()]
        return ["dict", pairs]
    if isinstance(value, list | tuple):
        items = [_encode(item, tensors, f"{place}.{number}") for number, item in enumerate(value)]
        return ["tuple" if isinstance(value, tuple) else "list", items]
    if isinstance(value, float) and not math.isfinite(value):
        return ["float", repr(float(value))]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__} (at {place})")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    tag, content = value
    if tag == "tensor":
        return tensors[content]
    if tag == "float":
        return float(content)
    if tag == "dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if tag == "tuple" else items
