"""A converted base folder becomes a model, by memory map, straight to its device and precision."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lit_adapter.errors import UserError
from lit_adapter.model.llama import Llama
from lit_adapter.weights.base_folder import expected_shapes, read_config


def load_base(folder: Path, *, device: torch.device | str, dtype: torch.dtype) -> Llama:
    """Load a frozen base.

    A tensor is read from the map, moved and cast one at a time: on a CPU, a tensor already stored in
    ``dtype`` stays in the map and costs no memory of its own.

    Args:
        folder: a converted base, ``checkpoints/<name>``.
        device: where its tensors go.
        dtype: their precision there.

    Raises:
        UserError: a tensor that is missing, unexpected, misshapen or unreadable.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    wanted = expected_shapes(config)
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    state[name] = _checked(tensors.get_tensor(name), name, wanted, file).to(dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: cannot be read ({error}); convert the base again") from None
    missing = sorted(wanted.keys() - state.keys())
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]}; convert it again")
    own = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    if config.tie_embeddings:
        own["lm_head.weight"] = own["embed_tokens.weight"]
    model.load_state_dict(own, strict=True, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.to(device).requires_grad_(False)


def _checked(tensor: torch.Tensor, name: str, wanted: dict[str, tuple[int, ...]], file: Path) -> torch.Tensor:
    if name not in wanted:
        raise UserError(f"{file}: unexpected tensor {name}; convert the base again")
    if tuple(tensor.shape) != wanted[name]:
        raise UserError(
            f"{file}: {name} has shape {list(tensor.shape)}; config.json asks for {list(wanted[name])}"
        )
    return tensor
