"""A folder that transformers loads with ``trust_remote_code``: an adapter with prefixes, and its base.

The folder contains the base, or names it: a commit on the Hub, or a folder on this machine. LoRA and V2's
biases and scales change the base's matrices, so with them the folder must contain the base.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lit_adapter.device import DTYPES
from lit_adapter.errors import UserError
from lit_adapter.files.read import read_object
from lit_adapter.files.write import write_bytes, write_json, write_text
from lit_adapter.model.layout import base_shapes, checkpoint_name
from lit_adapter.progress import Progress
from lit_adapter.text.chat_export import chat_template
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import Template
from lit_adapter.weights.base_folder import CONFIG, GENERATION_CONFIG, read_fingerprint
from lit_adapter.weights.export.adapted import Adapted
from lit_adapter.weights.export.prefixes import prefix_settings, prefix_tensors
from lit_adapter.weights.measure import compared, fixed_prompt
from lit_adapter.weights.merged import OUTPUT_BIAS, MergedSource
from lit_adapter.weights.output_folder import check_free, check_output, move_into_place, scratch_folder
from lit_adapter.weights.tensor_writer import Entry, write_tensors

MODELLING = Path(__file__).with_name("modeling_lit_adapter.py")
ADAPTER = "adapter.safetensors"
MERGED = {"lora": "LoRA", "linears": "biases and scales"}
"""Trained parts that go into the base's own weights, as messages call them."""
CLASSES = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
"""Endings of the names of a family's classes, by the class of transformers that loads them."""


def export_folder(
    adapted: Adapted,
    out: Path,
    *,
    with_base: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress = None,
) -> list[str]:
    """Write a folder for transformers, whole or not at all, and return what to tell the user.

    ``with_base`` puts the base into it, in ``dtype``; by default that of the base, or float32 if something is
    merged into it.

    Raises:
        UserError: ``dtype`` without a base in the folder, an output that must not be replaced, or a full
            disk.
    """
    merges = [part for part in MERGED if part in adapted.info.adapter.parts]
    if dtype is not None and not (with_base or merges):
        raise UserError("--dtype is for a base in the folder; give --with-base too")
    for source in (adapted.path, adapted.base):
        check_output(out, source, overwrite=overwrite, mark=MODELLING.name, what="an exported adapter")
    with scratch_folder(out) as scratch:
        if with_base or merges:
            settings = _write_whole(adapted, scratch, out, dtype, progress)
        else:
            settings = _write_reference(adapted, scratch, out)
        _write_rest(adapted, scratch, settings)
        measured = _compare(adapted, scratch)
        move_into_place(scratch, out)
    told = [f"holds the base, merged with {' and '.join(MERGED[part] for part in merges)}"] if merges else []
    told += adapted.merged().other_family
    if "base_model" in settings:
        seen = "" if settings["base_revision"] else ", seen from the folder: keep both in place"
        told = [f"its base is {settings['base_model']}{seen}; --with-base puts it into the folder"]
    return [*told, measured]


def _write_whole(
    adapted: Adapted, scratch: Path, out: Path, dtype: str | None, progress: Progress
) -> dict[str, Any]:
    """Write base, merged parts and prefixes as one set of weights, and return the keys of ``config.json``."""
    source, form = adapted.merged(), adapted.info.adapter
    own = DTYPES[dtype] if dtype else _default_dtype(adapted, source)
    prefixes = prefix_tensors(form, source.config, adapted.state)
    entries = [Entry(name, shape, own) for name, shape in base_shapes(source.config).items()]
    entries += [Entry(name, tuple(tensor.shape), torch.float32) for name, tensor in prefixes.items()]
    if form.head:
        entries.append(Entry(OUTPUT_BIAS, (source.config.vocab_size,), own))
    check_free(out, sum(entry.n_bytes for entry in entries))

    def load(name: str) -> Tensor:
        return prefixes[name] if name in prefixes else source.tensor(name)

    write_tensors(scratch, entries, load, source.label, progress)
    return {**source.config.to_hf(), "dtype": str(own).removeprefix("torch.")}


def _default_dtype(adapted: Adapted, source: MergedSource) -> torch.dtype:
    if set(MERGED) & set(adapted.info.adapter.parts):
        return torch.float32
    kinds = list(source.base.dtypes.values())
    return max(set(kinds), key=kinds.count)


def _write_reference(adapted: Adapted, scratch: Path, out: Path) -> dict[str, Any]:
    """Write the adapter alone, and return the keys of ``config.json``, which name its base."""
    info = adapted.info
    tensors = prefix_tensors(info.adapter, info.model, adapted.state)
    for name, tensor in adapted.state.items():
        module, _, kind = name.rpartition(".")
        if kind == "adapter_weight":  # of a norm
            tensors[checkpoint_name(f"{module}.weight")] = tensor
    write_bytes(scratch / ADAPTER, save(tensors, metadata={"format": "pt"}))
    fingerprint = read_fingerprint(adapted.base)
    origin, raw = fingerprint["source"], read_object(adapted.base / CONFIG)
    name, commit = origin.get("model"), origin.get("commit")
    on_hub = isinstance(name, str) and name.count("/") == 1 and isinstance(commit, str)
    beside = os.path.relpath(adapted.base.resolve(), out.resolve())
    return {
        **info.model.to_hf(),
        "dtype": raw.get("dtype", "float32"),
        "base_model": name if on_hub else beside,
        "base_revision": commit if on_hub else None,
        "base_fingerprint": fingerprint["weights"],
    }


def _write_rest(adapted: Adapted, scratch: Path, settings: dict[str, Any]) -> None:
    """Write configuration, tokenizer, chat template and the modelling file."""
    source, template = adapted.merged(), adapted.info.template
    source.write_tokenizer(scratch)
    tokenizer = load_tokenizer(adapted.base)
    write_text(scratch / "chat_template.jinja", chat_template(template, tokenizer))
    classes = f"LitAdapter{settings['architectures'][0].removesuffix('ForCausalLM')}"
    config = {
        **settings,
        **source.token_ids,
        **prefix_settings(adapted.info.adapter, adapted.info.model),
        "architectures": [f"{classes}ForCausalLM"],
        "model_type": "lit_adapter",
        "auto_map": {auto: f"{MODELLING.stem}.{classes}{kind}" for auto, kind in CLASSES.items()},
    }
    write_json(scratch / CONFIG, config)
    write_json(scratch / GENERATION_CONFIG, _generation(source, template, adapted.base))
    shutil.copyfile(MODELLING, scratch / MODELLING.name)


def _generation(source: MergedSource, template: Template, base: Path) -> dict[str, Any]:
    """Return ``generation_config.json``, in which an answer ends as it does here."""
    stops = sorted(template.stop_ids(load_tokenizer(base)))
    own = {**source.token_ids, **(source.generation or {}), "eos_token_id": stops}
    return {"pad_token_id": stops[0], **own}


def _compare(adapted: Adapted, folder: Path) -> str:
    """Say how far the folder's logits are from the adapter's, if transformers is installed."""
    try:
        from transformers.utils.logging import disable_progress_bar

        from lit_adapter.weights.export import modeling_lit_adapter as modelling
    except ImportError as error:
        return f"not compared with the adapter's logits, which needs the extra export ({error})"
    ids = fixed_prompt(adapted.base)
    wanted = adapted.logits(ids)
    disable_progress_bar()
    kind = getattr(modelling, read_object(folder / CONFIG)["architectures"][0])
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return compared(wanted, model(input_ids=ids).logits, "folder")
