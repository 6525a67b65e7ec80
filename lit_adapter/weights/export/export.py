"""An adapter for another program: what ``scripts/export.py`` does."""

from __future__ import annotations

from pathlib import Path

from lit_adapter.errors import UserError
from lit_adapter.progress import Progress
from lit_adapter.weights.adapter_file import check_base, read_adapter
from lit_adapter.weights.base_content import check_content
from lit_adapter.weights.base_search import find_base
from lit_adapter.weights.export.adapted import Adapted
from lit_adapter.weights.export.gguf_folder import export_gguf
from lit_adapter.weights.export.transformers_folder import export_folder
from lit_adapter.weights.merge import merge, refuse_unmergeable
from lit_adapter.weights.output_folder import sweep_leftovers


def export(
    adapter: Path,
    out: Path,
    *,
    base: Path | None = None,
    to: str = "transformers",
    kind: str | None = None,
    with_base: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress = None,
) -> list[str]:
    """Write an adapter for another program, and return lines for the user.

    ``to`` is transformers or gguf, where ``kind`` is the type of the matrices, by default q8_0. For
    transformers, an adapter without prompts becomes a plain model (`merge`), which needs no code of ours; for
    other adapters, ``with_base`` puts the base into the folder, in ``dtype``. The adapter's ``base`` is by
    default the one that it names.

    Raises:
        UserError: an adapter that the format cannot hold, settings of the other format, another base, an
            output that must not be replaced, or a full disk.
    """
    if to == "gguf" and (with_base or dtype is not None):
        raise UserError("--with-base and --dtype are for transformers; a GGUF file holds the base, in --type")
    if to != "gguf" and kind is not None:
        raise UserError(f"--type {kind} is for GGUF files; give --to gguf too")
    info, state = read_adapter(adapter)
    if to == "gguf":
        refuse_unmergeable(info, adapter)
    folder = find_base(info.base, adapter) if base is None else base
    if to != "gguf" and not info.adapter.prompt_length and not info.adapter.head:
        own = dtype or "float32"
        report = merge(adapter, out, base=folder, dtype=own, overwrite=overwrite, progress=progress)
        return ["without prompts, it is a plain model of base and adapter", report]
    check_base(info, folder, adapter)
    check_content(folder, everything=True)
    out = out.absolute()
    sweep_leftovers(out)
    adapted = Adapted(adapter, info, state, folder)
    if to == "gguf":
        return export_gguf(adapted, out, kind or "q8_0", overwrite=overwrite, progress=progress)
    return export_folder(
        adapted, out, with_base=with_base, dtype=dtype, overwrite=overwrite, progress=progress
    )
