"""The base of a run as its folder describes it; no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.model.config import LlamaConfig
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.tokenizer import Tokenizer, check_vocabulary
from lit_adapter.weights.adapter_file import BaseIdentity, base_identity
from lit_adapter.weights.base_folder import read_config


@dataclass(frozen=True)
class Base:
    """A converted base."""

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
