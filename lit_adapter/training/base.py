"""The base of a run: read from its folder without its weights, and loaded with its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lit_adapter.config import Config
from lit_adapter.device import own_device
from lit_adapter.errors import UserError
from lit_adapter.model.adapter import attach, load_adapter_state
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.llama import Llama
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.tokenizer import Tokenizer, check_vocabulary
from lit_adapter.training.placement import Placement
from lit_adapter.training.strategy import is_sharded
from lit_adapter.weights.adapter_file import BaseIdentity, base_identity
from lit_adapter.weights.base_folder import read_config
from lit_adapter.weights.load import empty_base, load_base


@dataclass(frozen=True)
class Base:
    """A converted base, without its weights."""

    folder: Path
    config: LlamaConfig
    identity: BaseIdentity
    """Its name and fingerprints."""
    tokenizer: Tokenizer


def read_base(config: Config) -> Base:
    """Read the base of a run.

    Raises:
        UserError: the folder holds no converted base, its tokenizer does not fit it, or it has fewer layers
            than ``adapter.layers`` or a shorter context than ``data.max_length``.
    """
    folder = Path(config.base)
    sizes = read_config(folder)
    config.adapter.adapted_layers(sizes.n_layer)
    if config.data.max_length > sizes.context_length:
        raise UserError(
            f"data.max_length is {config.data.max_length}, but the base's context is "
            f"{sizes.context_length}; lower it"
        )
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, sizes.vocab_size)
    return Base(folder, sizes, base_identity(folder), tokenizer)


def load_model(config: Config, base: Base, placement: Placement, initial: dict[str, Tensor] | None) -> Llama:
    """Load a base and attach its adapter, whose tensors are ``initial``, or new ones.

    A base that is sharded over the processes has no matrices yet: they are read when the processes are
    connected.

    Raises:
        UserError: the base cannot be read, or the initial adapter does not fit it.
    """
    sharded = is_sharded(config.trainer)
    if sharded:
        model = empty_base(base.folder, dtype=placement.dtype)
    else:
        model = load_base(base.folder, device=own_device(placement.device), dtype=placement.dtype)
    attach(model, config.adapter, config.seed)
    if initial is not None:
        load_adapter_state(model, initial, source=str(config.init_from))
    if placement.device.type == "cuda" and not sharded:
        from lit_adapter.model import fused  # needs Triton, which comes with CUDA builds of torch

        fused.prepare(model, float8=config.trainer.base_precision == "fp8")
    return model
