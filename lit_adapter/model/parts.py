"""Trained parts: the kinds of parameters that an adapter can consist of.

A part is described by sizes alone (`TrainedPart`); attached to a model, its parameters live in modules
(`TrainedModule`). Freezing, counting, saving, loading, the optimizer and tensor parallelism use only these
two and know no part by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Generator, Tensor, nn

from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.layout import Shape

if TYPE_CHECKING:
    from lit_adapter.model.llama import Llama


class TrainedModule(nn.Module):
    """A module that holds trained parameters of one part, in fp32 under every precision."""

    part: ClassVar[str]
    """The name of its part."""
    trained: ClassVar[tuple[str, ...]]
    """The names of its trained parameters."""
    active = True
    """If False, the module computes what the frozen base computes."""

    def shard(self, rank: int, n_shards: int) -> None:
        """Use the share of process ``rank`` under tensor parallelism; the parameters stay whole."""


class TrainedPart(ABC):
    """One kind of trained parameters, of the sizes that an `AdapterConfig` gives it."""

    name: ClassVar[str]
    """Its name in `AdapterConfig.parts`."""
    lr_share: str | None = None
    """The field of `OptimConfig` by which the learning rate is multiplied; None for the rate itself."""
    decays: ClassVar[bool] = True
    """Whether weight decay applies."""

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config

    def form(self, model: LlamaConfig) -> dict[str, Any]:
        """Return the settings that give the part its shapes and meaning, by configuration key."""
        return {}

    @abstractmethod
    def shapes(self, model: LlamaConfig) -> dict[str, Shape]:
        """Return the name and shape of every tensor of the part."""

    @abstractmethod
    def attach(self, model: Llama, generator: Generator | None) -> None:
        """Give a frozen model the part's modules, initialised with ``generator``; None: loaded afterwards."""

    @abstractmethod
    def summary(self, model: LlamaConfig, count: Mapping[str, int]) -> str:
        """Describe the part; ``count`` says how many numbers it has, by the last component of their names."""


def share(length: int, rank: int, n_shards: int) -> slice:
    """Return the range of ``length`` that shard ``rank`` of ``n_shards`` covers."""
    return slice(rank * length // n_shards, (rank + 1) * length // n_shards)


def whole(own: Tensor, parameter: Tensor, where: slice | tuple[slice, slice]) -> Tensor:
    """Return the gradient of a whole parameter, given that of the share that this process uses of it."""
    if own.shape == parameter.shape:
        return own
    gradient = own.new_zeros(parameter.shape)
    gradient[where] = own
    return gradient
