"""The adapter file that a run starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lit_adapter.files.read import file_sha256
from lit_adapter.model.adapter import check_same_form
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.text.template import Template
from lit_adapter.training.checkpoint import read_checkpoint
from lit_adapter.weights.adapter_file import check_base, read_adapter


@dataclass(frozen=True)
class Start:
    """An adapter to start from."""

    state: dict[str, Tensor] | None = None
    """Its tensors; None where the checkpoint that is resumed brings them."""
    sha256: str | None = None
    """Of its file, the first 16 digits."""

    def tensors(self, checkpoint: Path | None) -> dict[str, Tensor] | None:
        """Return the tensors to start from, if any; those of the checkpoint where the file is gone."""
        if self.state is None and self.sha256 is not None and checkpoint is not None:
            return dict(read_checkpoint(checkpoint)["state_dict"])
        return self.state


def read_start(
    path: Path,
    base: Path,
    adapter: AdapterConfig,
    model: LlamaConfig,
    template: Template,
    saved_sha256: str | None,
    say: Callable[[str], None],
) -> Start:
    """Read the file and see that it fits the run.

    Args:
        path: an ``adapter.safetensors``.
        base: folder of the run's base.
        adapter: of the run.
        model: the sizes of the base.
        template: of the run.
        saved_sha256: of the start of the run that is resumed, which can do without its file.
        say: gets a line for each thing worth knowing.

    Raises:
        UserError: it is not there, not an adapter of ours, or does not fit.
    """
    if saved_sha256 is not None and not path.exists():
        say(f"{path}: is gone, and not needed: the checkpoint has what came of it")
        return Start(sha256=saved_sha256)
    info, state = read_adapter(path)
    check_base(info, base, path)
    check_same_form(info.adapter, adapter, model, path)
    if info.template != template:
        say(f"{path}: its template is {info.template.kind}; this run goes on with {template.kind}")
    if saved_sha256 is None:
        say(f"starting from {path}")
    return Start(state, file_sha256(path)[:16])
