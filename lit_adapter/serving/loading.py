"""What a server loads: the base, its adapters, and how much memory goes to their answers."""

from __future__ import annotations

import gc
from pathlib import Path

from lit_adapter.device import free_bytes
from lit_adapter.errors import UserError
from lit_adapter.generation.lane import MOST_KEPT
from lit_adapter.generation.load import load
from lit_adapter.model.llama import Llama
from lit_adapter.serving.adapters import Adapters, adapter_files
from lit_adapter.serving.names import check_name
from lit_adapter.serving.options import ServerOptions
from lit_adapter.text.load import load_tokenizer
from lit_adapter.weights.adapter_file import base_of

MOST_UNASKED = 2**32
"""Bytes of keys and values on a CPU, unless ``--context`` asks for more."""


def load_adapters(options: ServerOptions) -> Adapters:
    """Load the base and all adapters.

    Raises:
        UserError: as `load`; ``--adapters`` is not a folder, or names no base and none is given.
    """
    folder = options.folder
    if folder is not None and not folder.is_dir():
        raise UserError(f"--adapters {folder}: not a folder")
    for name in options.adapters:
        check_name(name)
    base_folder = options.base or _named_base(options)
    template = options.template
    if template is None:
        template = "chat" if load_tokenizer(base_folder).chat_template else "alpaca"
    base = load(
        base=base_folder, device=options.device, dtype=options.dtype, template=template, verify=options.verify
    )
    adapters = Adapters(base, folder)
    gc.freeze()  # the garbage collector need not go through the loaded models with every few adapters
    for name, path in options.adapters.items():
        other = adapters.listed().get(name)
        if other is not None and not (path.exists() and path.samefile(other)):
            raise UserError(f"--adapter {name}: {other} has the same name; give the adapter another")
        adapters.load(name, path)
    adapters.scan(patient=False)
    gc.freeze()
    return adapters


def _named_base(options: ServerOptions) -> Path:
    """Return the base that the first adapter names; of those in a folder, the first one whose base is found.

    Raises:
        UserError: there is none.
    """
    for path in options.adapters.values():
        return base_of(path)
    error = UserError(f"--adapters {options.folder}: no adapter in it names a base; give --base FOLDER")
    for _, path in sorted(adapter_files(options.folder).items() if options.folder else ()):
        try:
            return base_of(path)
        except UserError as refused:
            error = refused
    raise error


def choose_context(model: Llama, options: ServerOptions) -> int:
    """Return the longest prompt plus answer, in tokens, that fits in every slot.

    Raises:
        UserError: ``--context`` is longer than the base's, or memory has no room for the slots.
    """
    config, weight = model.config, model.embed_tokens.weight
    most = config.context_length
    if options.context is not None and not 0 < options.context <= most:
        raise UserError(f"--context is {options.context}; expected 1 to {most}, the base's context")
    per_token = 2 * config.n_layer * config.n_kv_head * config.head_dim * weight.element_size()
    free = free_bytes(weight.device)
    per_context = per_token * (options.slots + MOST_KEPT)  # bytes
    room = most if free is None else free // 2 // per_context
    unasked = room if weight.device.type == "cuda" else max(64, MOST_UNASKED // per_context)
    wanted = options.context or min(most, room, unasked)
    if wanted > room or wanted < 64:
        raise UserError(
            f"{options.slots} slots of {max(wanted, 64)} tokens need more than half of the free memory; "
            "lower --slots or --context"
        )
    return wanted
