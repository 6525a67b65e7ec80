"""An adapter's form and tensors under our names, whatever file it comes from or goes to."""

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
    """What reading it had to decide, for the report."""
