"""An adapter between two formats: our names and shapes, whatever file it came from or goes to."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.model.adapter import adapter_shapes, check_adapter_state
from lit_adapter.model.config import AdapterConfig, LlamaConfig

State = dict[str, Tensor]
LAYER = "(0|[1-9][0-9]{0,4})"
"""A layer's number in a pattern; of other spellings, like 02, none is a name that code bases write."""


@dataclass
class PlainAdapter:
    """Sizes, form and tensors of an adapter, without base and template."""

    config: AdapterConfig
    state: State
    notes: list[str] = field(default_factory=list)
    """What reading it had to decide, for the report."""

    def check(self, model: LlamaConfig, source: str) -> None:
        """See that every tensor is there, fits the base and is finite.

        Raises:
            UserError: names the first tensors that do not.
        """
        check_adapter_state(adapter_shapes(self.config, model), self.state, source)


def prefix(layer: int) -> str:
    """Return the name that a layer's prompt and gate begin with."""
    return f"layers.{layer}.self_attn.prefix"


def top_layers(found: list[int], n_layer: int, source: str) -> int:
    """Return how many top layers carry a prompt.

    Raises:
        UserError: they are not the top layers of a model of ``n_layer`` layers.
    """
    if found and found != list(range(found[0], n_layer)):
        raise UserError(
            f"{source}: prompts on layers {found[0]} to {found[-1]} ({len(found)} of them), but the base has "
            f"{n_layer} layers and prompts belong to its top ones; give the adapter's own base with --base"
        )
    return len(found)


def take(state: State, name: str, shape: tuple[int, ...], source: str) -> Tensor:
    """Remove a tensor from ``state`` and return it in fp32 under the wanted shape.

    Raises:
        UserError: it is missing or holds another number of values.
    """
    if name not in state:
        raise UserError(f"{source}: tensor {name} is missing")
    tensor = state.pop(name)
    wanted = 1
    for size in shape:
        wanted *= size
    if tensor.numel() != wanted:
        raise UserError(
            f"{source}: {name} has shape {list(tensor.shape)}; the base asks for {wanted} numbers "
            f"({' x '.join(map(str, shape))}); give the adapter's own base with --base"
        )
    return tensor.detach().float().reshape(shape).clone()
