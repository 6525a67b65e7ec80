"""Rotary positions: how the frequencies are scaled, and Hugging Face's spelling of it. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from lit_adapter.errors import UserError
from lit_adapter.model.config_keys import given, required

RopeKind = Literal["default", "linear", "llama3"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the base frequency, and how it is scaled for long contexts.

    ``linear`` divides every frequency by ``factor``; ``llama3`` (Llama 3.1) divides the low ones, keeps the
    high ones and blends between them.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_context_length"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"model config: rope {name} is {value}; expected a number above 0")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"model config: rope low_freq_factor is {self.low_freq_factor}; "
                f"expected less than high_freq_factor {self.high_freq_factor}"
            )

    @classmethod
    def from_hf(cls, raw: dict[str, Any], source: str) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

        Raises:
            UserError: a kind that is not known, or a factor that is missing.
        """
        rope = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "linear", "llama3"):
            raise UserError(f"{source}: rope type {kind!r} is not known; expected default, linear or llama3")
        theta = given(rope, "rope_theta", given(raw, "rope_theta", 10_000.0))
        if kind == "default":
            return cls(float(theta))
        factor = float(required(rope, "factor", f"{source}: rope"))
        if kind == "linear":
            return cls(float(theta), "linear", factor)
        return cls(
            theta=float(theta),
            kind="llama3",
            factor=factor,
            low_freq_factor=float(required(rope, "low_freq_factor", f"{source}: rope")),
            high_freq_factor=float(required(rope, "high_freq_factor", f"{source}: rope")),
            original_context_length=int(
                required(rope, "original_max_position_embeddings", f"{source}: rope")
            ),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return `rope_parameters`."""
        rope: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind != "default":
            rope["factor"] = self.factor
        if self.kind == "llama3":
            rope["low_freq_factor"] = self.low_freq_factor
            rope["high_freq_factor"] = self.high_freq_factor
            rope["original_max_position_embeddings"] = self.original_context_length
        return rope
