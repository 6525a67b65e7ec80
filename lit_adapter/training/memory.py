"""How much memory a training step takes, known before the base is loaded.

At its peak a step holds

    weights       the frozen base: 2 bytes a number under bf16-true, else 4
    adapter       16 bytes a trained number: itself, its gradient and AdamW's two averages, all fp32
    activations   what the backward pass of one packed row needs; none below the first layer that learns
    workspace     the larger of a chunk of logits and the temporaries of one layer

Activations are measured: one block of each kind runs on PyTorch's meta device, which computes shapes without
numbers, while hooks note what autograd saves. The kernels of the fused executor do not run there; it has a
formula (`tiles.kept_per_token`). With recomputation every layer that learns keeps its input, and one layer
at a time all the rest.

Of weights sharded over N devices (``shards=N``) each device holds its shard, the whole output layer, and
three layers: the one at work, the one fetched ahead, and the buffer it arrives in. Adapter and activations
are those of one device, which computes its own rows.

Where P devices share the heads of a row (``tensor_parallel=P``), a device has 1/P of every layer; embeddings
and output layer are sharded over the N/P groups, and with one group nothing is gathered. A copy of the hidden
states is summed over the group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode

from lit_adapter.model.adapter import attach
from lit_adapter.model.adapter import expected_shapes as adapter_shapes
from lit_adapter.model.attention import MOST_SCORED, PackedRow, SegmentView
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.llama import Llama
from lit_adapter.model.loss import CHUNK_LOGITS, rows_at_once
from lit_adapter.model.tiles import HEAD_SIZES, LONGEST_PROMPT, kept_per_token
from lit_adapter.weights.base_folder import expected_shapes as base_shapes

Path = Literal["plain", "fused"]
"""How blocks are computed: by their modules, or by the CUDA kernels."""
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
        return sum(getattr(self, field.name) for field in fields(self))


def estimate(
    model: LlamaConfig,
    adapter: AdapterConfig,
    row: PackedRow,
    *,
    precision: str,
    path: Path = "plain",
    recompute: bool = False,
    shards: int = 1,
    tensor_parallel: int = 1,
) -> Memory:
    """Return what one device needs at the peak of a step.

    Args:
        model: the base's sizes.
        adapter: the adapter's.
        row: the row that needs most.
        precision: Lightning's name for it: ``32-true``, ``bf16-true``, ``bf16-mixed`` or ``16-mixed``.
        path: how blocks are computed.
        recompute: whether the backward pass computes them again.
        shards: devices that the frozen weights are sharded over.
        tensor_parallel: devices that share the heads of one row.
    """
    stored = 2 if precision == "bf16-true" else 4
    computed = 4 if precision == "32-true" else 2
    tokens, targets = len(row.ids), len(row.target_index)
    base = {name: math.prod(shape) for name, shape in base_shapes(model).items()}
    layer = sum(size for name, size in base.items() if name.startswith("model.layers.0."))
    weights = sum(base.values()) - model.n_layer * layer
    layer //= tensor_parallel
    weights = (weights + model.n_layer * layer) * stored
    if shards > tensor_parallel:
        gathered = 3 * layer + model.vocab_size * model.n_embd
        weights = math.ceil(weights / (shards // tensor_parallel)) + gathered * stored
    trained = sum(math.prod(shape) for shape in adapter_shapes(adapter, model).values())
    model = model.part(tensor_parallel)
    if path == "fused":
        each, first = kept_per_token(model, computed), adapter.adapted_layers(model.n_layer).start
        layers = [tokens * each] * (model.n_layer - 1 - first) + [targets * each]
        rest = targets * model.n_embd * stored + 4 * tokens * model.head_dim  # final norm's input, rotation
    else:
        layers, rest = _measure(model, adapter, row, precision)
    if recompute:
        layers = [max(layers), len(layers) * tokens * model.n_embd * stored]
    # The loss keeps the gradient of the hidden states.
    kept = sum(layers) + rest + targets * model.n_embd * stored
    copied = computed * tokens * model.n_embd if tensor_parallel > 1 else 0
    return Memory(weights, 16 * trained, kept, _workspace(model, adapter, row, computed, path) + copied)


class _Kind(NamedTuple):
    """What distinguishes a block from others, as far as autograd is concerned."""

    passes_gradient: bool
    """A layer below it learns."""
    has_prefix: bool
    is_last: bool
    """It computes the target positions only."""


FINAL_NORM = None


def _measure(
    model: LlamaConfig, adapter: AdapterConfig, row: PackedRow, precision: str
) -> tuple[list[int], int]:
    """Return what each layer keeps, from the first that learns on, and what is kept beside the layers."""
    prefixes = adapter.adapted_layers(model.n_layer)
    first = 0 if adapter.version == "v2" else prefixes.start
    kinds = [_Kind(i > first, i in prefixes, i == model.n_layer - 1) for i in range(first, model.n_layer)]
    form = replace(adapter, layers=1 if prefixes else None)
    saved = {
        kind: _saved(replace(model, n_layer=2, vocab_size=1), form, row, precision, kind)
        for kind in {*kinds, FINAL_NORM}
    }
    shared = frozenset().union(*(of_row for _, of_row in saved.values()))
    rest = saved[FINAL_NORM][0] + sum(storage.nbytes() for storage in shared)
    return [saved[kind][0] for kind in kinds], rest


@lru_cache(maxsize=64)
def _saved(
    sizes: LlamaConfig, adapter: AdapterConfig, row: PackedRow, precision: str, kind: _Kind | None
) -> tuple[int, frozenset[UntypedStorage]]:
    """Return the bytes that one block, or the final norm, keeps, and what it keeps of the row's own plan.

    Args:
        sizes: of a model of two layers.
        adapter: of one adapted layer, the upper one, or of none.
        row: the packed row.
        precision: Lightning's name for it.
        kind: of the block; None for the final norm.
    """
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    with META:
        model = Llama(sizes).to(dtype).requires_grad_(False)
    attach(model, adapter)
    model.to(META)
    view, target_index = _plan(row, sizes.head_dim)
    groups = (*view.all_queries, *view.target_queries)
    plan = [*view.rotation, target_index, *(tensor for group in groups for tensor in vars(group).values())]
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
    of_plan = kept & {tensor.untyped_storage() for tensor in plan}
    return sum(storage.nbytes() for storage in kept - of_plan), frozenset(of_plan)


@lru_cache(maxsize=4)
def _plan(row: PackedRow, head_dim: int) -> tuple[SegmentView, Tensor]:
    """Return the row's view and target positions on the meta device."""
    rotation = (torch.empty(1, len(row.ids), head_dim // 2, device=META) for _ in range(2))
    cos, sin = rotation
    return SegmentView(row, (cos, sin)), row.inputs(META)[2]


class _AsOnCpu(TorchFunctionMode):
    """Does what a CPU does and the meta device does not: autocast, and attention that keeps no scores."""

    def __init__(self, *, mixed: bool) -> None:
        super().__init__()
        self.mixed = mixed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.mixed and func.__name__ in ("linear", "matmul", "__matmul__", "scaled_dot_product_attention"):
            args = [x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        if func is F.scaled_dot_product_attention:
            mask = kwargs["attn_mask"]
            attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return attend(*args, attn_mask=mask, scale=kwargs["scale"])[0]
        return func(*args, **(kwargs or {}))


def _workspace(model: LlamaConfig, adapter: AdapterConfig, row: PackedRow, s: int, path: Path) -> int:
    """Return the largest of what is held for a moment: logits, scores, a layer's own tensors.

    ``s`` is the size of a number in the precision that is computed in, in bytes.
    """
    tokens, targets = len(row.ids), len(row.target_index)
    logits = min(targets, max(1, CHUNK_LOGITS // model.vocab_size)) * model.vocab_size
    if path == "fused":
        return s * max(logits, tokens * (3 * model.n_hidden + 5 * model.n_embd))
    view, _ = _plan(row, model.head_dim)
    sights = [group.sight for group in (*view.all_queries, *view.target_queries)]
    pairs = max((x.numel() for x in sights if x[0].numel() <= MOST_SCORED), default=0)
    states = tokens * model.n_embd * 4
    layer = tokens * 3 * model.n_hidden * s + 5 * states
    # With V2's bias and scale there are several forms of the logits in fp32; else they change in place.
    logit = 20 if adapter.version == "v2" and adapter.head else s
    softmax = 8 * min(targets, rows_at_once()) * model.vocab_size
    return max(logits * logit + softmax, pairs * model.n_head * 3 * s, layer) + 3 * states


def path_of(
    model: LlamaConfig, adapter: AdapterConfig, precision: str, device: str, tensor_parallel: int = 1
) -> Path:
    """Return how the blocks of such a run will be computed."""
    unfit = device != "cuda" or unfused_because(model, adapter, precision, tensor_parallel)
    return "plain" if unfit else "fused"


def unfused_because(
    model: LlamaConfig, adapter: AdapterConfig, precision: str, tensor_parallel: int = 1
) -> str | None:
    """Return the first reason why the CUDA kernels cannot compute such blocks; None where they can."""
    reasons = (
        (precision != "bf16-true", f"trainer.precision is {precision}, not bf16-true"),
        (tensor_parallel > 1, f"trainer.tensor_parallel is {tensor_parallel}"),
        (model.head_dim not in HEAD_SIZES, f"the base's heads have {model.head_dim} channels"),
        (model.attention_bias or model.mlp_bias, "the base has biases"),
        (adapter.version != "v1", f"adapter.version is {adapter.version}"),
        (adapter.dropout > 0, f"adapter.dropout is {adapter.dropout:g}, not 0"),
        (
            adapter.prompt_length > LONGEST_PROMPT,
            f"adapter.prompt_length is {adapter.prompt_length}, above {LONGEST_PROMPT}",
        ),
    )
    return next((reason for applies, reason in reasons if applies), None)
