"""One of two processes that share the heads of a row, with dropout: compares with the whole base.

    RANK=0 python tests/sharded_dropout.py BASE STORE

Both drop for what they compute: the prefix weights of their heads, and the inputs of LoRA's updates of their
outputs or channels. The whole base is given the same to drop. Prints the largest differences from it (loss,
gradients), how far the two processes' losses are apart, and how many of their draws are the same.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from random_records import encoded
from tiny_models import open_adapter
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lit_adapter.data.packing import Packer
from lit_adapter.model.adapter import adapter_parameters
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.llama import Llama
from lit_adapter.model.lora import LoraLinear
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.model.loss import row_loss
from lit_adapter.training.module import seed_dropout
from lit_adapter.training.sharding import read_sharded_base, shard_base, shard_heads
from lit_adapter.training.strategy import average_gradients
from lit_adapter.weights.load import empty_base, load_base

ADAPTER = AdapterConfig(
    prompt_length=4, prompt_init_std=1.0, dropout=0.3, lora=LoraConfig(rank=2, dropout=0.2)
)
ROW = Packer(encoded(3, 6), {}, mask_prompt=True, row_tokens=1000).row(list(range(6)))


def learned(model: Llama) -> tuple[float, dict[str, Tensor]]:
    """Return a row's loss and its gradients by name."""
    loss = row_loss(model.train(), ROW)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in adapter_parameters(model) if p.grad is not None}


def note_draws(draws: list[Tensor]) -> None:
    """Keep what each dropout multiplies its input by."""
    own = F.dropout

    def dropped(x: Tensor, share: float, training: bool) -> Tensor:
        draws.append(own(torch.ones_like(x), share, training))
        return x * draws[-1]

    F.dropout = dropped  # type: ignore[assignment]


def drop_the_same(draws: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Let a whole base drop what two processes have drawn."""

    def update(linear: LoraLinear, x: Tensor) -> Tensor:
        both, a, b = next(draws), linear.lora_a, linear.lora_b
        if both[0].shape == x.shape:  # each process has all inputs, and computes half of the outputs
            halves = zip(both, b.chunk(2), strict=True)
            added = torch.cat([F.linear(F.linear(x * kept, a), half) for kept, half in halves], -1)
        else:
            added = F.linear(F.linear(x * torch.cat(both, -1), a), b)
        return F.linear(x, linear.weight, linear.bias) + added * linear.scale

    LoraLinear.forward = update  # type: ignore[method-assign]
    F.dropout = lambda weight, *_: weight * torch.cat(next(draws), 1)  # type: ignore[assignment] # of heads


def compared(base: Path, rank: int) -> dict[str, Any]:
    model = open_adapter(empty_base(base, dtype=torch.float32), ADAPTER)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    shard_heads(model, mesh["tensor"])
    shard_base(model, mesh["data"])
    read_sharded_base(model, base, device=torch.device("cpu"), dtype=torch.float32, rank=rank)
    draws: list[Tensor] = []
    note_draws(draws)
    seed_dropout(seed=1, step=2, rank=rank)
    loss, gradients = learned(model)
    average_gradients([parameter for _, parameter in adapter_parameters(model)])
    both: list[Any] = [None, None]
    dist.all_gather_object(both, (loss, draws))
    (one, first), (other, second) = both
    drop_the_same(zip(first, second, strict=True))
    wanted_loss, wanted = learned(open_adapter(load_base(base, device="cpu", dtype=torch.float32), ADAPTER))
    return {
        "loss": abs(loss - wanted_loss) / wanted_loss,
        "gradient": max(float((gradients[name] - wanted[name]).abs().max()) for name in wanted),
        "apart": abs(one - other),
        "same_draws": sum(map(torch.equal, first, second)),
        "learned": len(wanted) == len(dict(adapter_parameters(model))),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    base_, store = sys.argv[1:]
    rank_ = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank_, world_size=2)
    print(json.dumps(compared(Path(base_), rank_)))
    dist.destroy_process_group()
