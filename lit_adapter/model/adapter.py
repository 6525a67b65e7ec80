"""The adapter of a model: attached by composition, saved and loaded under its own names.

Its trained parts are listed here once; see `parts` for what a part is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_adapter.errors import UserError
from lit_adapter.model.affine import LinearPart, NormPart
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.layout import Shape
from lit_adapter.model.llama import Llama
from lit_adapter.model.lora import LoraPart
from lit_adapter.model.parts import TrainedModule, TrainedPart
from lit_adapter.model.prefix import PrefixPart

PARTS: dict[str, type[TrainedPart]] = {
    part.name: part for part in (PrefixPart, NormPart, LinearPart, LoraPart)
}


def parts_of(config: AdapterConfig) -> list[TrainedPart]:
    """Return the parts that ``config`` trains, in the order of `AdapterConfig.parts`."""
    return [PARTS[name](config) for name in config.parts]


def attach(model: Llama, config: AdapterConfig, seed: int | None = 0) -> None:
    """Give a frozen model what ``config`` trains, initialised with ``seed``; None: loaded afterwards.

    Raises:
        UserError: more adapted layers than layers.
    """
    model.adapter = config
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for part in parts_of(config):
        part.attach(model, generator)


def trained_modules(model: nn.Module) -> Iterator[tuple[str, TrainedModule]]:
    """Yield the modules that hold trained parameters, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, TrainedModule):
            yield name, module


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the adapter's parameters under their names in the module, the checkpoint and the file."""
    for module_name, module in trained_modules(model):
        for name in module.trained:
            yield f"{module_name}.{name}", getattr(module, name)


def parameter_counts(config: AdapterConfig, model: LlamaConfig) -> str:
    """Describe in words and numbers what is trained, part by part."""
    described = []
    for part in parts_of(config):
        count: Counter[str] = Counter()
        for name, shape in part.shapes(model).items():
            count[name.rpartition(".")[2]] += torch.Size(shape).numel()
        if count:
            described.append(part.summary(model, count))
    return "; ".join(described)


def check_same_form(given: AdapterConfig, wanted: AdapterConfig, model: LlamaConfig, source: Path) -> None:
    """Refuse to start a run from an adapter of another form.

    Raises:
        UserError: names every setting that differs, with both values.
    """
    theirs, ours = (
        {"version": config.version, "norms": "norms" in config.parts}
        | {key: value for part in parts_of(config) for key, value in part.form(model).items()}
        for config in (given, wanted)
    )
    wrong = [
        f"adapter.{key} {value} (here {ours[key]})"
        for key, value in theirs.items()
        if key in ours and value != ours[key]
    ]
    if wrong:
        raise UserError(
            f"{source}: cannot start from it: it has {', '.join(wrong)}; set them to the same values"
        )


@contextmanager
def plain_base(model: Llama) -> Iterator[None]:
    """Switch the adapter off inside the block."""
    modules = [module for _, module in trained_modules(model)]
    for module in modules:
        module.active = False
    try:
        yield
    finally:
        for module in modules:
            module.active = True


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the adapter's tensors on the CPU, by name."""
    return {name: parameter.detach().cpu().clone() for name, parameter in adapter_parameters(model)}


def load_adapter_state(
    model: nn.Module, state: dict[str, Tensor], source: str = "adapter"
) -> dict[str, nn.Parameter]:
    """Copy ``state`` into the model's adapter, and return its parameters by name.

    Args:
        model: with its adapter attached.
        state: tensors by name.
        source: the file's name, for messages.

    Raises:
        UserError: missing or unexpected tensors, a wrong shape, or a value that is not finite.
    """
    own = dict(adapter_parameters(model))
    check_adapter_state({name: tuple(p.shape) for name, p in own.items()}, state, source)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
    return own


def adapter_shapes(config: AdapterConfig, model: LlamaConfig) -> dict[str, Shape]:
    """Return the name and shape of every adapter tensor.

    Raises:
        UserError: more adapted layers than layers.
    """
    return {name: shape for part in parts_of(config) for name, shape in part.shapes(model).items()}


def check_adapter_state(shapes: dict[str, tuple[int, ...]], state: dict[str, Tensor], source: str) -> None:
    """Compare ``state`` with the wanted names and shapes, and see that every number is finite.

    Raises:
        UserError: names the first tensors that are missing, unexpected, misshapen or not finite.
    """
    missing = sorted(shapes.keys() - state.keys())
    unexpected = sorted(state.keys() - shapes.keys())
    if missing or unexpected:
        found = [
            f"{len(names)} {kind} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise UserError(f"{source}: the adapter's tensors do not fit this model: {'; '.join(found)}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise UserError(f"{source}: {name} has shape {list(state[name].shape)}; expected {list(shape)}")
        if not state[name].is_floating_point() or not bool(torch.isfinite(state[name]).all()):
            raise UserError(f"{source}: {name} holds values that are not finite numbers")
