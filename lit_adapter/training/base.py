"""What a run starts from: its base, and the adapter that ``init_from`` names instead of new prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lit_adapter.config import Config
from lit_adapter.device import own_device
from lit_adapter.errors import UserError
from lit_adapter.files.read import file_sha256
from lit_adapter.model.adapter import attach, check_same_form, load_adapter_state
from lit_adapter.model.block_weights import prepare
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.llama import Llama
from lit_adapter.streams import Say
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import Template
from lit_adapter.text.tokenizer import Tokenizer, check_vocabulary
from lit_adapter.training.checkpoint import read_checkpoint
from lit_adapter.training.placement import Placement
from lit_adapter.training.strategy import is_sharded
from lit_adapter.weights.adapter_file import BaseIdentity, base_identity, check_base, read_adapter
from lit_adapter.weights.adapter_search import find_adapter
from lit_adapter.weights.base_content import check_content
from lit_adapter.weights.base_folder import check_converted, read_config
from lit_adapter.weights.load import empty_base, load_base


@dataclass(frozen=True)
class Base:
    """A converted base, without its weights."""

    folder: Path
    config: LlamaConfig
    identity: BaseIdentity
    """Its name and fingerprints."""
    tokenizer: Tokenizer


def read_base(config: Config, say: Say, *, verify: bool = False) -> Base:
    """Read the base of a run; ``verify`` compares all of it with its checksums (see `check_content`).

    Raises:
        UserError: the folder holds no converted base, or one that has changed; its tokenizer does not fit it;
            or it has fewer layers than ``adapter.layers`` or a shorter context than ``data.max_length``.
    """
    folder = Path(config.base)
    check_converted(folder)
    sizes = read_config(folder)
    config.adapter.adapted_layers(sizes.n_layer)
    if config.data.max_length > sizes.context_length:
        raise UserError(
            f"data.max_length is {config.data.max_length}, but the base's context is "
            f"{sizes.context_length}; lower it"
        )
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, sizes.vocab_size)
    check_content(folder, everything=verify, say=say)
    return Base(folder, sizes, base_identity(folder), tokenizer)


@dataclass(frozen=True)
class InitialAdapter:
    """The tensors and fingerprint of an initial adapter; both None if ``init_from`` names none."""

    state: dict[str, Tensor] | None = None
    """None also if the file is gone: the checkpoint that is resumed has the adapter trained from it."""
    sha256: str | None = None
    """The first 16 digits of the file's SHA-256."""

    def tensors(self, checkpoint: Path | None) -> dict[str, Tensor] | None:
        """Return the tensors to start from, if any; the checkpoint's where the file is gone."""
        if self.state is None and self.sha256 is not None and checkpoint is not None:
            return dict(read_checkpoint(checkpoint)["state_dict"])
        return self.state


def read_initial_adapter(
    config: Config, base: Base, template: Template, saved_sha256: str | None, say: Say
) -> InitialAdapter:
    """Read the file that ``init_from`` names and check that it fits the run.

    A resumed run, whose checkpoint has the file's ``saved_sha256``, does not need the file again. If the file
    has another template, that is only reported.

    Raises:
        UserError: there is no such file, it is not an adapter of ours, or it does not fit.
    """
    if config.init_from is None:
        return InitialAdapter()
    path = find_adapter(config.init_from)
    if saved_sha256 is not None and not path.exists():
        say(f"{path}: is gone, but not needed: the checkpoint has the adapter trained from it")
        return InitialAdapter(sha256=saved_sha256)
    info, state = read_adapter(path)
    check_base(info, base.folder, path)
    check_same_form(info.adapter, config.adapter, base.config, path)
    if info.template != template:
        say(f"{path}: its template is {info.template.kind}; this run uses {template.kind}")
    if saved_sha256 is None:
        say(f"starting from {path}")
    return InitialAdapter(state, file_sha256(path)[:16])


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
        prepare(model, float8=config.trainer.base_precision == "fp8")
    return model
