"""Merge a base and an adapter without prompts into one plain Hugging Face model of the base's family.

`merged` says how. Where the base's family has no biases such as V2's, the nearest one that has all the rest
is written. A gated prefix cannot be merged: it has a second softmax, which no weights of a plain model can
express.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.progress import Progress
from lit_adapter.weights.adapter_file import AdapterInfo, check_base, read_adapter
from lit_adapter.weights.base_content import check_content
from lit_adapter.weights.base_search import find_base
from lit_adapter.weights.convert import write_base
from lit_adapter.weights.measure import compared, fixed_prompt, logits
from lit_adapter.weights.merged import MergedSource
from lit_adapter.weights.output_folder import check_output, sweep_leftovers
from lit_adapter.weights.plain import PlainAdapter


def merge(
    adapter: Path,
    out: Path,
    *,
    base: Path | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    progress: Progress = None,
) -> str:
    """Write the merged model as a base folder, and say how far its logits are from the adapter's.

    The adapter's ``base`` is by default the one that it names. The merged weights are rounded to ``dtype``:
    float32, bfloat16 or float16. ``overwrite`` replaces a base folder that is already there.

    Raises:
        UserError: an adapter that cannot be merged, another base, or an output that must not be replaced.
    """
    info, state = read_adapter(adapter)
    refuse_unmergeable(info, adapter)
    folder = find_base(info.base, adapter) if base is None else base
    check_base(info, folder, adapter)
    check_content(folder, everything=True)  # all of it is read anyway, and the result is kept
    out = out.absolute()
    sweep_leftovers(out)
    for source in (adapter, folder):
        check_output(out, source, overwrite=overwrite)
    origin = {"format": "merged", "base": info.base.name, "adapter": adapter.name}
    ids = fixed_prompt(folder)
    before = logits(folder, ids, PlainAdapter(info.adapter, state))
    _check_finite(before, f"{adapter}: its logits are NaN or infinite; train it again")
    measured: list[str] = []

    def compare(written: Path) -> None:
        after = logits(written, ids, None)
        _check_finite(after, f"{out}: its logits are NaN or infinite in {dtype}; use --dtype float32")
        measured.append(compared(before, after, "merged model"))

    merged = MergedSource(folder, adapter, info.adapter, state)
    write_base(merged, folder, out, dtype, origin, progress=progress, check=compare)
    return "; ".join([*merged.other_family, *measured])


def _check_finite(found: Tensor, message: str) -> None:
    if not bool(torch.isfinite(found).all()):
        raise UserError(message)


def refuse_unmergeable(info: AdapterInfo, path: Path) -> None:
    """Refuse, by a UserError, an adapter that a plain model cannot hold."""
    if info.adapter.prompt_length:
        raise UserError(
            f"{path}: has prompts, whose attention has a softmax of its own that a plain model lacks, "
            "so it cannot be merged; export it for transformers (scripts/export.py), or train one with "
            "--adapter.version v2, --adapter.norms true or --adapter.lora.rank, and --adapter.prompt_length 0"
        )
    if info.adapter.head:
        raise UserError(
            f"{path}: adapts the output layer, which has no bias in a plain model, so it cannot be merged; "
            "train one with --adapter.head false"
        )
