"""The adapter files that a run writes, and what they tell of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_adapter.config import Config
from lit_adapter.data.hub import is_hub_name
from lit_adapter.model.config import LlamaConfig
from lit_adapter.text.template import Template
from lit_adapter.weights.adapter_file import AdapterInfo, BaseIdentity, save_adapter


@dataclass(frozen=True)
class AdapterWriter:
    """Writes a run's adapters; they belong to its base and bring its template."""

    config: Config
    base: BaseIdentity
    base_config: LlamaConfig
    template: Template

    def write(self, path: Path, state: dict[str, Tensor], summary: dict[str, Any]) -> None:
        """Write an adapter, whole or not at all.

        Args:
            path: of the file.
            state: its tensors.
            summary: how far the run has come: steps and losses.

        Raises:
            UserError: the file cannot be written.
        """
        info = AdapterInfo(
            adapter=self.config.adapter,
            base=self.base,
            base_config=self.base_config.to_hf(),
            template=self.template,
            mask_prompt=self.config.data.mask_prompt,
            training={**self._about_training(), **summary},
        )
        save_adapter(path, state, info)

    def _about_training(self) -> dict[str, Any]:
        """Return what people are told of the training; of a data file its name alone."""
        source, optim = self.config.data.train, self.config.optim
        return {
            "data": source if is_hub_name(source) else Path(source).name,
            "epochs": optim.epochs,
            "batch_size": optim.batch_size,
            "lr": optim.peak_lr,
        }
