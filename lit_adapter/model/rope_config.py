"""Rotary positions: how the frequencies are scaled, and Hugging Face's spelling of it. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_adapter.errors import UserError
from lit_adapter.model.config_keys import given, required

RopeKind = Literal["default", "linear", "llama3", "yarn"]
KINDS = get_args(RopeKind)
ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the base frequency, and how it is scaled for long contexts.

    ``linear`` divides every frequency by ``factor``; ``llama3`` (Llama 3.1) divides the low ones, keeps the
    high ones and blends between them. ``yarn`` (arXiv 2309.00071) blends by the number of the frequency, from
    that of ``beta_fast`` turns in the original context to that of ``beta_slow``, and multiplies cosines and
    sines by ``attention_factor``.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    """Whether yarn rounds the two numbers, down and up."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 < value < math.inf:
                raise UserError(f"model config: rope {name} is {value}; expected a number above 0")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"model config: rope low_freq_factor is {self.low_freq_factor}; "
                f"expected less than high_freq_factor {self.high_freq_factor}"
            )
        if self.kind == "yarn" and (self.beta_slow >= self.beta_fast or self.theta <= 1):
            raise UserError(
                f"model config: rope beta_slow is {self.beta_slow} and theta {self.theta}; "
                f"expected less than beta_fast {self.beta_fast}, and more than 1"
            )

    @classmethod
    def from_hf(
        cls, raw: dict[str, Any], source: str, default_theta: float, context_length: int
    ) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

        Args:
            raw: the parsed file.
            source: its name, for messages.
            default_theta: the base frequency where the file names none.
            context_length: the model's; yarn's original one where the file does not give it.

        Raises:
            UserError: an unknown kind, or a factor that is missing or not a number.
        """
        rope = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in KINDS:
            *known, last = KINDS
            raise UserError(
                f"{source}: rope type {kind!r} is not known; expected {', '.join(known)} or {last}"
            )
        theta = given(rope, "rope_theta", given(raw, "rope_theta", default_theta))
        share = given(rope, "partial_rotary_factor", given(raw, "partial_rotary_factor", 1.0))
        if share != 1:
            raise UserError(
                f"{source}: partial_rotary_factor is {share}; here rotary positions turn whole heads"
            )
        values = _Values({**rope, "rope_theta": theta}, source)
        found: dict[str, Any] = {"theta": values.need("rope_theta"), "kind": kind}
        if kind != "default":
            found["factor"] = values.need("factor")
        if kind == "llama3":
            found |= {name: values.need(name) for name in ("low_freq_factor", "high_freq_factor")}
            found["original_context_length"] = int(values.need(ORIGINAL))
        if kind == "yarn":
            found |= values.of_yarn(context_length)
        return cls(**found)

    def to_hf(self) -> dict[str, Any]:
        """Return `rope_parameters`."""
        rope: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind != "default":
            rope["factor"] = self.factor
        if self.kind == "llama3":
            rope |= {name: getattr(self, name) for name in ("low_freq_factor", "high_freq_factor")}
        if self.kind == "yarn":
            names = ("beta_fast", "beta_slow", "attention_factor", "truncate")
            rope |= {name: getattr(self, name) for name in names}
        if self.kind in ("llama3", "yarn"):
            rope[ORIGINAL] = self.original_context_length
        return rope


@dataclass(frozen=True)
class _Values:
    """The numbers in `rope_parameters`."""

    rope: dict[str, Any]
    source: str

    def need(self, name: str) -> float:
        """Return a required number."""
        return self._number(name, required(self.rope, name, f"{self.source}: rope"))

    def get(self, name: str, default: float) -> float:
        return self._number(name, given(self.rope, name, default))

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{self.source}: rope {name} is {value!r:.60}; expected a number above 0")
        return float(value)

    def of_yarn(self, context_length: int) -> dict[str, Any]:
        """Return the fields of yarn; a missing attention factor follows from the factor."""
        factor = self.need("factor")
        mscale, of_all = self.get("mscale", 0.0), self.get("mscale_all_dim", 0.0)
        scale = yarn_scale(factor, mscale) / yarn_scale(factor, of_all) if mscale and of_all else None
        return {
            "original_context_length": int(self.get(ORIGINAL, context_length)),
            "beta_fast": self.get("beta_fast", 32.0) or 32.0,
            "beta_slow": self.get("beta_slow", 1.0) or 1.0,
            "attention_factor": self.get("attention_factor", scale or yarn_scale(factor)),
            "truncate": bool(given(self.rope, "truncate", True)),
        }


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """Return what yarn multiplies cosines and sines by, if nothing else is said: 0.1 w ln(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
