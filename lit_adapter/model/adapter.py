"""The adapter of a model: attached by composition, saved and loaded by its own names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_adapter.errors import UserError
from lit_adapter.model.affine import (
    AdaptedLinear,
    AdaptedNorm,
    adapt_everywhere,
    adapted_modules,
    expected_widths,
)
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.gates import GATE_FORMS
from lit_adapter.model.llama import Llama
from lit_adapter.model.prefix import GatedPrefix


def attach(model: Llama, config: AdapterConfig, seed: int = 0) -> None:
    """Give a frozen model what ``config`` trains; prompts are drawn with ``seed``.

    Raises:
        UserError: more adapted layers than layers.
    """
    generator = torch.Generator().manual_seed(seed)
    for index in config.adapted_layers(model.config.n_layer):
        attention = model.layers[index].self_attn
        device = attention.o_proj.weight.device
        with torch.device("cpu"):
            prefix = GatedPrefix(config, model.config)
        with torch.no_grad():
            prefix.prompt.normal_(0.0, config.prompt_init_std, generator=generator)
        attention.prefix = prefix if device.type == "meta" else prefix.to(device)  # the base is yet to come
    if config.version == "v2":
        adapt_everywhere(model, head=config.head)


_TRAINED: dict[type[nn.Module], tuple[str, ...]] = {
    GatedPrefix: ("prompt", "gate"),
    AdaptedLinear: ("adapter_bias", "adapter_scale"),
    AdaptedNorm: ("adapter_weight",),
}


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the adapter's parameters under the names they have in the module, checkpoint and file."""
    for module_name, module in model.named_modules():
        for name in _TRAINED.get(type(module), ()):
            yield f"{module_name}.{name}", getattr(module, name)


def is_of_prefix(name: str) -> bool:
    """Tell a prompt or gate by its name from what V2 adds."""
    return ".prefix." in name


def parameter_counts(model: Llama) -> str:
    """Say what is trained, in numbers: prompts, gates, and V2's norms, biases and scales."""
    prefixes = [block.self_attn.prefix for block in model.layers if block.self_attn.prefix is not None]
    kinds = ["prompt", "gate", "adapter_weight", "adapter_bias", "adapter_scale"]
    count = dict.fromkeys(kinds, 0)
    for name, parameter in adapter_parameters(model):
        count[name.rpartition(".")[2]] += parameter.numel()
    parts = []
    if prefixes:
        sizes = f"K {len(prefixes[0].prompt)}, L {len(prefixes)} of {model.config.n_layer}"
        parts.append(f"prompts {count['prompt']:,} and gates {count['gate']:,}, {sizes}")
    if count["adapter_scale"]:
        per_linear = f"biases {count['adapter_bias']:,}, scales {count['adapter_scale']:,}"
        head = "with" if isinstance(model.lm_head, AdaptedLinear) else "without"
        parts.append(f"norms {count['adapter_weight']:,}, {per_linear}, {head} head")
    return "; ".join(parts)


def check_same_form(given: AdapterConfig, wanted: AdapterConfig, n_layer: int, source: Path) -> None:
    """Refuse to start a run from an adapter of another form.

    Raises:
        UserError: names every setting that differs, with both values.
    """
    theirs, ours = (
        {
            "version": config.version,
            "prompt_length": config.prompt_length,
            "layers": len(config.adapted_layers(n_layer)),
            "gate": config.gate,
            "head": config.head,
        }
        for config in (given, wanted)
    )
    wrong = [
        f"adapter.{key} {value} (here {ours[key]})" for key, value in theirs.items() if value != ours[key]
    ]
    if wrong:
        raise UserError(f"{source}: cannot start from it: it has {', '.join(wrong)}; set them as it has them")


@contextmanager
def plain_base(model: Llama) -> Iterator[None]:
    """Be the model without its adapter inside the block."""
    attentions = [block.self_attn for block in model.layers]
    prefixes = [attention.prefix for attention in attentions]
    adapted = list(adapted_modules(model))
    for attention in attentions:
        attention.prefix = None
    for module in adapted:
        module.active = False
    try:
        yield
    finally:
        for attention, prefix in zip(attentions, prefixes, strict=True):
            attention.prefix = prefix
        for module in adapted:
            module.active = True


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the adapter's tensors on the CPU, by name."""
    return {name: parameter.detach().cpu().clone() for name, parameter in adapter_parameters(model)}


def load_adapter_state(model: nn.Module, state: dict[str, Tensor], source: str = "adapter") -> None:
    """Copy ``state`` into the model's adapter.

    Args:
        model: a model with prefixes attached.
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


def expected_shapes(config: AdapterConfig, model: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every adapter tensor."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index in config.adapted_layers(model.n_layer):
        stem = f"layers.{index}.self_attn.prefix"
        shapes[f"{stem}.prompt"] = (config.prompt_length, model.n_embd)
        shapes[f"{stem}.gate"] = GATE_FORMS[config.gate].shape(
            model.n_head, config.prompt_length, model.head_dim
        )
    if config.version == "v2":
        shapes |= {name: (width,) for name, width in expected_widths(model, head=config.head).items()}
    return shapes


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
