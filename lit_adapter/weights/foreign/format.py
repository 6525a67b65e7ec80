"""One adapter format: how its files are recognised, read and written.

A new format is one module with a subclass of `Format`, and one entry in `recognise.FORMATS`.
"""

from __future__ import annotations

import argparse
import io
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_adapter import files
from lit_adapter.errors import UserError
from lit_adapter.model.config import AdapterConfig, GateForm, LlamaConfig
from lit_adapter.weights.adapter_file import AdapterInfo
from lit_adapter.weights.plain import PlainAdapter, State

LAYER = "(0|[1-9][0-9]{0,4})"
"""A layer's number in a pattern; no code base writes it with leading zeros."""


@dataclass
class Opened:
    """What an adapter file holds, before its tensors are understood."""

    path: Path
    """The file or folder that the user named."""
    tensors: State
    info: AdapterInfo | None = None
    """In our format, what the file says of the adapter."""
    args: argparse.Namespace | None = None
    """The options of the training script, where the file is a training checkpoint that holds them."""
    wrapped: bool = False
    """Whether the tensors are under the key ``model``."""


class Format(ABC):
    """One code base's adapter format."""

    name: str
    template: str | None = None
    """The prompt template that the code base's Alpaca script trains with, if it has one."""
    gate: GateForm | None = None
    """The gate form that is written; None if the format holds every form."""
    weights: tuple[str, ...] = ()
    """If an adapter is a folder, its file of tensors as written, and other names that are read."""
    companion: str | None = None
    """If an adapter is a folder, the JSON file that describes it."""
    is_certain = False
    """Whether a file cannot be mistaken for another format's, so that ``--from`` cannot overrule it."""
    asks_gate = False
    """Whether the user has to say how the gates act, because the file does not."""

    @abstractmethod
    def recognise(self, opened: Opened) -> str | None:
        """Return what marks the file as of this format, or None if it is not.

        Raises:
            UserError: a file of this format that lacks its companion.
        """

    @abstractmethod
    def read(self, opened: Opened, model: LlamaConfig, gate: GateForm | None = None) -> PlainAdapter:
        """Return the adapter.

        Args:
            opened: the file.
            model: the base's sizes.
            gate: ``tanh`` or ``identity``, for a format that `asks_gate`.

        Raises:
            UserError: tensors that are missing, unknown or of other sizes than the base's.
        """

    def check_writable(self, config: AdapterConfig, model: LlamaConfig) -> None:  # noqa: B027
        """Refuse an adapter that the format cannot express, or a base that the code base has no model for.

        Raises:
            UserError: says what the code base lacks.
        """

    def write(self, adapter: PlainAdapter, model: LlamaConfig) -> State:
        """Return the format's tensors of an adapter whose gates have the form `gate`."""
        raise UserError(f"{self.name} adapters can only be read")

    def outputs(self, out: Path) -> tuple[Path, ...]:
        """Return the files that `save` writes."""
        return (out,) if self.companion is None else (out / self.weights[0], out / self.companion)

    def save(self, out: Path, tensors: dict[str, Any], info: AdapterInfo) -> None:
        """Write the tensors that `write` returned, by default as a ``torch.save`` file."""
        stream = io.BytesIO()
        torch.save(tensors, stream)
        files.write_bytes(out, stream.getvalue())

    def remarks(self, config: AdapterConfig) -> list[str]:
        """Return the lines of the report that reading or writing an adapter of this format adds."""
        return []


def prefix_name(layer: int) -> str:
    """Return what our names of a layer's prompt and gate begin with."""
    return f"layers.{layer}.self_attn.prefix"


def count_top_layers(found: list[int], n_layer: int, source: Path) -> int:
    """Return how many layers carry a prompt.

    Args:
        found: their numbers, in order.
        n_layer: layers of the base.
        source: the file, for messages.

    Raises:
        UserError: they are not the top layers of the base.
    """
    if found and found != list(range(found[0], n_layer)):
        raise UserError(
            f"{source}: prompts on {len(found)} layers from {found[0]} to {found[-1]}, but prompts belong to "
            f"the top layers and the base has {n_layer}; give the adapter's own base with --base"
        )
    return len(found)


def take(state: State, name: str, shape: tuple[int, ...], source: Path) -> Tensor:
    """Remove a tensor from ``state`` and return a copy in fp32, reshaped to ``shape``.

    Raises:
        UserError: it is missing or holds another number of values.
    """
    if name not in state:
        raise UserError(f"{source}: tensor {name} is missing")
    tensor = state.pop(name)
    if tensor.numel() != math.prod(shape):
        raise UserError(
            f"{source}: {name} has shape {list(tensor.shape)}; the base asks for {math.prod(shape)} values "
            f"({' x '.join(map(str, shape))}); give the adapter's own base with --base"
        )
    return tensor.detach().float().reshape(shape).clone()


def refuse_rest(left: State, source: Path, owner: str) -> None:
    """Refuse tensors that reading has not taken.

    Raises:
        UserError: there is one.
    """
    if left:
        raise UserError(f"{source}: tensor {min(left)} does not belong to an adapter of {owner}")
