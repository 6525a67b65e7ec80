"""An adapter's form and tensors under our names, independent of any file format."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lit_adapter.model.config import AdapterConfig

State = dict[str, Tensor]


@dataclass
class PlainAdapter:
    """Sizes, form and tensors of an adapter, without base and template."""

    config: AdapterConfig
    state: State
    notes: list[str] = field(default_factory=list)
    """Decisions made while reading it, for the report."""
