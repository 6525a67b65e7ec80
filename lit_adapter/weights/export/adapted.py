"""What is exported: an adapter and its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lit_adapter.weights.adapter_file import AdapterInfo
from lit_adapter.weights.measure import logits
from lit_adapter.weights.merged import MergedSource
from lit_adapter.weights.plain import PlainAdapter


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

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits ``[1, T, V]`` of base and adapter, in fp32 on the CPU."""
        return logits(self.base, ids, PlainAdapter(self.info.adapter, self.state))
