"""The view a packed row gets on the device it lies on."""

from __future__ import annotations

from lit_adapter.model.attention import PackedRow, SegmentView, View
from lit_adapter.model.llama import Llama


def view_of(model: Llama, row: PackedRow) -> View:
    """Return how ``model`` sees ``row``."""
    return SegmentView(row, model.rotation(row.position[None]))
