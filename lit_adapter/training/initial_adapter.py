"""The adapter that ``init_from`` names, from which a run starts instead of from new prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lit_adapter.config import Config
from lit_adapter.files.read import file_sha256
from lit_adapter.model.adapter import check_same_form
from lit_adapter.text.template import Template
from lit_adapter.training.base import Base
from lit_adapter.training.checkpoint import read_checkpoint
from lit_adapter.weights.adapter_file import check_base, read_adapter


@dataclass(frozen=True)
class InitialAdapter:
    """The tensors and fingerprint of an initial adapter; neither where ``init_from`` names none."""

    state: dict[str, Tensor] | None = None
    """None also where the file is gone: the checkpoint that is resumed has what came of it."""
    sha256: str | None = None
    """The first 16 digits of its file's."""

    def tensors(self, checkpoint: Path | None) -> dict[str, Tensor] | None:
        """Return the tensors to start from, if any; the checkpoint's where the file is gone."""
        if self.state is None and self.sha256 is not None and checkpoint is not None:
            return dict(read_checkpoint(checkpoint)["state_dict"])
        return self.state


def read_initial_adapter(
    config: Config, base: Base, template: Template, saved_sha256: str | None, say: Callable[[str], None]
) -> InitialAdapter:
    """Read the file that ``init_from`` names and check that it fits the run.

    A resumed run, whose checkpoint has the file's ``saved_sha256``, does not need the file again. Another
    template in the file is only noted.

    Raises:
        UserError: there is no such file, it is not an adapter of ours, or it does not fit.
    """
    if config.init_from is None:
        return InitialAdapter()
    path = Path(config.init_from)
    if saved_sha256 is not None and not path.exists():
        say(f"{path}: is gone, and not needed: the checkpoint has what came of it")
        return InitialAdapter(sha256=saved_sha256)
    info, state = read_adapter(path)
    check_base(info, base.folder, path)
    check_same_form(info.adapter, config.adapter, base.config, path)
    if info.template != template:
        say(f"{path}: its template is {info.template.kind}; this run uses {template.kind}")
    if saved_sha256 is None:
        say(f"starting from {path}")
    return InitialAdapter(state, file_sha256(path)[:16])
