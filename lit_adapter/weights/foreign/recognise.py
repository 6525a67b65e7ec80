"""Open an adapter file or folder, and find its format by keys and shapes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lit_adapter.errors import UserError
from lit_adapter.files.read import reading, refuse_stand_in
from lit_adapter.model.precision import FLOATS
from lit_adapter.weights.adapter_file import METADATA_KEY, read_adapter
from lit_adapter.weights.foreign.format import Format, Opened
from lit_adapter.weights.foreign.lit import LitGPT, LitLlama
from lit_adapter.weights.foreign.official import Official
from lit_adapter.weights.foreign.ours import Ours
from lit_adapter.weights.foreign.peft import Peft
from lit_adapter.weights.foreign.peft_lora import PeftLora
from lit_adapter.weights.foreign.pickles import read_torch_file
from lit_adapter.weights.plain import State
from lit_adapter.weights.shards import member, named_tensors

FORMATS: dict[str, Format] = {
    form.name: form for form in (Ours(), Official(), PeftLora(), Peft(), LitLlama(), LitGPT())
}


def recognise(opened: Opened, wanted: str = "auto") -> tuple[Format, str]:
    """Return a file's format, and what it was recognised by.

    ``wanted`` is auto, or the name of a format, which overrules the keys if they leave a choice.

    Raises:
        UserError: no known format, or certainly not the wanted one.
    """
    path = opened.path
    for form in FORMATS.values():
        why = form.recognise(opened)
        if why is not None:
            break
    else:
        raise UserError(
            f"{path}: no adapter of a known format: it has {', '.join(sorted(opened.tensors)[:2])}, ...; "
            "known are official LLaMA-Adapter, lit-llama, litgpt, PEFT's AdaptionPrompt and LoRA, and our own"
        )
    if wanted in ("auto", form.name):
        return form, why
    if form.is_certain or FORMATS[wanted].is_certain:
        raise UserError(
            f"{path}: --from says {wanted}, but it is {form.name}, recognised by {why}; leave --from out"
        )
    return FORMATS[wanted], "--from"


def open_adapter(path: Path) -> Opened:
    """Read an adapter file or folder.

    Raises:
        UserError: nothing there, damaged, or not an adapter.
    """
    with reading(path):
        if not path.exists():
            raise UserError(f"{path}: no such adapter file or folder")
        file = _weights_in(path) if path.is_dir() else path
        with file.open("rb") as stream:
            start = stream.read(9)
        content: Any = _read_safetensors(file) if start[8:9] == b"{" else read_torch_file(file)
    if content is None:
        info, tensors = read_adapter(file)
        return Opened(path, tensors, info)
    args, wrapped = None, isinstance(content, dict) and isinstance(content.get("model"), dict)
    if wrapped:
        args, content = content.get("args"), content["model"]
    tensors = named_tensors(content, file)
    for name, tensor in tensors.items():
        if tensor.dtype not in (*FLOATS.values(), torch.float64):
            raise UserError(
                f"{file}: tensor {name} is {tensor.dtype}; expected floating point numbers of 16 bits or more"
            )
    return Opened(path, tensors, args=args if isinstance(args, argparse.Namespace) else None, wrapped=wrapped)


def _weights_in(folder: Path) -> Path:
    formats = [form for form in FORMATS.values() if form.companion]
    for form in formats:
        if (folder / form.companion).is_file():
            there = [name for name in form.weights if (folder / name).is_file()]
            return member(folder, there[0] if there else form.weights[0])
    wanted = " or ".join(dict.fromkeys(form.companion for form in formats))
    raise UserError(f"{folder}: neither a run's folder with its adapter, nor a folder with {wanted}")


def _read_safetensors(path: Path) -> State | None:
    """Return the tensors of another code base's file; None if it is in our format."""
    refuse_stand_in(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            if METADATA_KEY in (file.metadata() or {}):
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error})") from None
