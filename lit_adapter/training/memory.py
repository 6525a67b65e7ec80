"""How much memory a training step takes, by arithmetic, before anything is loaded.

Letters: T tokens of a row, C width, H query heads, G key/value heads, D head size, K prompt length, M width
of the MLP, V vocabulary, s bytes of a number in the precision that is computed in, r of one in the precision
of the weights, which the states between layers have. At its peak a step holds

    weights       the frozen base (bf16-true keeps it in 2 bytes a number, all else in 4)
    adapter       16 bytes a trained number: itself, its gradient, and AdamW's two averages, all fp32
    activations   what the backward pass of ONE row needs; layers below the first adapted one keep nothing
    workspace     the larger of a chunk of logits and the temporaries of one layer

A frozen linear layer keeps none of its inputs, so an adapted layer keeps, for each token,

    r 2 C                          the inputs of the two norms
    s (2 H D + 2 G D e + H E)      queries, keys, values as attention gathered them, its result, the scores
    s H D + z H K                  the prefix branch: queries and weights
    s 3 M                          the MLP: both projections and the activated one

with e keys gathered for a token (above 1 where records share a head), E keys scored for a query, and z = 4
in fp32, else 4 + s (the prefix's are kept in both precisions). The first adapted layer keeps nothing of its
own attention, and the last layer has the target positions only. V2 adapts every layer, and adds

    s (H D + 2 G D + 2 C + 2 M)    each linear layer's output before its scale
    r 2 C                          each norm's before its weight

Mixed precision adds a copy in 2 bytes of the adapted layers' weights, which autocast makes for each product.
The fused blocks of the CUDA path keep, instead, in every adapted layer

    s (2 C + 2 H D + 2 G D + 2 M) + 8 H

With recomputation every adapted layer keeps its input, r C, and one layer at a time all of the above.

Of weights cut over N devices (``shards=N``) each holds its share, the whole head, and three layers: the one
at work, the one fetched ahead, and what it arrives in. Adapter and activations are those of one device, which
computes its own rows.

Where P devices share the heads (``tensor_parallel=P``), H, G and M above are those of one device, and so are
its layers: 1/P of each. The rest, embeddings and head, is cut over the N/P groups; with one group nothing is
gathered. A copy of the states, s C, is added up over the group. Another way to compute a block is another
`Path` in `_layers`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch

from lit_adapter.model.adapter import adapter_shapes
from lit_adapter.model.attention import MOST_SCORED, PackedRow, SegmentGroup, SegmentView
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.layout import base_shapes
from lit_adapter.model.loss import CHUNK_LOGITS, rows_at_once
from lit_adapter.model.tiles import HEAD_SIZES, LONGEST_PROMPT

Path = Literal["plain", "fused"]
"""How blocks are computed: by their modules, or by the CUDA kernels."""


@dataclass(frozen=True)
class Queries:
    """What attention of some queries keeps for the backward pass, in numbers."""

    rows: float
    """Queries, padding included."""
    keys: float
    """Keys gathered for them: a shared head once for each record that continues it."""
    scores: float
    """Pairs of query and key whose score is kept."""
    at_once: float
    """Pairs scored in one call, at most."""

    def scaled(self, share: float) -> Queries:
        """Return ``share`` times as many of the same kind."""
        return Queries(self.rows * share, self.keys * share, self.scores * share, self.at_once * share)


@dataclass(frozen=True)
class RowShape:
    """A packed row, as far as memory goes."""

    tokens: int
    targets: int
    attention: Queries
    """Of all layers but the last."""
    last_attention: Queries
    """Of the last layer, which has the target positions' queries only."""

    @classmethod
    def of(cls, row: PackedRow) -> RowShape:
        """Return the shape of a row, as `SegmentView` plans its attention."""
        nothing = torch.empty(0)
        view = SegmentView(row, (nothing, nothing))
        return cls(
            len(row.ids), len(row.target_index), *map(_queries, (view.all_queries, view.target_queries))
        )

    def scaled(self, tokens: int) -> RowShape:
        """Return a row of the same kind of records with another number of tokens."""
        share = tokens / self.tokens
        attention, last = self.attention.scaled(share), self.last_attention.scaled(share)
        return RowShape(tokens, math.ceil(self.targets * share), attention, last)


