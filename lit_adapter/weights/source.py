"""What the readers of every format share: the names of a LLaMA's tensors, and the checks on them."""

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
from lit_adapter.weights.base_folder import TOKENIZER_FILES, VOCABULARY_FILES
from lit_adapter.weights.shards import member

N_NAMED = 3
"""How many of the tensors at fault a message names."""


class Source(ABC):
    """A checkpoint, checked but not read: `tensor` reads one at a time under Hugging Face's names."""

    format: str
    config: LlamaConfig
    dtypes: dict[str, torch.dtype]
    """Of every tensor of the base, as `tensor` returns it."""
    token_ids: dict[str, Any]
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` where known, for ``config.json``."""
    generation: dict[str, Any] | None
    """Content of ``generation_config.json``, where known."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Return a tensor in Hugging Face's layout."""

    @abstractmethod
    def label(self, name: str) -> str:
        """Return the file and the source's own name of a tensor, for messages."""

    @abstractmethod
    def write_tokenizer(self, out: Path) -> None:
        """Put the tokenizer's files into ``out``."""


def check_tensors(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    file_of: Callable[[str], Path],
    sizes: str,
) -> None:
    """Compare tensors by name and shape, in the source's own names.

    Args:
        found: shapes in the source.
        expected: shapes that the configuration asks for.
        file_of: the file that holds, or should hold, a tensor.
        sizes: where the expected sizes come from.

    Raises:
        UserError: missing, unknown or misshapen tensors; the first few are named.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        raise UserError(
            f"{file_of(missing[0])}: {_listed(missing)} missing, which the sizes in {sizes} ask for"
        )
    extra = sorted(name for name in found if name not in expected)
    if extra:
        raise UserError(
            f"{file_of(extra[0])}: {_listed(extra)} unknown in a LLaMA of the sizes in {sizes}; "
            "only plain LLaMA checkpoints can be converted"
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


def renamed(name: str, modules: Mapping[str, str], layers: str) -> str:
    """Return another format's spelling of a Hugging Face tensor name.

    Args:
        name: such as ``model.layers.3.mlp.up_proj.weight``.
        modules: from Hugging Face's module, as within a layer or at the top, to the other's.
        layers: what the other format calls the list of layers.
    """
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{modules[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    return f"{layers}.{layer}.{modules[inner]}.{kind}"


def half_split_rows(tensor: Tensor, n_head: int) -> Tensor:
    """Reorder the rows of a q or k projection (or its bias) for Hugging Face's rotary layout.

    Meta rotates neighbours (2i, 2i + 1) of a head, Hugging Face the pair (i, i + D/2).

    Args:
        tensor: [n_head * D, ...], in Meta's order.
        n_head: heads in the tensor.
    """
    pairs = tensor.reshape(n_head, -1, 2, *tensor.shape[1:])  # [H, D/2, 2, ...]
    return pairs.transpose(1, 2).reshape(tensor.shape)


def neighbour_rows(tensor: Tensor, n_head: int) -> Tensor:
    """Undo `half_split_rows`: reorder rows of Hugging Face's rotary layout for Meta's."""
    halves = tensor.reshape(n_head, 2, -1, *tensor.shape[1:])  # [H, 2, D/2, ...]
    return halves.transpose(1, 2).reshape(tensor.shape)


def is_rotated(name: str) -> bool:
    """Whether a tensor's rows follow the rotary layout."""
    return ".q_proj." in name or ".k_proj." in name


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy the tokenizer's files of a source folder.

    Raises:
        UserError: there is no vocabulary, or something else stands in its place.
    """
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(f"{folder}: no tokenizer; expected {' or '.join(VOCABULARY_FILES)} there")
    for name in TOKENIZER_FILES:
        if (folder / name).exists() or (folder / name).is_symlink():
            path = member(folder, name)
            refuse_stand_in(path)
            write_bytes(out / name, path.read_bytes())
