"""The adapter's form in the paper, which other code bases share."""

from __future__ import annotations

from typing import Any

from lit_adapter.model.config import AdapterConfig


def paper(**settings: Any) -> AdapterConfig:
    """An adapter of the paper's form, but for ``settings``."""
    return AdapterConfig(**{"prompt_length": 10, "gate": "tanh", "norms": False} | settings)