def _queries(groups: Sequence[SegmentGroup]) -> Queries:
    rows, keys, scores, at_once = 0, 0, 0, 0
    for group in groups:
        (S, L), E = group.query.shape, group.key.shape[1]
        rows, keys = rows + S * L, keys + S * E
        pairs = S * L * E if L * E <= MOST_SCORED else 0
        scores, at_once = scores + pairs, max(at_once, pairs)
    return Queries(rows, keys, scores, at_once)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: int
    adapter: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate(
    model: LlamaConfig,
    adapter: AdapterConfig,
    row: RowShape,
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
        row: the largest row that the device computes.
        precision: as Lightning calls it: ``32-true``, ``bf16-true``, ``bf16-mixed`` or ``16-mixed``.
        path: how blocks are computed.
        recompute: whether the backward pass computes them again.
        shards: devices that the frozen weights are divided over.
        tensor_parallel: those among them that share the heads of one row.
    """
    stored = 2 if precision == "bf16-true" else 4
    computed = 4 if precision == "32-true" else 2
    base = {name: math.prod(shape) for name, shape in base_shapes(model).items()}
    layer = sum(size for name, size in base.items() if name.startswith("model.layers.0."))
    weights = sum(base.values()) - model.n_layer * layer
    layer //= tensor_parallel
    weights = (weights + model.n_layer * layer) * stored
    if shards > tensor_parallel:
        gathered = 3 * layer + model.vocab_size * model.n_embd
        weights = math.ceil(weights / (shards // tensor_parallel)) + gathered * stored
    trained = sum(math.prod(shape) for shape in adapter_shapes(adapter, model).values())
    copied = computed * row.tokens * model.n_embd if tensor_parallel > 1 else 0
    model = model.part(tensor_parallel)
    layers = _layers(model, adapter, row, computed, stored, path)
    kept = sum(layers)
    if recompute:
        kept = max(layers) + len(layers) * row.tokens * model.n_embd * stored
    if "mixed" in precision:
        kept += 2 * layer * (1 if recompute else len(layers))
    # The final norm's input, and the gradient of the hidden states that the loss keeps.
    kept += row.targets * model.n_embd * 2 * stored
    if len(layers) > 1:  # cosines and sines: the first layer's attention has no gradient
        kept += 4 * model.head_dim * (row.tokens + row.targets)
    return Memory(
        weights=weights,
        adapter=16 * trained,
        activations=math.ceil(kept),
        workspace=_workspace(model, adapter, row, computed, path) + copied,
    )


def _layers(
    model: LlamaConfig, adapter: AdapterConfig, row: RowShape, s: int, r: int, path: Path
) -> list[float]:
    """Return what each layer keeps, from the first that has a gradient on."""
    prefixes, v2 = adapter.adapted_layers(model.n_layer), adapter.version == "v2"
    first = 0 if v2 else prefixes.start
    found: list[float] = []
    for number in range(first, model.n_layer):
        last = number == model.n_layer - 1
        tokens, attention = (row.targets, row.last_attention) if last else (row.tokens, row.attention)
        if path == "fused":
            found.append(tokens * _fused_bytes(model, s))
            continue
        # The first adapted layer's own attention has no gradient to pass on, unless its projections learn.
        kept = _layer_bytes(model, tokens, attention if v2 or number > first else None, s, r)
        if number in prefixes:
            kept += tokens * _prefix_bytes(model, adapter, s)
        if v2:
            kept += tokens * _v2_bytes(model, s, r)
        if last and (v2 or number > first):
            kept += (row.tokens - tokens) * r * model.n_embd  # its first norm sees every token
        found.append(kept)
    return found


def _layer_bytes(model: LlamaConfig, tokens: int, attention: Queries | None, s: int, r: int) -> float:
    """Return what a layer keeps without its prefix; its own attention only where that has a gradient."""
    query, key = model.n_head * model.head_dim, model.n_kv_head * model.head_dim
    kept: float = tokens * (3 * s * model.n_hidden + r * model.n_embd)
    if attention is None:
        return kept
    kept += s * ((attention.rows + tokens) * query + 2 * attention.keys * key)
    kept += s * model.n_head * attention.scores
    return kept + tokens * r * model.n_embd


def _prefix_bytes(model: LlamaConfig, adapter: AdapterConfig, s: int) -> int:
    """Return what a prefix keeps for each token."""
    score = 4 if s == 4 else 4 + s  # softmax keeps it in fp32, the product with values narrow
    return model.n_head * (s * model.head_dim + score * adapter.prompt_length)


def _v2_bytes(model: LlamaConfig, s: int, r: int) -> int:
    """Return what V2's scales and norms keep for each token of a layer."""
    heads = (model.n_head + 2 * model.n_kv_head) * model.head_dim
    return s * (heads + 2 * model.n_embd + 2 * model.n_hidden) + r * 2 * model.n_embd


def _fused_bytes(model: LlamaConfig, s: int) -> int:
    """Return what an adapted layer of the CUDA path keeps for each token."""
    heads = 2 * (model.n_head + model.n_kv_head) * model.head_dim
    return s * (2 * model.n_embd + heads + 2 * model.n_hidden) + 8 * model.n_head


def _workspace(model: LlamaConfig, adapter: AdapterConfig, row: RowShape, s: int, path: Path) -> int:
    """Return the largest of what is held for a moment: logits, scores, a layer's own tensors."""
    logits = min(row.targets, max(1, CHUNK_LOGITS // model.vocab_size)) * model.vocab_size
    scores = max(row.attention.at_once, row.last_attention.at_once) * model.n_head
    if path == "fused":
        return s * max(logits, row.tokens * (3 * model.n_hidden + 5 * model.n_embd))
    states = row.tokens * model.n_embd * 4
    layer = row.tokens * 3 * model.n_hidden * s + 5 * states
    # A head with V2's bias and scale has several forms of its logits in fp32; else they are used up in place.
    logit = 20 if adapter.version == "v2" and adapter.head else s
    softmax = 8 * min(row.targets, rows_at_once()) * model.vocab_size
    return math.ceil(max(logits * logit + softmax, scores * 3 * s, layer)) + 3 * states


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
