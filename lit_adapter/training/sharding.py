"""A frozen base that is sharded over the processes, each of which reads only its own shard of the files.

FSDP2 shards every matrix by rows and gathers a layer when it runs. As the base is frozen, a layer that every
device keeps whole need never be gathered: it costs memory alone. Tensor parallelism divides the work: a
process computes some of the attention heads and a part of the MLP's width, and the results are summed over
the group,

    y = sum over processes of W_o[:, own] attention(W_q[own] x, W_k[own] x, W_v[own] x)

Each process of a group computes the loss of the same rows from a copy of the hidden states. The mean of these
losses is minimised, so that the gradient of every trained parameter is a sum over all processes, as it is
without tensor parallelism.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lit_adapter.config import TrainerConfig
from lit_adapter.errors import UserError
from lit_adapter.model.adapter import trained_modules
from lit_adapter.model.block_weights import prepare
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.layout import BlockLayout, block_layout
from lit_adapter.model.llama import Block, Llama
from lit_adapter.model.parts import share
from lit_adapter.training.module import LitAdapter
from lit_adapter.training.strategy import ShardedStrategy
from lit_adapter.weights.load import fill_base


class _Total(torch.autograd.Function):
    """The sum over a group of processes; its backward pass sums the gradients of the copies."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = y.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(dy, ctx.group), None


def check_sharding(options: TrainerConfig, model: LlamaConfig) -> None:
    """Check that a base has ``trainer.whole_layers``, and heads for ``trainer.tensor_parallel``.

    Raises:
        UserError: it has fewer layers, or a number of key/value heads or an MLP width that cannot be shared.
    """
    if isinstance(options.whole_layers, int) and options.whole_layers > model.n_layer:
        raise UserError(
            f"trainer.whole_layers is {options.whole_layers}, but the base has {model.n_layer} layers; "
            "lower it, or use auto"
        )
    shared = math.gcd(model.n_kv_head, model.n_hidden)
    if shared % options.tensor_parallel:
        possible = ", ".join(str(n) for n in range(1, shared + 1) if shared % n == 0)
        raise UserError(
            f"trainer.tensor_parallel is {options.tensor_parallel}, which does not divide the base's "
            f"{model.n_kv_head} key/value heads and MLP width {model.n_hidden}; expected one of {possible}"
        )


def shard_heads(model: Llama, mesh: DeviceMesh) -> None:
    """Reduce the blocks of an empty base to this process's shard of the attention heads and the MLP.

    Embeddings, output layer and norms stay whole. So does the adapter, of which a process uses its share.
    """
    model.n_shards = mesh.size()
    if mesh.size() == 1:
        return
    layout = block_layout(model.config)
    for block in model.layers:
        _shard_block(block, layout, mesh.get_local_rank(), mesh.size())
        block.total = lambda y: _Total.apply(y, mesh.get_group())
        block.add_up_ = lambda y: dist.all_reduce(y, group=mesh.get_group())
    # Groups may sum in another order, but all must see the same logits to choose the same tokens.
    model.agree_on = lambda logits: dist.broadcast(logits, 0)


def _shard_block(block: Block, layout: BlockLayout, rank: int, n_shards: int) -> None:
    """Leave a block the weights of one shard; trained modules keep whole parameters and use their share."""
    for declared in layout.linears:
        linear: Any = block.get_submodule(declared.name)
        own = share(declared.n_out if declared.shard == "outputs" else declared.n_in, rank, n_shards)
        by_outputs = declared.shard == "outputs"
        part = linear.weight[own] if by_outputs else linear.weight[:, own]
        whole = part.clone(memory_format=torch.contiguous_format)
        linear.weight = torch.nn.Parameter(whole, requires_grad=False)
        linear.out_features, linear.in_features = part.shape
        if linear.bias is not None and by_outputs:
            linear.bias.data = linear.bias[own].clone()
        elif linear.bias is not None and rank > 0:
            linear.bias.data.zero_()  # added once, by the first process
    for _, module in trained_modules(block):
        module.shard(rank, n_shards)


