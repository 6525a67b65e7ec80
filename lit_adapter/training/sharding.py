"""A frozen base cut over the processes (FSDP2), each of which reads its own part of the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lit_adapter.model.llama import Llama
from lit_adapter.training.module import LitAdapter
from lit_adapter.training.strategy import ShardedStrategy
from lit_adapter.weights.load import fill_base


def shard_base(model: Llama, mesh: DeviceMesh) -> None:
    """Cut a base's matrices over ``mesh``: a layer is gathered when it runs, forward and backward.

    The adapter stays whole on every process, outside FSDP's care: its gradients are averaged by
    `ShardedStrategy`; so do norms and biases, which are small. The head is gathered once a forward pass and
    stays until its backward pass ends, so that the loss, which comes after the forward, finds it whole.
    """
    model.is_cut = True
    whole = {parameter for parameter in model.parameters() if not parameter.is_meta}
    for block in model.layers:
        fully_shard(block, mesh=mesh, ignored_params=whole)
        register_fsdp_forward_method(block, "prefix_kv")
    if not model.config.tie_embeddings:
        fully_shard(model.embed_tokens, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    register_fsdp_forward_method(model, "prefix_kv")
    register_fsdp_forward_method(model, "trunk")


def read_part(tensors: Any, name: str, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Read the part of a tensor that this process holds of a cut parameter, and nothing else of it."""
    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    length, start = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    part = tensors.get_slice(name)[tuple(slice(s, s + n) for s, n in zip(start, length, strict=True))]
    return DTensor.from_local(
        part.to(dtype), mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


class ShardedLitAdapter(LitAdapter):
    """The same training on a base that is cut, and only then read, once the processes are connected.

    Args:
        model: an empty base, its adapter attached.
        base: the folder it is read from.
        dtype: precision of the base.
        args: as for `LitAdapter`, like ``kwargs``.
        kwargs: as for `LitAdapter`.
    """

    def __init__(self, model: Llama, *args: Any, base: Path, dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.base, self.dtype_of_base = base, dtype
        self.is_ready = False

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.trainer.strategy.root_device

    def configure_model(self) -> None:
        """Cut and read the base, the first time Lightning asks."""
        if self.is_ready:
            return
        strategy: ShardedStrategy = self.trainer.strategy  # type: ignore[assignment]
        shard_base(self.model, strategy.device_mesh["data_parallel"])
        fill_base(self.model, self.base, device=self.device, dtype=self.dtype_of_base, read=read_part)
        for parameter in self.model.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(self.device)
        self.is_ready = True
