"""One of two processes that share a base by FSDP2: compares with the whole base, and measures memory.

    RANK=0 WORLD_SIZE=2 python tests/sharded_process.py BASE DTYPE STORE

Prints one JSON object: the largest differences from the whole base (loss, gradients, next tokens), the bytes
of memory of its own that reading took and left, and how many layers were whole at once while computing.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from random_records import encoded
from tiny_models import open_adapter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lit_adapter.data.packing import Packer, share_of_step
from lit_adapter.generation.decode import decode
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.adapter import adapter_parameters
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.llama import Llama
from lit_adapter.model.loss import row_loss
from lit_adapter.training.sharding import read_part, shard_base
from lit_adapter.training.strategy import average_gradients
from lit_adapter.weights.load import empty_base, fill_base, load_base

ADAPTER = AdapterConfig(prompt_length=3, layers=2, prompt_init_std=1.0)
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


def losses(model: Llama, rank: int, n_processes: int) -> float:
    """A step of one record: of two processes, one has an empty row."""
    packer = Packer(encoded(3, 1), {}, mask_prompt=True, row_tokens=200)
    batch = share_of_step(packer, np.arange(1), 0, rank, n_processes)
    total = 0.0
    for row in batch.rows:
        loss = row_loss(model, row)
        (loss * n_processes / batch.n_targets).backward()
        total += float(loss.detach())
    return total


def answers(model: Llama) -> list[tuple[int, int | None]]:
    return list(decode(model, PROMPTS, Sampling.of(max_new_tokens=6), frozenset(), batch_size=2))


def main(base: Path, dtype: torch.dtype, store: str) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = open_adapter(empty_base(base, dtype=dtype), ADAPTER)
    shard_base(model, init_device_mesh("cpu", (2,)))
    found: dict[str, Any] = {}
    with Peak() as peak:
        fill_base(model, base, device="cpu", dtype=dtype, read=read_part)
        found["held"] = peak.now() - peak.start
    found["peak"] = peak.most - peak.start
    whole_layers = count_whole_layers(model)
    losses(model, rank, 2)
    tokens = answers(model)
    model.zero_grad()
    loss = losses(model, rank, 2)  # training goes on after answers
    found["whole_layers"] = max(whole_layers)
    parameters = dict(adapter_parameters(model))
    average_gradients(list(parameters.values()))
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and name not in parameters]
    found["whole_matrices"] = [name for name, p in matrices if not isinstance(p, DTensor)]
    together = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(together)
    whole = open_adapter(load_base(base, device="cpu", dtype=dtype), ADAPTER)
    found["same_tokens"] = tokens == answers(whole)
    found["loss"] = abs(float(together) - losses(whole, 0, 1))
    found["gradient"] = max(
        float((parameter.grad - parameters[name].grad).abs().max())
        for name, parameter in adapter_parameters(whole)
    )
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3])))
