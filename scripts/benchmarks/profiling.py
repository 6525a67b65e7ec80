"""What would slow the timed passes: how much memory a forward pass keeps, and how long a GPU waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.methods import Method, Part


def activation_bytes(method: Method, part: Part, device: torch.device) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, without the weights."""
    if device.type == "cuda":
        machine.synchronise(device)
        held = torch.cuda.memory_allocated(device)
        loss = method.loss(part)
        kept = torch.cuda.memory_allocated(device) - held
        del loss
        return kept
    weights = {p.untyped_storage().data_ptr() for p in _all_parameters(method)}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = method.loss(part)
    del loss
    return sum(storages.values())


def _all_parameters(method: Any) -> list[nn.Parameter]:
    return [*method.base.model.parameters(), *method.parameters]


def idle_share(work: Callable[[], Any]) -> float:
    """Return the share of time without a running kernel, between a pass's first and last kernel."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        work()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events = [e for e in on_gpu if not e.is_user_annotation and not e.name.startswith("Optimizer.")]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0])
