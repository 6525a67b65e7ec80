"""The protocol of a training method, and ours: packed rows, and the same model without any saving."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.arithmetic import Work, step_operations
from benchmarks.models import Base
from benchmarks.workload import Workload
from lit_adapter.data.encode import Encoded
from lit_adapter.data.packing import Packer, shared_preambles
from lit_adapter.model.adapter import adapter_parameters, attach
from lit_adapter.model.attention import CausalView, PackedRow
from lit_adapter.model.block_weights import float8_weights, prepare
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.executors import choose
from lit_adapter.model.layout import block_layout
from lit_adapter.model.loss import row_loss


@dataclass
class Part:
    """A micro-batch."""

    data: Any
    n_targets: int
    n_tokens: int
    """Positions computed, padding included."""
    operations: int
    """Floating-point operations of its forward and backward pass."""


Steps = Iterator[list[Part]]
"""The micro-batches of each optimizer step, made on demand."""


class Method(Protocol):
    """One way to train an adapter."""

    parameters: list[nn.Parameter]

    def steps(self, records: list[NDArray[np.int64]]) -> Steps:
        """Make the micro-batches of a pass of records."""

    def loss(self, part: Part) -> Tensor:
        """Return the summed cross-entropy of a micro-batch's targets."""


def attach_ours(base: Base, seed: int) -> list[nn.Parameter]:
    """Attach our default adapter to the base and return its parameters."""
    attach(base.model, AdapterConfig(layers=base.adapted), seed)
    if base.device.type == "cuda":
        prepare(base.model)
    return [parameter for _, parameter in adapter_parameters(base.model)]


class Packed:
    """This package as users run it: packed rows, shared preambles, only targets where they are enough.

    Args:
        base: what all methods share.
        work: the records.
        parameters: the adapter's.
        row_tokens: longest row.
        float8: use a copy of the frozen matrices in fp8; other methods still use the base's own.
        recompute: keep only the layers' inputs for the backward pass.
    """

    def __init__(
        self,
        base: Base,
        work: Workload,
        parameters: list[nn.Parameter],
        row_tokens: int,
        *,
        float8: bool = False,
        recompute: bool = False,
    ) -> None:
        self.base, self.parameters, self.recompute = base, parameters, recompute
        self.executor = choose(base.model, "training")
        self.weights: list[Any] | None = None
        if float8:
            layout = block_layout(base.model.config)
            self.weights = [float8_weights(block, layout) for block in base.model.layers]
        preambles = shared_preambles(work.encoded)
        self.packer = Packer(work.encoded, preambles, mask_prompt=True, row_tokens=row_tokens)

    def steps(self, records: list[NDArray[np.int64]]) -> Steps:
        """Pack each step's records as training does."""
        for step in records:
            yield [self._part(self.packer.row(row)) for row in self.packer.assign(step)]

    def _part(self, row: PackedRow) -> Part:
        seen = row.position + 1
        work = Work(
            tokens=len(row.ids),
            pairs=int(seen.sum()),
            last_tokens=len(row.target_index),
            last_pairs=int(seen[row.target_index].sum()),
        )
        return Part(row, len(row.target_id), len(row.ids), _operations(self.base, work))

    def loss(self, part: Part) -> Tensor:
        """Return a packed row's loss."""
        blocks = self.base.model.layers
        own = [block.fused_weights for block in blocks]
        try:
            for block, weights in zip(blocks, self.weights or own, strict=True):
                block.fused_weights = weights
            return row_loss(self.base.model, part.data, recompute=self.recompute, executor=self.executor)
        finally:
            for block, weights in zip(blocks, own, strict=True):
                block.fused_weights = weights


@dataclass
class PaddedBatch:
    """Records padded on the right: ``ids``, ``labels`` and ``mask`` are ``[B, T]``."""

    ids: Tensor
    labels: Tensor
    mask: Tensor


def padded_batch(encoded: Encoded, records: NDArray[np.int64], device: torch.device) -> PaddedBatch:
    """Pad ``records`` to their longest; labels of prompts and padding are -100."""
    shape = len(records), int(encoded.length[records].max())
    ids, labels, mask = np.zeros(shape, np.int64), np.full(shape, -100), np.zeros(shape, np.int64)
    for line, record in enumerate(records.tolist()):
        tokens, first = encoded.record(record), int(encoded.n_prompt[record])
        ids[line, : len(tokens)], mask[line, : len(tokens)] = tokens, 1
        labels[line, first : len(tokens)] = tokens[first:]
    return PaddedBatch(*(torch.from_numpy(part).to(device) for part in (ids, labels, mask)))


def padded_steps(
    work: Workload, records: list[NDArray[np.int64]], size: int, *, grouped: bool
) -> Iterator[list[NDArray[np.int64]]]:
    """Split a pass into micro-batches of ``size`` records.

    Args:
        work: the records.
        records: a pass.
        size: records in a micro-batch; at most those of an optimizer step.
        grouped: group similar lengths over the whole pass, then shuffle the micro-batches, as trainers
            that group by length do; otherwise keep the records' order.
    """
    order = np.concatenate(records)
    parts = np.split(order, range(size, len(order), size))
    if grouped:
        order = order[np.argsort(-work.encoded.length[order], kind="stable")]
        parts = np.split(order, range(size, len(order), size))
        parts = [parts[place] for place in np.random.default_rng(work.seed).permutation(len(parts))]
    per_step = max(1, work.batch // size)
    for first in range(0, len(parts), per_step):
        yield parts[first : first + per_step]


def padded_part(base: Base, encoded: Encoded, records: NDArray[np.int64], prompt_length: int) -> Part:
    """Return a micro-batch, and what it costs if nothing is left out."""
    batch = padded_batch(encoded, records, base.device)
    B, T = batch.ids.shape
    pairs = B * T * (T + 1) // 2
    work = Work(B * T, pairs, B * T, pairs)
    n_targets = int((encoded.length[records] - encoded.n_prompt[records]).sum())
    return Part(batch, n_targets, B * T, _operations(base, work, prompt_length))


def _operations(base: Base, work: Work, prompt_length: int = AdapterConfig().prompt_length) -> int:
    config = base.model.config
    return step_operations(config, work, base.adapted if prompt_length else config.n_layer, prompt_length)


class PaddedOurs:
    """Our model without any saving: one padded record per row, all positions, all logits, PyTorch's loss."""

    def __init__(self, base: Base, work: Workload, parameters: list[nn.Parameter], size: int) -> None:
        self.base, self.work, self.parameters, self.size = base, work, parameters, size

    def steps(self, records: list[NDArray[np.int64]]) -> Steps:
        """Pad records in their order, in the same optimizer steps as the packed ones."""
        for step in padded_steps(self.work, records, self.size, grouped=False):
            length = AdapterConfig().prompt_length
            yield [padded_part(self.base, self.work.encoded, part, length) for part in step]

    def _hidden(self, part: Part) -> Tensor:
        """Return the hidden states of a padded batch ``[B, T, C]``."""
        ids, model = part.data.ids, self.base.model
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return model(ids, CausalView(model.rotation(position)))

    def loss(self, part: Part) -> Tensor:
        """Return a padded batch's loss."""
        logits = self.base.model.logits(self._hidden(part))
        flat, labels = logits[:, :-1].flatten(0, 1).float(), part.data.labels[:, 1:].flatten()
        return F.cross_entropy(flat, labels, ignore_index=-100, reduction="sum")
