"""What the readers of all checkpoint formats share: names, checks and the order of rows of tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.files.read import refuse_stand_in
from lit_adapter.files.write import write_bytes
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.layout import base_shapes, block_layout
from lit_adapter.weights.base_folder import TOKENIZER_FILES, VOCABULARY_FILES
from lit_adapter.weights.shards import member

N_NAMED = 3
"""Tensors that a message names at most."""


class Source(ABC):
    """A checkpoint whose tensors are checked but not read; `tensor` reads one, by Hugging Face's name."""

    format: str
    config: LlamaConfig
    dtypes: dict[str, torch.dtype]
    """Of every tensor of the base, as `tensor` returns it, by Hugging Face's name."""
    token_ids: dict[str, Any]
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` if known, for ``config.json``."""
    generation: dict[str, Any] | None = None
    """Content of ``generation_config.json``, if known."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Return a tensor in Hugging Face's layout."""

    @abstractmethod
    def label(self, name: str) -> str:
        """Return the file and the source's own name of a tensor, for messages."""

    @abstractmethod
    def write_tokenizer(self, out: Path) -> None:
        """Write the tokenizer's files into ``out``."""


def check_tensors(
    found: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    config: LlamaConfig,
    file_of: Callable[[str], Path],
    sizes: str,
) -> None:
    """Compare the shapes ``found`` in a source, by its own names, with what its configuration asks for.

    ``names`` maps Hugging Face's names to those of the source (see `renamed`); it is empty if they are the
    same. ``file_of`` returns the file that holds, or should hold, a tensor, and ``sizes`` is where the sizes
    come from.

    Raises:
        UserError: missing, unknown or misshapen tensors; the first few are named.
    """
    expected = {names.get(name, name): shape for name, shape in base_shapes(config).items()}
    missing = [name for name in expected if name not in found]
    if missing:
        raise UserError(
            f"{file_of(missing[0])}: {_listed(missing)} missing, which the sizes in {sizes} ask for"
        )
    extra = sorted(name for name in found if name not in expected)
    if extra:
        raise UserError(
            f"{file_of(extra[0])}: {_listed(extra)} unknown in a {config.family} model of the sizes in "
            f"{sizes}; only plain checkpoints of a family can be converted"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(
                f"{file_of(name)}: tensor {name} has shape {list(found[name])}, "
                f"but the sizes in {sizes} ask for {list(shape)}"
            )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:N_NAMED])
    more = f" and {len(names) - N_NAMED} more" if len(names) > N_NAMED else ""
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown}{more} are"


def renamed(config: LlamaConfig, modules: Mapping[str, str], layers: str) -> dict[str, str]:
    """Return another format's name of every tensor of a base, by Hugging Face's name.

    ``modules`` maps Hugging Face's names of modules, within a layer or at the top, to those of the format,
    and ``layers`` is its name for the list of layers.
    """
    names = {}
    for name in base_shapes(config):
        module, _, kind = name.rpartition(".")
        if module in modules:
            names[name] = f"{modules[module]}.{kind}"
        else:
            _, _, layer, inner = module.split(".", 3)
            names[name] = f"{layers}.{layer}.{modules[inner]}.{kind}"
    return names


def half_split(name: str, tensor: Tensor, config: LlamaConfig, *, undo: bool = False) -> Tensor:
    """Reorder the rows of a q or k tensor for Hugging Face's rotary layout; return others as they are.

    Meta rotates neighbours (2i, 2i + 1) of an attention head, Hugging Face the pair (i, i + D/2).

    Args:
        name: in our spelling or Hugging Face's, such as ``layers.3.self_attn.q_proj.weight``.
        tensor: ``[H * D, ...]`` or ``[G * D, ...]``, in Meta's order.
        config: sizes of the base.
        undo: reorder from Hugging Face's order to Meta's instead.
    """
    linears = block_layout(config).linears
    n_head = next((linear.rotated_heads for linear in linears if f".{linear.name}." in name), 0)
    if not n_head:
        return tensor
    pairs = (n_head, 2, -1) if undo else (n_head, -1, 2)
    return tensor.reshape(*pairs, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy the tokenizer's files of a source folder.

    Raises:
        UserError: there is no vocabulary, or a file is not what its name says.
    """
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(f"{folder}: no tokenizer; expected {' or '.join(VOCABULARY_FILES)} there")
    for name in TOKENIZER_FILES:
        if (folder / name).exists() or (folder / name).is_symlink():
            path = member(folder, name)
            refuse_stand_in(path)
            write_bytes(out / name, path.read_bytes())
