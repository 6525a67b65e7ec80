"""Our own adapter file, which says which base and prompt template it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_adapter.model.config import AdapterConfig, GateName, LlamaConfig
from lit_adapter.weights.adapter_file import AdapterInfo, save_adapter
from lit_adapter.weights.foreign.format import Format, Opened
from lit_adapter.weights.plain import PlainAdapter, State


class Ours(Format):
    """``adapter.safetensors``."""

    name = "ours"
    is_certain = True

    def recognise(self, opened: Opened) -> str | None:
        """Recognise it by its metadata."""
        return "its metadata" if opened.info is not None else None

    def read(self, opened: Opened, model: LlamaConfig, gate: GateName | None = None) -> PlainAdapter:
        """Return the adapter, which opening the file has already read."""
        assert opened.info is not None
        return PlainAdapter(opened.info.adapter, opened.tensors)

    def check_writable(self, config: AdapterConfig, model: LlamaConfig) -> None:
        """Refuse nothing."""

    def write(self, adapter: PlainAdapter, model: LlamaConfig) -> State:
        """Return the tensors as they are."""
        return adapter.state

    def save(self, out: Path, tensors: dict[str, Any], info: AdapterInfo) -> None:
        """Write the file."""
        save_adapter(out, tensors, info)
