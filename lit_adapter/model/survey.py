"""Compares a model with its declaration, so that no executor skips what it does not know."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

from torch import nn

from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.layout import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT_LAYER,
    block_layout,
    block_names,
    model_shapes,
)
from lit_adapter.model.llama import MLP, Attention, Block, Llama, RMSNorm
from lit_adapter.model.parts import TrainedModule
from lit_adapter.model.torch_internals import hooks, is_fsdp_part, own_children, own_tensors

FROZEN: frozenset[type] = frozenset(
    {Llama, Block, Attention, MLP, RMSNorm, nn.Linear, nn.Embedding, nn.ModuleList}
)
"""The modules of a base."""


def obstacle(model: Llama, known: Collection[type] = FROZEN, *, frozen: bool = False) -> str | None:
    """Return the first thing in ``model`` that is not declared or not of a known kind; None if all is known.

    Args:
        model: with or without an adapter; sharded by FSDP2 or not.
        known: exact types of modules.
        frozen: whether a tensor of the base that requires a gradient is an obstacle, too.

    Returns:
        A phrase about a module, parameter, buffer, hook or replaced forward method, such as
        ``layers.0.self_attn.q_norm is an RMSNorm that no LLaMA has``.
    """
    modules, tensors = _declared(model.config)
    found: list[tuple[str, nn.Module]] = [("", model)]
    while found:
        name, module = found.pop()
        kind, where, stem = _kind(module), name or "the model", f"{name}." if name else ""
        if kind not in known:
            return f"{where} is {_article(kind.__name__)}"
        is_trained = kind not in FROZEN and issubclass(kind, TrainedModule)
        if name not in modules and not is_trained:
            return f"{where} is {_article(kind.__name__)} that no LLaMA has"
        for tensor, value in own_tensors(module):
            if is_trained and tensor in getattr(module, "trained", ()):
                continue
            if stem + tensor not in tensors:
                return f"{where} has a tensor '{tensor}' that no LLaMA has"
            if frozen and value.requires_grad:
                return f"{where} is not frozen"
        if "forward" in vars(module) or not all(is_fsdp_part(hook) for hook in hooks(module)):
            return f"{where} has a hook or another forward method"
        found += [(stem + child, part) for child, part in reversed(own_children(module))]
    return None


@cache
def _declared(config: LlamaConfig) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of all modules and of all tensors."""
    modules = {"", EMBEDDING, FINAL_NORM, OUTPUT_LAYER, "layers"}
    layout = block_layout(config)
    for block in block_names(config):
        names = [norm.name for norm in layout.norms] + [linear.name for linear in layout.linears]
        parents = {name.partition(".")[0] for name in names}
        modules |= {block, *(f"{block}.{name}" for name in (*parents, *names))}
    tensors = {*model_shapes(config), f"{OUTPUT_LAYER}.weight", "inverse_frequency"}
    return frozenset(modules), frozenset(tensors)


def _kind(module: nn.Module) -> type:
    """Return the module's class; FSDP2 gives what it shards a subclass of its own."""
    kind = type(module)
    return kind if kind in FROZEN else next(kind for kind in kind.__mro__ if not is_fsdp_part(kind))


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIO' or name.startswith(('MLP', 'RMS')) else 'a'} {name}"
