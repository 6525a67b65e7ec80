"""One of several processes that share the heads of rows: compares the fused executor with the whole base.

    RANK=0 TRITON_INTERPRET=1 python tests/fused_heads_process.py BASE STORE N SHARED ADAPTERS

Of N processes, each group of SHARED computes rows of its own; one layer of the base is whole on each of them.
ADAPTERS is a JSON list of forms. Prints three objects for each form: a step of several records compared with
the whole base's modules, the same recomputed, and a step of one record, which leaves a second group a row
without tokens, compared with the whole base's fused blocks. An object has the relative errors of the loss and
of the worst gradient, whether all processes have the same gradients, the executors of training and decoding
on CUDA, and how many sums over the group a row took. Everything is in fp32, as in `interpreted`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from interpreted import without_a_device
from random_records import encoded
from tiny_models import open_adapter
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lit_adapter.data.packing import Packer, shared_preambles
from lit_adapter.model.adapter import adapter_parameters
from lit_adapter.model.attention import PackedRow
from lit_adapter.model.block_weights import block_weights, join_groups
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.executors import Executor, Setting, choose
from lit_adapter.model.layout import block_layout
from lit_adapter.model.llama import Llama
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.model.loss import row_loss
from lit_adapter.training.sharding import read_sharded_base, shard_base, shard_heads, whole_blocks
from lit_adapter.training.strategy import average_gradients
from lit_adapter.weights.load import empty_base, load_base

SETTING = Setting(torch.device("cuda"), torch.bfloat16)


def step(
    model: Llama, rows: list[PackedRow], executor: Executor, scale: float = 1.0, *, recompute: bool = False
) -> Tensor:
    """The summed loss of some rows, whose gradients are accumulated."""
    model.zero_grad()
    total = torch.zeros(())
    for row in rows:
        loss = row_loss(model, row, recompute=recompute, executor=executor)
        (loss * scale).backward()
        total += loss.detach()
    return total


def gradients(model: Llama) -> list[Tensor]:
    return [parameter.grad for _, parameter in adapter_parameters(model)]


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative error of a tensor."""
    pairs = zip(found, wanted, strict=True)
    return max(float((one - other).norm() / other.norm().clamp(min=1e-20)) for one, other in pairs)


def read_in_part(base: Path, config: AdapterConfig, mesh: DeviceMesh) -> Llama:
    model = open_adapter(empty_base(base, dtype=torch.float32), config)
    shard_heads(model, mesh["tensor"])
    shard_base(model, mesh["data"], 1)
    rank = mesh["tensor"].get_local_rank()
    read_sharded_base(model, base, device=torch.device("cpu"), dtype=torch.float32, rank=rank)
    if mesh["data"].size() == 1:  # as a run on CUDA does
        join_groups(model)
    layout = block_layout(model.config)
    for block in whole_blocks(model):
        block.fused_weights = block_weights(block, layout)
    return model


def count_sums(model: Llama) -> list[int]:
    """Note every sum over the group of a fused block."""
    noted: list[int] = []
    add_up = model.layers[0].add_up_

    def counted(y: Tensor) -> None:
        noted.append(y.numel())
        add_up(y)

    for block in model.layers:
        block.add_up_ = counted
    return noted


def compare(
    model: Llama,
    whole: Llama,
    mesh: DeviceMesh,
    sums: list[int],
    n_records: int,
    recompute: bool,
    executor: Any,
) -> dict[str, Any]:
    """Compare a step with that of the whole base, computed by ``executor``."""
    data = encoded(4, n_records, cut=True, longest=12)
    packer = Packer(data, shared_preambles(data), mask_prompt=True, row_tokens=500)
    share, n_shares = mesh["data"].get_local_rank(), mesh["data"].size()
    rows = [packer.row(records) for records in packer.assign(np.arange(n_records), n_shares)]
    wanted, own_rows = float(step(whole, rows, Executor(executor))), rows[share::n_shares]
    sums.clear()
    loss = step(model, own_rows, Executor("fused"), n_shares, recompute=recompute)
    found = {"recompute": recompute, "sums": len(sums) / len(own_rows)}
    dist.all_reduce(loss)
    average_gradients([parameter for _, parameter in adapter_parameters(model)])
    first = torch.cat([gradient.flatten() for gradient in gradients(model)])
    own = first.clone()
    dist.broadcast(first, 0)
    return found | {
        "loss": abs(float(loss) / mesh["tensor"].size() - wanted) / wanted,
        "gradient": apart(gradients(model), gradients(whole)),
        "alike": torch.equal(first, own),
    }


def compared(base: Path, mesh: DeviceMesh, given: dict[str, Any]) -> list[dict[str, Any]]:
    lora = LoraConfig(**given.get("lora", {}))
    config = AdapterConfig(prompt_init_std=1.0, **given | {"lora": lora})
    model = read_in_part(base, config, mesh)
    executors = [choose(model, purpose, SETTING).name for purpose in ("training", "decoding")]
    whole = open_adapter(load_base(base, device="cpu", dtype=torch.float32), config)
    sums = count_sums(model)
    cases = [(5, False, "modules"), (5, True, "modules"), (1, False, "fused")]
    found = [compare(model, whole, mesh, sums, *case) for case in cases]
    return [one | {"executors": executors, "adapter": given} for one in found]


if __name__ == "__main__":
    without_a_device()
    torch.set_num_threads(1)
    base_, store_, n_, shared_, adapters_ = sys.argv[1:]
    rank_, n_processes = int(os.environ["RANK"]), int(n_)
    dist.init_process_group("gloo", init_method=f"file://{store_}", rank=rank_, world_size=n_processes)
    sizes = (n_processes // int(shared_), int(shared_))
    mesh_ = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor"))
    print(
        json.dumps([case for given in json.loads(adapters_) for case in compared(Path(base_), mesh_, given)])
    )
    dist.destroy_process_group()
