"""The machine: names and versions, and the measured rates of its matrix products and copies."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from lit_adapter.device import device_name

PACKAGES = ("torch", "transformers", "peft", "liger-kernel", "triton", "lightning")


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that are compared or used."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return how long ``work`` takes, including its work on the device."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def matmul_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """Return the best measured FLOP/s of a square matrix product, and its size."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    b = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    times = 10 if device.type == "cuda" else 2

    def work() -> None:
        for _ in range(times):
            a @ b

    work()
    return max(2 * size**3 * times / seconds(work, device) for _ in range(5)), size


def copy_rate(device: torch.device) -> float:
    """Return the best measured bandwidth of a copy in bytes/s, counting reads and writes."""
    n_bytes = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return max(2 * n_bytes / seconds(lambda: target.copy_(source), device) for _ in range(5))


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the header of a report."""
    rate, size = matmul_rate(device, dtype)
    found = {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_flops_per_s": rate,
        "matmul_size": size,
        "copy_bytes_per_s": copy_rate(device),
        "versions": versions(),
    }
    release()
    return found


def release() -> None:
    """Return unused memory to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compilations() -> int:
    """Return how many graphs torch.compile has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
