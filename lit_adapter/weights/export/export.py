"""An adapter for another program: what ``scripts/export.py`` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lit_adapter.errors import UserError
from lit_adapter.weights.adapter_file import check_base, read_adapter
from lit_adapter.weights.base_content import check_content
from lit_adapter.weights.base_search import find_base
from lit_adapter.weights.export.transformers_folder import Adapted, export_folder
from lit_adapter.weights.merge import merge
from lit_adapter.weights.output_folder import sweep_leftovers


def export(
    adapter: Path,
    out: Path,
    *,
    base: Path | None = None,
    with_base: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write an adapter as a folder that transformers loads, and return lines for the user.

    One without prompts becomes a plain LLaMA (`merge`), which needs no code of ours. The adapter's ``base``
    is by default the one that it names.

    Raises:
        UserError: another base, an output that must not be replaced, or a full disk.
    """
    info, state = read_adapter(adapter)
    folder = find_base(info.base, adapter) if base is None else base
    if not info.adapter.prompt_length and not info.adapter.head:
        report = merge(
            adapter, out, base=folder, dtype=dtype or "float32", overwrite=overwrite, progress=progress
        )
        return ["without prompts, it is a plain LLaMA of base and adapter", report]
    check_base(info, folder, adapter)
    check_content(folder, everything=True)
    if info.model.to_hf()["model_type"] != "llama":
        raise UserError(f"{adapter}: its base is no LLaMA; only those are exported with prompts")
    out = out.absolute()
    sweep_leftovers(out)
    adapted = Adapted(adapter, info, state, folder)
    return export_folder(
        adapted, out, with_base=with_base, dtype=dtype, overwrite=overwrite, progress=progress
    )
