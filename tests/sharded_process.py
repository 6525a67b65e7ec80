"""One of several processes that share a base: compares with the whole base, and measures memory.

    RANK=0 python tests/sharded_process.py BASE DTYPE STORE LAYOUTS ADAPTER

LAYOUTS and ADAPTER are JSON. A layout is the number of processes, how many of them share the heads of a row,
and how many layers each process keeps whole (0 if it does not say); a process of a higher rank sits it out.
Prints an object for each layout, or null: the largest differences from the whole base (loss, gradients, next
tokens), the bytes of memory of its own that reading took and left, how many layers were whole at once while
computing, how often weights were gathered for a row (of a single layout), the numbers of the base that it
holds, and what autograd kept, and what the estimate says.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from generation_fixtures import decode
from random_records import encoded
from test_memory import estimate, kept_for_backward
from tiny_models import open_adapter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from lit_adapter.data.packing import Packer, share_of_step
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.adapter import adapter_parameters
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.llama import Llama
from lit_adapter.model.lora_config import LoraConfig
from lit_adapter.model.loss import row_loss
from lit_adapter.training.sharding import read_sharded_base, shard_base, shard_heads
from lit_adapter.training.strategy import average_gradients
from lit_adapter.weights.load import empty_base, load_base

PROMPTS = [[5, 9, 2], [7, 7, 7, 7, 30, 4]]


class Peak:
    """The most memory of this process's own (not of mapped files) while the block runs, above its start."""

    def __enter__(self) -> Peak:
        self.start = self.most = self.now()
        self.running = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.running = False
        self.thread.join()

    def watch(self) -> None:
        while self.running:
            self.most = max(self.most, self.now())
            time.sleep(0.0005)

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def count_whole_layers(model: Llama) -> list[int]:
    """Note, inside every layer's forward and backward pass, how many layers are gathered."""
    counts: list[int] = []

    def note(*_: Any) -> None:
        counts.append(sum(not isinstance(b.mlp.down_proj.weight, DTensor) for b in model.layers))

    for block in model.layers:
        block.mlp.register_forward_hook(note)
        block.mlp.register_full_backward_pre_hook(note)
    return counts


def losses(model: Llama, share: int, n_shares: int, n_records: int = 1) -> float:
    """A step; one record makes the rows of all shares but one empty, more make them uneven."""
    packer = Packer(encoded(3, n_records), {}, mask_prompt=True, row_tokens=40)
    batch = share_of_step(packer, np.arange(n_records), 0, share, n_shares)
    total = 0.0
    for row in batch.rows:
        loss = row_loss(model, row)
        (loss * n_shares / batch.n_targets).backward()
        total += float(loss.detach())
    return total


def memory(model: Llama, adapter: AdapterConfig, tensor_parallel: int) -> dict[str, list[int]]:
    """Return the bytes that a process has of weights and keeps for a row, each with its estimate."""
    row = Packer(encoded(0, 20, longest=40), {}, mask_prompt=True, row_tokens=10_000).row(list(range(20)))
    kept = (
        kept_for_backward(model, row) + len(row.target_index) * model.config.n_embd * 4
    )  # of the loss itself
    layout = {"shards": tensor_parallel, "tensor_parallel": tensor_parallel}
    estimated = estimate(model.config, adapter, row, precision="32-true", **layout)
    trained = {name for name, _ in adapter_parameters(model)}
    weights = sum(4 * p.numel() for name, p in model.named_parameters() if name not in trained)
    return {"activations": [kept, estimated.activations], "weights": [weights, estimated.weights]}


def answers(model: Llama) -> list[tuple[int, int | None]]:
    return list(decode(model, PROMPTS, Sampling.of(max_new_tokens=6), frozenset(), batch_size=2))


def both_steps(model: Llama, share: int = 0, n_shares: int = 1) -> float:
    """The gradients of a step of one record and of one of eleven, and their summed loss."""
    model.zero_grad()
    return sum(losses(model, share, n_shares, n_records) for n_records in (1, 11))


def compared(
    base: Path,
    dtype: torch.dtype,
    store: str,
    layout: Sequence[int],
    adapter: AdapterConfig,
    *,
    profiled: bool,
) -> dict[str, Any] | None:
    n, tensor_parallel, n_whole = (*layout, 0)[:3]
    rank, n_shares = int(os.environ["RANK"]), n // tensor_parallel
    if rank >= n:
        return None
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n)
    model = open_adapter(empty_base(base, dtype=dtype), adapter)
    mesh = init_device_mesh("cpu", (n_shares, tensor_parallel), mesh_dim_names=("data", "tensor"))
    share, part = mesh.get_coordinate() or ()
    shard_heads(model, mesh["tensor"])
    shard_base(model, mesh["data"], n_whole)
    found: dict[str, Any] = {}
    with Peak() as peak:
        read_sharded_base(model, base, device=torch.device("cpu"), dtype=dtype, rank=part)
        found["held"] = peak.now() - peak.start
    found["peak"] = peak.most - peak.start
    whole_layers = count_whole_layers(model)
    with profile(activities=[ProfilerActivity.CPU]) if profiled else nullcontext() as seen:
        losses(model, share, n_shares)
    if seen is not None:
        found["gatherings"] = sum(event.name == "fsdp::all_gather_copy_in" for event in seen.events())
    tokens = answers(model)
    loss = both_steps(model, share, n_shares)  # training goes on after answers
    found["whole_layers"] = max(whole_layers)
    parameters = dict(adapter_parameters(model))
    average_gradients(list(parameters.values()))
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and name not in parameters]
    found["whole_matrices"] = [name for name, p in matrices if not isinstance(p, DTensor)]
    locals_ = [p.to_local() if isinstance(p, DTensor) else p for _, p in matrices]
    found["numbers"] = sum(part.numel() for part in locals_)
    together = torch.tensor(loss / tensor_parallel, dtype=torch.float64)
    dist.all_reduce(together)
    whole = open_adapter(load_base(base, device="cpu", dtype=dtype), adapter)
    found["same_tokens"] = tokens == answers(whole)
    wanted = both_steps(whole)
    found["loss"] = abs(float(together) - wanted) / wanted
    found["gradient"] = max(
        float((parameter.grad - parameters[name].grad).abs().max())
        for name, parameter in adapter_parameters(whole)
    )
    if n_shares == 1:
        found |= memory(model, adapter, tensor_parallel)
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    base_, dtype_, store_, layouts_, adapter_ = sys.argv[1:]
    layouts = json.loads(layouts_)
    given = json.loads(adapter_)
    lora = LoraConfig(**given.pop("lora", {}))
    config = AdapterConfig(prompt_length=3, prompt_init_std=1.0, lora=lora, **given)
    of_base, profiled_ = (Path(base_), getattr(torch, dtype_)), len(layouts) == 1
    found_ = [
        compared(*of_base, f"{store_}.{number}", layout, config, profiled=profiled_)
        for number, layout in enumerate(layouts)
    ]
    print(json.dumps(found_))
