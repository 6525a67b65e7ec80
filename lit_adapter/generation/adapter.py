"""An adapter as a value: bound to a base, which it never changes, and chosen by each request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lit_adapter.model.adapter import adapter_parameters, attach, load_adapter_state
from lit_adapter.model.affine import AdaptedNorm
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.executors import choose
from lit_adapter.model.frame import framed
from lit_adapter.model.llama import Llama
from lit_adapter.model.norms import Norms
from lit_adapter.model.slot_prefixes import Prefixes


@dataclass(frozen=True, eq=False)
class Adapter:
    """The adapter that a request is answered with."""

    model: Llama
    """Computes its requests; requests with the same model are answered together."""
    prefixes: Prefixes
    """Projected once, perhaps with trained norms beside them; a slot is given them with the request."""

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Llama, base: Llama | None = None) -> Adapter:
        """Return the adapter that is attached to ``model``, as it is now; or the plain base.

        ``base`` computes the requests instead, if only prefixes and norms distinguish ``model`` from it.
        """
        prefixes = Prefixes.of(model.project_prefixes(model.embed_tokens.weight.dtype))
        if base is None:
            return cls(model, prefixes)
        own = _own_kinds(model, base)
        if own - {AdaptedNorm} or not _is_computed_alike(model, base):
            return cls(model, prefixes)
        return cls(base, replace(prefixes, norms=Norms.of(model).on_host()) if own else prefixes)


def attached(base: Llama, config: AdapterConfig, state: Mapping[str, Tensor], source: str) -> Llama:
    """Return a frozen model with an adapter attached, which shares what it can with a frozen ``base``.

    Raises:
        UserError: tensors that do not fit the model.
    """
    model = framed(base)
    attach(model, config.without_dropout(), seed=None)
    for parameter in load_adapter_state(model, dict(state), source=source).values():
        parameter.requires_grad_(False)
    return model


def keep_on_host(model: Llama) -> None:
    """Move an adapter of prefixes and norms to the host's memory; its model copies what it computes with."""
    for _, parameter in adapter_parameters(model):
        parameter.data = parameter.data.cpu()


_alike: WeakKeyDictionary[Llama, set[AdapterConfig | None]] = WeakKeyDictionary()
"""The forms of adapters known to be computed by the executor of their base."""


def _is_computed_alike(model: Llama, base: Llama) -> bool:
    """Return whether the executor that computes ``base`` also computes it with this adapter."""
    known, form = _alike.setdefault(base, set()), model.adapter
    if form in known:
        return True
    executor = choose(model, "decoding")
    # What can be computed fast with an adapter can also be without it; only otherwise look at the base.
    if executor.why_not_fast is None or executor == choose(base, "decoding"):
        known.add(form)
    return form in known  # a no is not kept: it may be due to the memory that is free now


def _own_kinds(model: nn.Module, base: nn.Module) -> set[type[nn.Module]]:
    """Return the classes of the modules that ``model`` has in place of ``base``'s, prefixes left out."""
    theirs, found = dict(base.named_children()), set()
    for name, part in model.named_children():
        other = theirs.get(name)
        if part is other or name == "prefix":
            continue
        found |= {type(part)} if type(part) is not type(other) else _own_kinds(part, other)
    return found
