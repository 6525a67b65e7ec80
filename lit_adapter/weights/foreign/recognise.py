"""Open an adapter file or folder and tell whose it is, by its keys and shapes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.files.read import read_json, reading, refuse_stand_in
from lit_adapter.model.precision import FLOATS
from lit_adapter.weights.adapter_file import METADATA_KEY
from lit_adapter.weights.foreign import lit, official, peft
from lit_adapter.weights.foreign.pickles import read_torch_file
from lit_adapter.weights.plain import State
from lit_adapter.weights.shards import member

OURS = "ours"


@dataclass
class Opened:
    """An adapter of someone, read but not understood yet."""

    path: Path
    format: str
    """ours, official, lit-llama, litgpt or peft."""
    tensors: State = field(default_factory=dict)
    """Empty for ours, which has a reader of its own."""
    args: argparse.Namespace | None = None
    """Of an official training checkpoint."""
    why: str = ""
    """What it was recognised by."""


def open_adapter(path: Path, wanted: str = "auto") -> Opened:
    """Read an adapter and recognise its format.

    Args:
        path: a file, or PEFT's folder.
        wanted: a format, which goes before what the keys say where they leave a choice; or auto.

    Raises:
        UserError: nothing there, damaged, of no known format, or surely not of the wanted one.
    """
    opened = _open(path, wanted)
    if wanted != opened.format and wanted != "auto":
        raise UserError(
            f"{path}: --from says {wanted}, but it is {opened.format}, recognised by {opened.why}; "
            "leave --from out"
        )
    return opened


def _open(path: Path, wanted: str) -> Opened:
    with reading(path):
        if path.is_dir():
            return _open_peft(path)
        if not path.is_file():
            raise UserError(f"{path}: no such adapter file or folder")
        content, metadata = _content(path)
    if METADATA_KEY in metadata:
        return Opened(path, OURS, why="its metadata")
    tensors, args, wrapped = _unwrapped(content, path)
    found, why = _format(tensors, wrapped, path)
    if found == peft.NAME:
        _check_peft(path.parent)
        return Opened(path, found, tensors, why=why)
    if wanted in (official.NAME, lit.LIT_LLAMA.name, lit.LITGPT.name) and wanted != found:
        found, why = wanted, "--from"
    if found == official.NAME and wrapped:
        tensors = official.adapter_tensors(tensors)
        why += "; a training checkpoint"
    return Opened(path, found, tensors, args, why)


def _content(path: Path) -> tuple[Any, dict[str, str]]:
    """Return what the file holds, and a safetensors file's metadata."""
    with path.open("rb") as stream:
        start = stream.read(9)
    if start[8:9] != b"{":
        return read_torch_file(path), {}
    return _read_safetensors(path)


def _read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    refuse_stand_in(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if METADATA_KEY in metadata:
                return {}, metadata
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error})") from None


def _unwrapped(content: Any, path: Path) -> tuple[State, argparse.Namespace | None, bool]:
    """Return the tensors by name, a training checkpoint's args, and whether they lay under ``model``."""
    args, wrapped = None, False
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        args, wrapped, content = content.get("args"), True, content["model"]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds a {type(content).__name__}; expected named tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: '{name}' is no tensor; expected an adapter's named tensors")
        if value.dtype not in (*FLOATS.values(), torch.float64):
            raise UserError(
                f"{path}: tensor {name} is {value.dtype}; expected floating point numbers of 16 bits or more"
            )
    return dict(content), args if isinstance(args, argparse.Namespace) else None, wrapped


def _format(tensors: State, wrapped: bool, path: Path) -> tuple[str, str]:
    """Return the format that keys and shapes speak for, and which."""
    if official.QUERY in tensors:
        return official.NAME, official.QUERY
    if any(name.endswith(".self_attn.adaption_gate") for name in tensors):
        return peft.NAME, "adaption_gate"
    for dialect in (lit.LIT_LLAMA, lit.LITGPT, lit.LITGPT_BEFORE_055):
        if any(f".{dialect.fused}.adapter_" in name for name in tensors):
            return dialect.name, f"{dialect.fused}.adapter_bias"
    gates = [tensor for name, tensor in tensors.items() if name.endswith(".attn.gating_factor")]
    if gates:
        shape = list(gates[0].shape)
        late = gates[0].ndim == 4 and shape[2] > 1  # [1, 1, H, 1]
        found = lit.LITGPT if wrapped or late else lit.LIT_LLAMA
        return found.name, f"gating_factor {shape}, {'under' if wrapped else 'not under'} 'model'"
    raise UserError(
        f"{path}: no adapter of a known format: it has {', '.join(sorted(tensors)[:2])}, ...; known are "
        "official LLaMA-Adapter, lit-llama, litgpt, PEFT's AdaptionPrompt and this application's"
    )


def _check_peft(folder: Path) -> None:
    config = read_json(member(folder, peft.CONFIG))
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != peft.PEFT_TYPE:
        raise UserError(f"{folder / peft.CONFIG}: peft_type is {kind!r}; expected {peft.PEFT_TYPE}")


def _open_peft(folder: Path) -> Opened:
    _check_peft(folder)
    name = peft.WEIGHTS if (folder / peft.WEIGHTS).is_file() else peft.WEIGHTS_BIN
    content, _ = _content(member(folder, name))
    tensors, _, _ = _unwrapped(content, folder / name)
    return Opened(folder, peft.NAME, tensors, why=peft.CONFIG)
