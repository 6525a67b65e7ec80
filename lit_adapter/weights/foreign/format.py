"""One adapter format: how its files are recognised, read and written.

A new format is one module with a subclass of `Format`, and its name in the list `recognise.FORMATS`.
"""

from __future__ import annotations

import argparse
import io
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.files.write import write_bytes
from lit_adapter.model.config import AdapterConfig, GateName, LlamaConfig
from lit_adapter.model.families import FamilyName
from lit_adapter.model.prefix import prefix_name
from lit_adapter.weights.adapter_file import AdapterInfo
from lit_adapter.weights.plain import PlainAdapter, State


@dataclass
class Opened:
    """What an adapter file holds, before its tensors are understood."""

    path: Path
    """The file or folder that the user named."""
    tensors: State
    info: AdapterInfo | None = None
    """In our format, what the file says of the adapter."""
    args: argparse.Namespace | None = None
    """In a training checkpoint, the options of the training script."""
    wrapped: bool = False
    """Whether the tensors are under the key ``model``."""


class Format(ABC):
    """One code base's adapter format."""

    name: str
    template: str | None = None
    """The prompt template that the code base's Alpaca script trains with, if it has one."""
    gate: GateName | None = None
    """The gate form that is written; None if the format holds every form."""
    weights: tuple[str, ...] = ()
    """If an adapter is a folder: its file of tensors as written, and other names that are read."""
    companion = ""
    """If an adapter is a folder: the JSON file that describes it."""
    is_certain = False
    """Whether its files are unmistakable, so that ``--from`` cannot overrule the recognition."""
    families: tuple[FamilyName, ...] | None = None
    """The families whose prefixes the code base supports and treats as we do; None for all."""
    asks_gate = False
    """Whether the user has to say how the gates act, because the file does not."""

    @abstractmethod
    def recognise(self, opened: Opened) -> str | None:
        """Return what marks a file as of this format, or None if it is not.

        Raises:
            UserError: a file of this format whose companion is missing or describes something else.
        """

    @abstractmethod
    def read(self, opened: Opened, model: LlamaConfig, gate: GateName | None = None) -> PlainAdapter:
        """Return the adapter; ``gate`` is ``tanh`` or ``identity``, for a format that `asks_gate`.

        Raises:
            UserError: tensors that are missing, unknown or of other sizes than the base's.
        """

    def check_family(self, model: LlamaConfig) -> None:
        """Refuse a base of another family than the format's.

        Raises:
            UserError: names the family.
        """
        if self.families is not None and model.family not in self.families:
            raise UserError(
                f"{self.name} adapters are for bases of {', '.join(self.families)}; "
                f"this one is of {model.family}"
            )

    def check_writable(self, config: AdapterConfig, model: LlamaConfig) -> None:
        """Refuse an adapter that the format cannot express, or a base that the code base has no model for.

        Raises:
            UserError: says what the code base lacks.
        """
        if config.prompt_length and config.prefix_query == "unrotated":
            raise UserError(
                f"{self.name} attends to prompts by rotated queries alone, so it cannot hold an adapter of "
                "adapter.prefix_query unrotated; train one with prefix_query rotated"
            )

    def write(self, adapter: PlainAdapter, model: LlamaConfig) -> State:
        """Return the format's tensors of an adapter whose gates have the form `gate`."""
        raise UserError(f"{self.name} adapters can only be read")

    def outputs(self, out: Path) -> tuple[Path, ...]:
        """Return the files that `save` writes."""
        return (out / self.weights[0], out / self.companion) if self.companion else (out,)

    def save(self, out: Path, tensors: dict[str, Any], info: AdapterInfo) -> None:
        """Write the tensors that `write` returned, by default as a ``torch.save`` file."""
        stream = io.BytesIO()
        torch.save(tensors, stream)
        write_bytes(out, stream.getvalue())

    def remarks(self, config: AdapterConfig) -> list[str]:
        """Return the lines of the report that reading or writing an adapter of this format adds."""
        return []


