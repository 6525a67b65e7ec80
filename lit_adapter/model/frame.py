"""Copies of modules that share their tensors, so that a copy can have other modules in some places."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from lit_adapter.model.llama import Block, Llama
from lit_adapter.model.torch_internals import own_children

M = TypeVar("M", bound=nn.Module)


def framed(module: M) -> M:
    """Return a copy of a module with the same tensors, in which submodules can be replaced.

    What an executor has derived from a model's matrices is not copied.
    """
    own = object.__new__(type(module))
    values = vars(module).copy()  # a step in another thread may join the base's matrices meanwhile
    for name, x in values.items():
        if isinstance(x, dict):  # hooks too: what is registered in the copy must not reach the module
            values[name] = x.copy()
    vars(own).update(values)
    for name, part in own_children(own):
        own.register_module(name, framed(part))
    if isinstance(own, Llama):
        own.decode_weights = None
    if isinstance(own, Block):
        own.fused_weights = None
    return own
