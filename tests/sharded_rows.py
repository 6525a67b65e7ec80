"""One of two processes that compute rows of a sharded base, forward and backward, one right after the other.

    torchrun --nproc-per-node 2 tests/sharded_rows.py BASE

On GPUs the host waits for none of them, as in a run. Prints how many losses, and how many gradients of three
rows, are not the whole base's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from random_records import encoded
from tiny_models import open_adapter
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lit_adapter.data.packing import Packer
from lit_adapter.model.adapter import adapter_parameters
from lit_adapter.model.attention import PackedRow
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.llama import Llama
from lit_adapter.model.loss import row_loss
from lit_adapter.training.sharding import read_sharded_base, shard_base
from lit_adapter.weights.load import empty_base, load_base

ADAPTER = AdapterConfig(layers=3, prompt_length=5, prompt_init_std=1.0)
N_ROWS, N_STEPS, ROWS_OF_A_STEP = 12, 60, 3


def computed(model: Llama, rows: list[PackedRow]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the rows' losses and the gradients of their sum; on a GPU they may be under way."""
    model.zero_grad()
    losses = []
    for row in rows:
        loss = row_loss(model, row)
        loss.backward()
        losses.append(loss.detach())
    return losses, [parameter.grad.clone() for _, parameter in adapter_parameters(model)]


def cut(base: Path, device: torch.device) -> Llama:
    model = open_adapter(empty_base(base, dtype=torch.float32), ADAPTER)
    shard_base(model, init_device_mesh(device.type, (dist.get_world_size(),)))
    read_sharded_base(model, base, device=device, dtype=torch.float32)
    return model


def main(base: Path, device: torch.device) -> None:
    whole = open_adapter(load_base(base, device="cpu", dtype=torch.float32), ADAPTER).to(device)
    packers = [Packer(encoded(s, longest=40), {}, mask_prompt=True, row_tokens=4000) for s in range(N_ROWS)]
    rows = [packer.row(list(range(9))) for packer in packers]
    steps = [[(ROWS_OF_A_STEP * s + n) % N_ROWS for n in range(ROWS_OF_A_STEP)] for s in range(N_STEPS)]
    wanted = [computed(whole, [rows[n] for n in step]) for step in steps]
    model = cut(base, device)
    found = [computed(model, [rows[n] for n in step]) for step in steps]
    both = list(zip(found, wanted, strict=True))
    losses = sum(not _close(*pair) for step in both for pair in _pairs(step, 0))
    gradients = sum(not all(_close(*pair) for pair in _pairs(step, 1)) for step in both)
    print(f"wrong losses: {losses}, wrong gradients: {gradients}.", flush=True)


def _pairs(step: Any, part: int) -> Any:
    """Return what was found and what was wanted of a step, tensor by tensor."""
    return zip(step[0][part], step[1][part], strict=True)


def _close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


if __name__ == "__main__":
    on_gpu = torch.cuda.is_available()
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(own)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    main(Path(sys.argv[1]), own)
    dist.destroy_process_group()
