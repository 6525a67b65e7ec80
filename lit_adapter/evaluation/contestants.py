"""The models of an evaluation: the plain base, and every adapter on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_adapter.evaluation.settings import refuse_twice
from lit_adapter.files.paths import without_home
from lit_adapter.files.read import file_sha256
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.load import load
from lit_adapter.model.adapter import adapter_parameters
from lit_adapter.weights.adapter_file import base_identity

BASE = "base"


@dataclass(frozen=True, eq=False)
class Contestant:
    """A model and its name."""

    name: str
    model: AdaptedLlama
    adapter: Path | None = None
    """Its file; None for the plain base."""

    @cached_property
    def sha256(self) -> str | None:
        """Of the adapter's file; None for the plain base."""
        return file_sha256(self.adapter) if self.adapter else None

    def identity(self) -> list[Any]:
        """Return what its answers depend on."""
        return [self.name, self.sha256, self.model.template.to_dict()]

    def described(self) -> dict[str, Any]:
        """Return what the results say about it."""
        return {
            "name": self.name,
            "parameters": sum(parameter.numel() for _, parameter in adapter_parameters(self.model.model)),
            "adapter": without_home(str(self.adapter)) if self.adapter else None,
            "sha256": self.sha256,
            "template": self.model.template.kind,
        }


def identity_of(models: Sequence[Contestant], base: Path) -> dict[str, Any]:
    """Return what all results of these models depend on, by the name that a message gives it."""
    weight, about = models[0].model.model.embed_tokens.weight, base_identity(base)
    return {
        "base": [about.weights, about.tokenizer],
        "adapters or templates": [one.identity() for one in models],
        "precision": str(weight.dtype),
        "device": weight.device.type,
    }


def contestants(adapters: Sequence[Path], base: Path | None, **choice: Any) -> list[Contestant]:
    """Load the base once, and every adapter on it; the base is prompted with the first adapter's template.

    ``choice`` holds device, dtype and template, as for `load`.

    Raises:
        UserError: as `load`; adapters of different bases.
    """
    if not adapters:
        return [Contestant(BASE, load(base=base, **choice))]
    first = load(adapters[0], base, **choice)
    models = [first, *(first.with_adapter(path) for path in adapters[1:])]
    found = [Contestant(BASE, first.base)]
    return found + [
        Contestant(name, model, path)
        for name, model, path in zip(names(adapters), models, adapters, strict=True)
    ]


def names(adapters: Sequence[Path]) -> list[str]:
    """Return short, different names: the run folder's, with the file's if that is not the usual one.

    Raises:
        UserError: a file is given twice.
    """
    paths = [path.absolute() for path in adapters]
    refuse_twice("adapter", paths)
    plain = [p.parent.name if p.name == "adapter.safetensors" else f"{p.parent.name}/{p.stem}" for p in paths]
    if len({BASE, *plain}) == len(plain) + 1:
        return plain
    return [str(path) for path in adapters]
