"""A frozen base cut over the processes, each of which reads its own part of the files.

FSDP2 cuts every matrix by rows, and gathers a layer when it runs. Tensor parallelism cuts the work itself:
a process has some of the heads and a part of the MLP's width, and what they give is added up over the group,

    y = sum over processes of W_o[:, own] attention(W_q[own] x, W_k[own] x, W_v[own] x)

Each process of a group computes the same rows' loss from a copy of the hidden states. What is minimised is
the mean of these losses, so that every gradient, of prompts, gates and all that V2 trains, is a sum over all
processes of what each one finds, as it is without tensor parallelism.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lit_adapter.config import TrainerConfig
from lit_adapter.errors import UserError
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.llama import Block, Llama
from lit_adapter.training.module import LitAdapter
from lit_adapter.training.strategy import ShardedStrategy
from lit_adapter.weights.load import fill_base


class _Total(torch.autograd.Function):
    """The sum over a group of processes; the gradients of its copies are summed likewise."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = y.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Total.apply(dy, ctx.group), None


def check_heads(options: TrainerConfig, model: LlamaConfig) -> None:
    """See that a base's heads and MLP can be shared by ``trainer.tensor_parallel`` devices.

    Raises:
        UserError: they cannot; names the numbers that could.
    """
    shared = math.gcd(model.n_kv_head, model.n_hidden)
    if shared % options.tensor_parallel:
        possible = ", ".join(str(n) for n in range(1, shared + 1) if shared % n == 0)
        raise UserError(
            f"trainer.tensor_parallel is {options.tensor_parallel}, which does not divide the base's "
            f"{model.n_kv_head} key/value heads and MLP width {model.n_hidden}; expected one of {possible}"
        )


def cut_heads(model: Llama, mesh: DeviceMesh) -> None:
    """Leave an empty base this process's share of every layer's heads and MLP, of those that ``mesh`` has.

    Embeddings, head and norms stay whole, and so does the adapter, of which a process uses its heads' part.
    """
    model.n_parts = mesh.size()
    if mesh.size() == 1:
        return
    for block in model.layers:
        _cut_block(block, mesh.get_local_rank(), mesh.size())
        block.total = lambda y: _Total.apply(y, mesh.get_group())
    # Groups may add in another order: all must see the same logits, to choose the same tokens.
    model.lm_head.register_forward_hook(lambda module, args, logits: dist.broadcast(logits, 0))


def _cut_block(block: Block, rank: int, n_parts: int) -> None:
    attention, mlp = block.self_attn, block.mlp
    linear: Any
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
        own = _share(len(linear.weight), rank, n_parts)
        _keep(linear, linear.weight[own])
        linear.outputs = own
        if linear.bias is not None:
            linear.bias.data = linear.bias[own].clone()
    for linear in (attention.o_proj, mlp.down_proj):
        _keep(linear, linear.weight[:, _share(linear.weight.shape[1], rank, n_parts)])
        linear.bias_share = float(rank == 0)  # once in the sum
        if linear.bias is not None and rank > 0:
            linear.bias.data.zero_()
    if attention.prefix is not None:
        attention.prefix.heads = _share(attention.prefix.n_head, rank, n_parts)


def _share(length: int, rank: int, n_parts: int) -> slice:
    return slice(rank * length // n_parts, (rank + 1) * length // n_parts)


def _keep(linear: Any, part: torch.Tensor) -> None:
    linear.weight = torch.nn.Parameter(part.clone(memory_format=torch.contiguous_format), requires_grad=False)
    linear.out_features, linear.in_features = part.shape


def shard_base(model: Llama, mesh: DeviceMesh) -> None:
    """Cut a base's matrices over ``mesh``: a layer is gathered when it runs, forward and backward.

    The adapter stays whole on every process, outside FSDP's care: its gradients are averaged by
    `ShardedStrategy`; so do norms and biases, which are small. The head is gathered once a forward pass and
    stays until its backward pass ends, so that the loss, which comes after the forward, finds it whole.
    """
    model.is_sharded = True
    if mesh.size() == 1:
        return
    whole = {parameter for parameter in model.parameters() if not parameter.is_meta}
    for block in model.layers:
        fully_shard(block, mesh=mesh, ignored_params=whole)
        register_fsdp_forward_method(block, "prefix_kv")
    for block, following in pairwise(model.layers):  # asked for before its turn, not at it
        block.set_modules_to_forward_prefetch([following])
    learning = [*dropwhile(_is_frozen, model.layers)]
    # The lowest names itself: else FSDP gathers the layer below it, whose backward pass never comes.
    for below, block in pairwise(learning[:1] + learning):
        block.set_modules_to_backward_prefetch([below])
    if not model.config.tie_embeddings:
        fully_shard(model.embed_tokens, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    register_fsdp_forward_method(model, "prefix_kv")


def _is_frozen(block: Block) -> bool:
    return not any(parameter.requires_grad for parameter in block.parameters())


def read_part(
    tensors: Any, name: str, parameter: torch.Tensor, dtype: torch.dtype, rank: int = 0
) -> torch.Tensor:
    """Read the part of a tensor that this process holds of a cut parameter, and nothing else of it.

    A dimension shorter than the file's has been cut by `cut_heads`; of its parts the ``rank``-th is read.
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


def read_cut_base(
    model: Llama, base: Path, *, device: torch.device, dtype: torch.dtype, rank: int = 0
) -> None:
    """Read what this process holds of a base that is cut, and bring the rest of the model to its device.

    Args:
        model: cut by `cut_heads` and `shard_base`.
        base: the folder it is read from.
        device: this process's.
        dtype: precision of the base.
        rank: among the processes that share a layer's heads.

    Raises:
        UserError: as `load_base`.
    """
    fill_base(model, base, device=device, dtype=dtype, read=partial(read_part, rank=rank))
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


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
        tensor_mesh = strategy.device_mesh["tensor_parallel"]
        cut_heads(self.model, tensor_mesh)
        shard_base(self.model, strategy.device_mesh["data_parallel"])
        rank = tensor_mesh.get_local_rank()
        read_cut_base(self.model, self.base, device=self.device, dtype=self.dtype_of_base, rank=rank)
        self.is_ready = True