def shard_base(model: Llama, mesh: DeviceMesh, n_whole: int = 0) -> None:
    """Shard a base's matrices over ``mesh``: a layer is gathered when it runs, forward and backward.

    ``n_whole`` of the layers, spread evenly, stay whole; those between them run while others are gathered.

    FSDP2 ignores the adapter, which stays whole on every process; `ShardedStrategy` averages its gradients.
    Norms and biases are small and stay whole too. The output layer is gathered once per forward pass and
    stays until the backward pass ends, because the loss reads it after the forward pass.
    """
    model.is_sharded = True
    if mesh.size() == 1:
        return
    whole = {parameter for parameter in model.parameters() if not parameter.is_meta}
    sharded = []
    for index, block in enumerate(model.layers):
        if is_whole(index, n_whole, len(model.layers)):
            whole |= {*block.parameters()}
            continue
        sharded.append(block)
        fully_shard(block, mesh=mesh, ignored_params=whole)
        register_fsdp_forward_method(block, "project_prefix")
    for block, following in pairwise(sharded):  # gathered while the block before it runs
        block.set_modules_to_forward_prefetch([following])
    learning = [*dropwhile(lambda block: not any(p.requires_grad for p in block.parameters()), sharded)]
    # The lowest block names itself; otherwise FSDP2 gathers the one below, which has no backward pass.
    for below, block in pairwise(learning[:1] + learning):
        block.set_modules_to_backward_prefetch([below])
    if not model.config.tie_embeddings:
        fully_shard(model.embed_tokens, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    register_fsdp_forward_method(model, "project_prefixes")


def is_whole(index: int, n_whole: int, n_layer: int) -> bool:
    """Return whether a layer is one of the ``n_whole`` that stay whole."""
    return (index + 1) * n_whole // n_layer > index * n_whole // n_layer


def whole_blocks(model: Llama) -> list[Block]:
    """Return the blocks whose matrices are not gathered when they run."""
    return [block for block in model.layers if not isinstance(block.mlp.down_proj.weight, DTensor)]


def read_shard(tensors: Any, name: str, parameter: Tensor, dtype: torch.dtype, rank: int = 0) -> Tensor:
    """Read from a tensor only the shard that this process holds.

    A dimension that is shorter than in the file was divided by `shard_heads`; shard ``rank`` of it is read.
    """
    whole = tensors.get_slice(name)
    start = [rank * n if n < all_ else 0 for n, all_ in zip(parameter.shape, whole.get_shape(), strict=True)]
    length = tuple(parameter.shape)
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        length = tuple(parameter.to_local().shape)
        # `fully_shard` divides the first dimension as `torch.chunk` does.
        start[0] += min(mesh.get_local_rank() * -(-parameter.shape[0] // mesh.size()), parameter.shape[0])
    part = whole[tuple(slice(s, s + n) for s, n in zip(start, length, strict=True))].to(dtype).contiguous()
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def read_sharded_base(
    model: Llama, base: Path, *, device: torch.device, dtype: torch.dtype, rank: int = 0
) -> None:
    """Read this process's shard of a base, and move the rest of the model to its device.

    ``rank`` is this process's among those that share the attention heads.

    Raises:
        UserError: as `load_base`.
    """
    fill_base(model, base, device=device, dtype=dtype, read=partial(read_shard, rank=rank))
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


class ShardedLitAdapter(LitAdapter):
    """The same training on an empty ``model``, sharded and then read once the processes are connected.

    ``whole_layers`` of the base stay whole: as many as every process has room for.
    """

    def __init__(
        self, model: Llama, *args: Any, base: Path, dtype: torch.dtype, whole_layers: int, **kwargs: Any
    ) -> None:
        super().__init__(model, *args, **kwargs)
        self.base, self.dtype_of_base, self.whole_layers = base, dtype, whole_layers
        self.is_ready = False

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.trainer.strategy.root_device

    def configure_model(self) -> None:
        """Shard and read the base when Lightning first asks."""
        if self.is_ready:
            return
        strategy: ShardedStrategy = self.trainer.strategy  # type: ignore[assignment]
        tensor_mesh = strategy.device_mesh["tensor_parallel"]
        data_mesh = strategy.device_mesh["data_parallel"]
        shard_heads(self.model, tensor_mesh)
        agreed = torch.tensor(self.whole_layers, device=self.device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        shard_base(self.model, data_mesh, int(agreed))
        rank = tensor_mesh.get_local_rank()
        read_sharded_base(self.model, self.base, device=self.device, dtype=self.dtype_of_base, rank=rank)
        if self.device.type == "cuda":
            prepare(self.model, whole_blocks(self.model))
        self.is_ready = True
