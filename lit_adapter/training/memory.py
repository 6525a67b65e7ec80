"""How much memory a training step takes, estimated before the base is loaded.

At its peak a step holds

    weights       the frozen base: 2 bytes per number under bf16-true, else 4
    adapter       16 bytes per trained number: itself, its gradient and AdamW's two averages, all fp32
    activations   what the backward pass of one packed row needs; none below the first layer that learns
    workspace     the larger of a chunk of logits and the temporaries of one layer

Activations are measured: one block of each kind runs on PyTorch's meta device, which computes shapes without
numbers, while hooks note what autograd saves. The kernels of the fused executor do not run there; it has a
formula (`tiles.kept_per_token`). With recomputation every layer that learns keeps only its input, and one
layer at a time keeps everything.

Of weights sharded over N devices (``shards=N``) each device holds its shard, the whole output layer, and
three layers: the one at work, the one fetched ahead, and the buffer it arrives in; or the embeddings, if they
are larger. ``whole_layers`` are not sharded. Adapter and activations are those of one device, which computes
its own rows.

Where P devices share the heads of a row (``tensor_parallel=P``), a device has 1/P of every layer, and the
activations of its own heads and of its part of the MLP's width. Embeddings and output layer are sharded over
the N/P groups, and with one group nothing is gathered. A copy of the hidden states is summed over the group.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode

from lit_adapter.model.adapter import adapter_shapes, attach
from lit_adapter.model.attention import MOST_SCORED, PackedRow, SegmentView
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.executors import Setting, choose_for_training
from lit_adapter.model.layout import base_shapes, n_block_parameters, n_numbers
from lit_adapter.model.llama import empty_llama
from lit_adapter.model.lora import joined_numbers, joined_rows
from lit_adapter.model.loss import CHUNK_LOGITS, rows_at_once
from lit_adapter.model.tiles import kept_per_token
from lit_adapter.model.torch_internals import flash_attention_on_cpu
from lit_adapter.training.placement import dtype_of

META = torch.device("meta")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: int
    adapter: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(astuple(self))


@dataclass(frozen=True)
class Sizes:
    """What the memory of a step depends on; a setting is tried by replacing its field."""

    model: LlamaConfig
    adapter: AdapterConfig
    row: PackedRow
    """The row that needs most."""
    longest: PackedRow
    """The longest record in a row of its own; no setting can make rows shorter than it."""
    precision: str
    """Lightning's name: ``32-true``, ``bf16-true``, ``bf16-mixed`` or ``16-mixed``."""
    device: str = "cpu"
    recompute: bool = False
    shards: int = 1
    tensor_parallel: int = 1
    whole_layers: int = 0
    """Of a sharded base: layers that each device keeps whole."""
    shardable_over: int = 1
    """GPUs of a node that the base could be sharded over; 1 if it must stay whole."""
    tokens: int | None = None
    """Another length of ``row``, not below that of ``longest``."""

    @property
    def gathers(self) -> bool:
        """Whether the base's matrices are sharded over several devices, which gather them."""
        return self.shards > self.tensor_parallel

    @property
    def memory(self) -> Memory:
        """What one device needs at the peak of a step."""
        whole = self._memory(self.row)
        if self.tokens is None:
            return whole
        least, n_least = self._memory(self.longest), len(self.longest.ids)
        share = (self.tokens - n_least) / (len(self.row.ids) - n_least)
        pairs = zip(astuple(least), astuple(whole), strict=True)
        return Memory(*(math.ceil(low + share * (high - low)) for low, high in pairs))

    def _memory(self, row: PackedRow) -> Memory:
        adapter, tokens, targets = self.adapter, len(row.ids), len(row.target_index)
        stored = 2 if self.precision == "bf16-true" else 4
        computed = 4 if self.precision == "32-true" else 2
        fused = _is_fused(self.model, adapter, self.precision, self.device, self.tensor_parallel)
        model = self.model.shard(self.tensor_parallel)  # what this device computes
        if fused:
            each, first = kept_per_token(model, computed), adapter.learning_layers(model.n_layer).start
            each += computed * sum(joined_rows(model, adapter.lora).values())
            each += computed * 2 * model.n_embd * ("linears" in adapter.parts)  # outputs of two products
            layers = [tokens * each] * (model.n_layer - 1 - first) + [targets * each]
            # Final norm, which keeps what a trained weight multiplies too; rotation, and one that turns none.
            kept, turned = 2 if "norms" in adapter.parts else 1, 2 if model.unrotated_layers else 1
            rest = kept * targets * model.n_embd * stored + turned * 4 * tokens * model.head_dim
        else:
            layers, rest = _measure(model, adapter, row, self.precision)
        if self.recompute:
            layers = [max(layers), len(layers) * tokens * model.n_embd * stored]
        rest += targets * model.n_embd * stored  # the loss keeps the gradient of the hidden states
        workspace = _workspace(model, adapter, row, computed, fused=fused)
        if self.tensor_parallel > 1:
            workspace += computed * tokens * model.n_embd
        trained = n_numbers(adapter_shapes(adapter, self.model))
        return Memory(self._weights(stored), 16 * trained, sum(layers) + rest, workspace)

    def _weights(self, stored: int) -> int:
        model, parallel = self.model, self.tensor_parallel
        layer = n_block_parameters(model)
        rest = n_numbers(base_shapes(model)) - model.n_layer * layer
        layer //= parallel
        if not self.gathers:
            return (rest + model.n_layer * layer) * stored
        n_sharded = model.n_layer - self.whole_layers
        shard = math.ceil((rest + n_sharded * layer) * stored / (self.shards // parallel))
        embeddings = 0 if model.tie_embeddings else model.vocab_size * model.n_embd
        gathered = max(min(3, n_sharded) * layer, embeddings) + model.vocab_size * model.n_embd
        return shard + (gathered + self.whole_layers * layer) * stored


class _Kind(NamedTuple):
    """A kind of block: blocks of one kind keep the same number of bytes."""

    of_layer: int
    """The first layer with the same window and positions."""

    passes_gradient: bool
    """A layer below it learns."""
    has_prefix: bool
    is_last: bool
    """It computes the target positions only."""


def _measure(
    model: LlamaConfig, adapter: AdapterConfig, row: PackedRow, precision: str
) -> tuple[list[int], int]:
    """Return the bytes that each layer keeps, from the first that learns on, and all other bytes kept."""
    prefixes, first = adapter.adapted_layers(model.n_layer), adapter.learning_layers(model.n_layer).start
    alike = {model.kind_of(i): i for i in reversed(range(model.n_layer))}
    kinds = [
        _Kind(alike[model.kind_of(i)], i > first, i in prefixes, i == model.n_layer - 1)
        for i in range(first, model.n_layer)
    ]
    form = replace(adapter, layers=1 if prefixes else None)
    saved = {
        kind: _saved(_two_layers(model, 0 if kind is None else kind.of_layer), form, row, precision, kind)
        for kind in {*kinds, None}
    }
    shared = frozenset().union(*(of_plan for _, of_plan in saved.values()))
    rest = saved[None][0] + sum(storage.nbytes() for storage in shared)
    return [saved[kind][0] for kind in kinds], rest


def _two_layers(model: LlamaConfig, layer: int) -> LlamaConfig:
    """Return a model that has one layer twice, and almost no vocabulary."""
    return replace(model.of_layers((layer, layer)), vocab_size=1)


@lru_cache(maxsize=64)
def _saved(
    sizes: LlamaConfig, adapter: AdapterConfig, row: PackedRow, precision: str, kind: _Kind | None
) -> tuple[int, frozenset[UntypedStorage]]:
    """Return the bytes that a block keeps, or without ``kind`` the final norm, and what it keeps of the plan.

    ``sizes`` have two layers, of which the upper one has a prefix, if any has.
    """
    dtype = dtype_of(precision)
    model = empty_llama(sizes).to(dtype)
    attach(model, adapter)
    model.to(META)
    view, target_index = _plan(row, sizes.head_dim)
    kept: set[UntypedStorage] = set()

    def note(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage())
        return tensor

    with _AsOnCpu(mixed="mixed" in precision), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        if kind is None:
            hidden = torch.empty(1, len(target_index), sizes.n_embd, dtype=dtype, device=META)
            model.norm(hidden.requires_grad_())
        else:
            x = torch.empty(1, len(row.ids), sizes.n_embd, dtype=dtype, device=META)
            x.requires_grad_(kind.passes_gradient)
            model.layers[kind.has_prefix](x, view, target_index if kind.is_last else None)
    kept -= {parameter.untyped_storage() for parameter in model.parameters()}
    groups = [tensor for group in view.planned for tensor in vars(group).values()]
    plan = [*view.rotation, target_index, *groups]
    of_plan = kept & {tensor.untyped_storage() for tensor in plan}
    return sum(storage.nbytes() for storage in kept - of_plan), frozenset(of_plan)


@lru_cache(maxsize=4)
def _plan(row: PackedRow, head_dim: int) -> tuple[SegmentView, Tensor]:
    """Return the row's view and target positions on the meta device."""
    cos, sin = (torch.empty(1, len(row.ids), head_dim // 2, device=META) for _ in range(2))
    return SegmentView(row, (cos, sin)), row.inputs(META)[2]


class _AsOnCpu(TorchFunctionMode):
    """Makes the meta device act like a CPU: with autocast, and with attention that keeps no scores."""

    def __init__(self, *, mixed: bool) -> None:
        super().__init__()
        self.mixed = mixed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.mixed and func.__name__ in ("linear", "matmul", "__matmul__", "scaled_dot_product_attention"):
            args = [x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        if func is F.scaled_dot_product_attention:
            q, k, v = args
            return flash_attention_on_cpu(q, k, v, kwargs["attn_mask"], kwargs["scale"])
        return func(*args, **(kwargs or {}))


def _workspace(model: LlamaConfig, adapter: AdapterConfig, row: PackedRow, size: int, *, fused: bool) -> int:
    """Return the largest temporary allocation: logits, scores, or a layer's own tensors.

    ``size`` is that of a number in the precision of the computation, in bytes.
    """
    tokens, targets = len(row.ids), len(row.target_index)
    logits = min(targets, max(1, CHUNK_LOGITS // model.vocab_size)) * model.vocab_size
    if fused:
        joined = joined_numbers(model, adapter.lora)
        widths = 5 if "linears" in adapter.parts else 3  # a scaled gradient beside its own
        of_layer = tokens * (widths * model.n_hidden + 5 * model.n_embd)
        # With V2's bias and scale on the output layer, several versions of its logits exist in fp32.
        return max(size * (joined + max(logits, of_layer)), 20 * logits * adapter.head)
    view, _ = _plan(row, model.head_dim)
    view.plan(None)
    sights = [group.sight for group in view.planned if group.sight is not None]
    pairs = max((x.numel() for x in sights if x[0].numel() <= MOST_SCORED), default=0)
    states = tokens * model.n_embd * 4
    layer = tokens * 3 * model.n_hidden * size + 5 * states
    # With V2's bias and scale, several versions of the logits exist in fp32; else they change in place.
    logit = 20 if adapter.head else size
    softmax = 8 * min(targets, rows_at_once()) * model.vocab_size
    return max(logits * logit + softmax, pairs * model.n_head * 3 * size, layer) + 3 * states


@lru_cache(maxsize=64)
def _is_fused(
    model: LlamaConfig, adapter: AdapterConfig, precision: str, device: str, tensor_parallel: int
) -> bool:
    setting = Setting(torch.device(device), dtype_of(precision))
    return choose_for_training(model, adapter, setting, tensor_parallel).name == "fused"
