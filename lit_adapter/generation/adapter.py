"""An adapter as a value: bound to a base, and chosen by each request. The base never changes for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from lit_adapter.model.adapter import attach, load_adapter_state
from lit_adapter.model.affine import AdaptedNorm
from lit_adapter.model.cache import Prefixes
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.executors import choose
from lit_adapter.model.llama import Block, Llama
from lit_adapter.model.norms import Norms

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a request is answered with."""

    model: Llama
    """Computes its requests; requests with the same model are answered together."""
    prefixes: Prefixes
    """Projected once, perhaps with trained norms beside them; a slot is given them with the request."""

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Llama, base: Llama | None = None) -> Adapter:
        """Return the adapter that is attached to ``model``, as it is now; or the plain base.

        ``base`` computes the requests instead, if only prefixes distinguish ``model`` from it. On a CPU
        norms may do so too; other executors than CPU decoding take those of one model for all slots.
        """
        prefixes = Prefixes.of(model.project_prefixes(model.embed_tokens.weight.dtype))
        if base is None:
            return cls(model, prefixes)
        own, executor = _own_kinds(model, base), choose(model, "decoding")
        # What can be computed fast with an adapter can be without; the base is looked at only otherwise.
        alike = executor.why_not_fast is None or executor == choose(base, "decoding")
        has_norms = own == {AdaptedNorm} and executor.name == "CPU decoding"
        if not alike or (own and not has_norms):
            return cls(model, prefixes)
        return cls(base, replace(prefixes, norms=Norms.of(model)) if has_norms else prefixes)


def attached(base: Llama, config: AdapterConfig, state: Mapping[str, Tensor], source: str) -> Llama:
    """Return a model with an adapter attached that shares what it can of ``base``, which stays as it is.

    Raises:
        UserError: tensors that do not fit the model.
    """
    model = _frame(base)
    attach(model, config.without_dropout(), seed=None)
    load_adapter_state(model, dict(state), source=source)
    return model.requires_grad_(False)


def _frame(module: M) -> M:
    """Return a copy of a module with the same tensors, in which others can take the place of its parts.

    What an executor has made of a model's matrices is not copied.
    """
    own = object.__new__(type(module))
    # Hooks and parameters are kept in dicts too; what is registered in the copy must not be in the module.
    values = vars(module).copy()  # a step in another thread may join the base's matrices meanwhile
    vars(own).update((name, x.copy() if isinstance(x, dict) else x) for name, x in values.items())
    own._modules.update((name, _frame(part)) for name, part in own._modules.items() if part is not None)
    if isinstance(own, Llama):
        own.decode_weights = None
    if isinstance(own, Block):
        own.fused_weights = None
    return own


def _own_kinds(model: Llama, base: Llama) -> set[type[nn.Module]]:
    """Return the classes of the modules that ``model`` has in place of ``base``'s, prefixes left out."""
    theirs = {name: type(module) for name, module in base.named_modules()}
    modules = ((n, type(m)) for n, m in model.named_modules() if not n.endswith(".prefix"))
    return {kind for name, kind in modules if kind is not theirs.get(name)}
