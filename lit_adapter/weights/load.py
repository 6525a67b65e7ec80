"""Load a converted base folder by memory map, straight to its device and precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lit_adapter.errors import UserError
from lit_adapter.model.layout import base_shapes
from lit_adapter.model.llama import Llama, empty_llama
from lit_adapter.weights.base_folder import read_config, weight_files

Reader = Callable[[Any, str, torch.Tensor, torch.dtype], torch.Tensor]
"""Returns a parameter's value for this device, given an open safetensors file, the tensor's name in it, the
empty parameter, and the dtype to return."""


def _read_whole(tensors: Any, name: str, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensors.get_tensor(name).to(dtype)


def load_base(folder: Path, *, device: torch.device | str, dtype: torch.dtype) -> Llama:
    """Load a frozen base from a converted folder, ``checkpoints/<name>``.

    Tensors are read, moved and cast one at a time. On a CPU, a tensor that is stored in ``dtype`` stays in
    the memory map and takes no memory of its own.

    Raises:
        UserError: a tensor that is missing, unexpected, misshapen or unreadable.
    """
    model = empty_llama(read_config(folder))
    fill_base(model, folder, device=device, dtype=dtype)
    return model.to(device)


def empty_base(folder: Path, *, dtype: torch.dtype) -> Llama:
    """Return a frozen base with its norms and biases in memory, and its matrices on torch's meta device.

    The matrices can then be sharded before `fill_base` reads them.
    """
    model = empty_llama(read_config(folder))
    fill_base(model, folder, device="cpu", dtype=dtype, largest=1)
    return model


def fill_base(
    model: Llama,
    folder: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    read: Reader = _read_whole,
    largest: int = 2,
) -> None:
    """Read, by ``read``, the parameters that are on the meta device and have up to ``largest`` dimensions.

    Raises:
        UserError: as `load_base`.
    """
    wanted = base_shapes(model.config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: set[str] = set()
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    _check(tensors, name, wanted, file)
                    found.add(name)
                    own = name.removeprefix("model.")
                    if parameters[own].is_meta and parameters[own].ndim <= largest:
                        state[own] = read(tensors, name, parameters[own], dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: cannot be read ({error}); convert the base again") from None
    missing = sorted(wanted.keys() - found)
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]}; convert it again")
    model.load_state_dict(parameters | state, strict=True, assign=True)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight


def _check(tensors: Any, name: str, wanted: dict[str, tuple[int, ...]], file: Path) -> None:
    """Compare a tensor's name and shape with the configuration before anything is allocated for it."""
    if name not in wanted:
        raise UserError(f"{file}: unexpected tensor {name}; convert the base again")
    shape = tensors.get_slice(name).get_shape()
    if tuple(shape) != wanted[name]:
        raise UserError(f"{file}: {name} has shape {shape}; config.json asks for {list(wanted[name])}")