def our_prefixes(prompts: list[Tensor], gates: list[Tensor], n_layer: int) -> State:
    """Return prompts and gates of the top layers, lowest first, under our names."""
    state: State = {}
    for layer, prompt, gate in zip(range(n_layer - len(prompts), n_layer), prompts, gates, strict=True):
        state |= {f"{prefix_name(layer)}.prompt": prompt, f"{prefix_name(layer)}.gate": gate}
    return state


def take_prefixes(
    left: State, prompt: str, gate: str, function: GateName, model: LlamaConfig, source: Path
) -> tuple[State, dict[str, Any], bool]:
    """Remove all prompts and gates from ``left``; in their names ``prompt`` and ``gate``, {} is the layer.

    Returns:
        Our tensors; ``prompt_length``, ``layers`` and ``gate`` for `AdapterConfig`; and whether the file has
        one gate per layer.

    Raises:
        UserError: a tensor that is missing or misshapen, or layers that are not the top ones.
    """
    pattern = re.compile(re.escape(prompt).replace(r"\{\}", "(0|[1-9][0-9]{0,4})"))
    layers = sorted(int(m[1]) for m in map(pattern.fullmatch, left) if m)
    if layers and layers != list(range(layers[0], model.n_layer)):
        raise UserError(
            f"{source}: prompts on {len(layers)} layers from {layers[0]} to {layers[-1]}, but they belong to "
            f"the top layers and the base has {model.n_layer}; give the adapter's own base with --base"
        )
    prompts = [take(left, prompt.format(layer), (-1, model.n_embd), source) for layer in layers]
    gates, form, single = take_gates(left, [gate.format(layer) for layer in layers], function, model, source)
    sizes = {"prompt_length": len(prompts[0]) if prompts else 0, "layers": len(layers) or None, "gate": form}
    return our_prefixes(prompts, gates, model.n_layer), sizes, single


def take_gates(
    left: State, names: list[str], function: GateName, model: LlamaConfig, source: Path
) -> tuple[list[Tensor], GateName, bool]:
    """Remove gates from ``left`` and return them in one of our forms, and whether there is one per layer.

    ``function`` is ``tanh`` or ``identity`` (per head; per layer in old files), or ``layer``.

    Raises:
        UserError: a gate that is missing or of another size.
    """
    single = bool(names) and model.n_head > 1 and all(left[n].numel() == 1 for n in names if n in left)
    size = 1 if single or function == "layer" else model.n_head
    gates = [take(left, name, (size,), source) for name in names]
    if function == "tanh":  # we have no form "tanh per layer"; the same tanh in every head is equal to it
        gates = [gate.expand(model.n_head).clone() for gate in gates]
        return gates, function, single
    return gates, "layer" if single else function, single


def take(left: State, name: str, shape: tuple[int, ...], source: Path) -> Tensor:
    """Remove a tensor from ``left`` and return a copy in fp32, reshaped to ``shape``; -1 in it is any size.

    Raises:
        UserError: it is missing or does not fit the base.
    """
    if name not in left:
        raise UserError(f"{source}: tensor {name} is missing")
    tensor = left.pop(name)
    if -1 in shape:
        fits = tensor.ndim > 1 and tensor.shape[-1] == shape[-1]
    else:
        fits = tensor.numel() == math.prod(shape)
    if not fits:
        expected = " x ".join("K" if size == -1 else str(size) for size in shape)
        raise UserError(
            f"{source}: {name} has shape {list(tensor.shape)}; expected {expected} values; "
            "give the adapter's own base with --base"
        )
    return tensor.detach().float().reshape(shape).clone()


def refuse_rest(left: State, source: Path, owner: str) -> None:
    """Refuse tensors that reading has not used, by a UserError that names the first."""
    if left:
        raise UserError(f"{source}: tensor {min(left)} does not belong to an adapter of {owner}")
