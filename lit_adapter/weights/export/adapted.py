"""What is exported: an adapter and its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lit_adapter.weights.adapter_file import AdapterInfo
from lit_adapter.weights.merged import MergedSource


@dataclass(frozen=True)
class Adapted:
    """An adapter file that was read, and the base that it belongs to."""

    path: Path
    info: AdapterInfo
    state: dict[str, Tensor]
    base: Path

    def merged(self) -> MergedSource:
        """Return the base with all that merges into its weights."""
        return MergedSource(self.base, self.path, self.info.adapter, self.state)
