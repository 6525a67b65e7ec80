"""Loads an adapter on its base, or a plain base, from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lit_adapter import arguments
from lit_adapter.device import DTYPES, choose_device, choose_dtype, free_bytes
from lit_adapter.errors import UserError
from lit_adapter.generation.adapted import AdaptedLlama, Loaded
from lit_adapter.generation.adapter import attached
from lit_adapter.generation.engine import Engine
from lit_adapter.model.layout import base_shapes, n_numbers
from lit_adapter.spinning import yield_shared_cores
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template
from lit_adapter.text.tokenizer import check_vocabulary
from lit_adapter.weights.adapter_file import check_base, read_adapter
from lit_adapter.weights.adapter_search import find_adapter
from lit_adapter.weights.base_content import check_content
from lit_adapter.weights.base_folder import read_config
from lit_adapter.weights.base_search import find_base
from lit_adapter.weights.load import load_base


def load(
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    template: str | None = None,
    verify: bool = False,
) -> AdaptedLlama:
    """Load an adapter on its base, or a plain base.

    Args:
        adapter: an ``adapter.safetensors`` or a run's folder; None for the plain base.
        base: a converted base folder; by default the one that the adapter names, in ``checkpoints`` of the
            adapter's folder or of one above it, of ``$LIT_ADAPTER_HOME``, of the working directory, or of the
            checkout of this package.
        device: ``cpu`` or ``cuda``, which CUDA_VISIBLE_DEVICES chooses; by default CUDA where there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default fp32 on a CPU with memory for it, where
            that is faster for one request at a time, and otherwise bf16 if the device multiplies it faster.
        template: prompt template of a plain base (``alpaca`` by default); an adapter brings its own.
        verify: compare every byte of the base with its checksums, even if its files look unchanged.

    Returns:
        A model that several threads may use; a process forked after loading cannot (`AdaptedLlama`).

    Raises:
        UserError: files that are missing, damaged, changed, or do not belong together; an argument out of its
            range, or of another type. It is a ValueError, and for types a TypeError too.
    """
    _check_kinds(adapter, base, device, dtype, template)
    path = find_adapter(adapter) if adapter is not None else None
    if adapter is None and base is None:
        raise UserError("give an adapter, a base, or both")
    if adapter is not None and template is not None:
        raise UserError("an adapter brings its template; leave template out")
    folder = Path(str(base))
    if path is not None:
        info, state = read_adapter(path)
        folder = find_base(info.base, path) if base is None else folder
        check_base(info, folder, path)
    target = choose_device(device)
    if target.type == "cpu":
        yield_shared_cores()
    check_content(folder, everything=verify)
    tokenizer = load_tokenizer(folder)
    if dtype in (None, "auto") and target.type == "cpu" and _fits_in_fp32(folder):
        dtype = torch.float32
    model = load_base(folder, device=target, dtype=choose_dtype(dtype, target)).eval()
    check_vocabulary(tokenizer, model.config.vocab_size)
    loaded = Loaded(folder, model, Engine())
    if path is None:
        chosen = resolve_template("alpaca" if template is None else template, tokenizer, conversations=True)
        return AdaptedLlama(model, tokenizer, chosen, loaded)
    adapted = attached(model, info.adapter, state, str(path))
    return AdaptedLlama(adapted, tokenizer, info.template, loaded, path)


def _check_kinds(adapter: Any, base: Any, device: Any, dtype: Any, template: Any) -> None:
    """Refuse arguments of `load` that have the wrong type."""
    for name, value in (("adapter", adapter), ("base", base)):
        if value is not None:
            arguments.path(name, value)
    none = type(None)
    arguments.of_kind("device", device, (str, torch.device, none), "auto, cpu or cuda")
    arguments.of_kind("dtype", dtype, (str, torch.dtype, none), f"auto, {', '.join(DTYPES)}")
    arguments.of_kind("template", template, (str, none), "text (str)")


def _fits_in_fp32(folder: Path) -> bool:
    """Whether free memory holds a base in fp32, and as much again for its cache and everything else."""
    free = free_bytes(torch.device("cpu"))
    n_bytes = 4 * n_numbers(base_shapes(read_config(folder)))
    return free is None or 2 * n_bytes <= free
