"""An adapter as a value: bound to a base, and chosen by each request. The base never changes for it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_adapter.model.adapter import attach, load_adapter_state
from lit_adapter.model.cache import Prefixes
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.executors import choose
from lit_adapter.model.llama import Llama


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a request is answered with."""

    model: Llama
    """Computes its requests; requests with the same model are answered together."""
    prefixes: Prefixes
    """Projected once; a slot is given them with the request."""

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Llama, base: Llama | None = None) -> Adapter:
        """Return the adapter that is attached to ``model``, as it is now; or the plain base.

        ``base`` computes the requests instead, if only prefixes distinguish ``model`` from it.
        """
        prefixes = Prefixes.of(model.project_prefixes(model.embed_tokens.weight.dtype))
        shared = base is not None and _kinds(base) == _kinds(model)
        if base is not None and shared and choose(base, "decoding") == choose(model, "decoding"):
            model = base
        return cls(model, prefixes)


def attached(base: Llama, config: AdapterConfig, state: Mapping[str, Tensor], source: str) -> Llama:
    """Return a model with an adapter attached that shares every tensor of ``base``, which stays as it is.

    Raises:
        UserError: tensors that do not fit the model.
    """
    tensors = [*base.parameters(), *base.buffers()]
    memo = {id(tensor): tensor for tensor in tensors}
    own = [base.decode_weights, *(block.fused_weights for block in base.layers)]
    model: Llama = copy.deepcopy(base, memo | {id(weights): None for weights in own if weights is not None})
    attach(model, config.without_dropout())
    load_adapter_state(model, dict(state), source=source)
    return model.requires_grad_(False)


def _kinds(model: Llama) -> dict[str, type[nn.Module]]:
    """Return the class of every module by name, prefixes left out."""
    return {name: type(module) for name, module in model.named_modules() if not name.endswith(".prefix")}
