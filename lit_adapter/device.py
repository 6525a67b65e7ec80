"""The choice of device and precision, and the memory that is free."""

from __future__ import annotations

import os
import platform
import resource
import time
import timeit
from functools import partial
from pathlib import Path

import torch

from lit_adapter.errors import UserError, counted

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """Return the named device, or CUDA's current device, or the CPU.

    Kernels and graphs run on CUDA's current device, so no other can be named.

    Raises:
        UserError: the device is unknown or not available.
    """
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = str(name)
    if name not in ("cpu", "cuda", "gpu", "cuda:0"):
        hint = "; to use another GPU set CUDA_VISIBLE_DEVICES" if name.startswith("cuda:") else ""
        raise UserError(f"device is {name!r}; expected auto, cpu or cuda{hint}")
    device = torch.device("cpu" if name == "cpu" else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device is {name!r}, but this machine has no CUDA device; expected cpu, or cuda where one is"
        )
    return device


def own_device(device: torch.device) -> torch.device:
    """Return this process's own device: each process of a node has its own GPU.

    Lightning and torchrun number a node's processes in LOCAL_RANK, SLURM in SLURM_LOCALID.
    """
    if device.type != "cuda":
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0))


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this process, on its GPU or in the machine."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux: only the architecture is known
    return f"{name}, {counted(torch.get_num_threads(), 'thread')} of {counted(os.cpu_count() or 1, 'core')}"


def choose_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the named precision; by default bf16 if the device multiplies it faster than fp32.

    Raises:
        UserError: it is not a precision in which a base can be loaded.
    """
    if name in (None, "auto"):
        return torch.bfloat16 if _bf16_pays(device) else torch.float32
    chosen = name if isinstance(name, torch.dtype) else DTYPES.get(name)
    if chosen is None or chosen not in DTYPES.values():
        raise UserError(f"dtype is {name!r}; expected auto, {', '.join(DTYPES)}")
    return chosen


def _bf16_pays(device: torch.device) -> bool:
    """Measure whether bf16 is faster than fp32; it is far slower on a processor without bf16 instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several threads would wait for each other
    try:
        return _product_seconds(torch.bfloat16) < _product_seconds(torch.float32)
    finally:
        torch.set_num_threads(n_threads)


def _product_seconds(dtype: torch.dtype) -> float:
    """Return the best of five timings of a small matrix product, in this thread's CPU time."""
    a, b = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    product = partial(torch.nn.functional.linear, a, b)
    return min(timeit.repeat(product, timer=time.thread_time, repeat=5, number=1))


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a GPU, or of this machine or container; None where it is unknown.

    Memory that this process has in use is not free; memory in CUDA's cache is.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    machine = _keyed(MEMINFO).get("MemAvailable:")
    if machine is None:
        return None
    v2 = CGROUP, "memory.max", "memory.current", "inactive_file"
    v1 = CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    left = [_group_bytes(*names) for names in (v2, v1)]
    return min([machine * 1024, *(bytes_ for bytes_ in left if bytes_ is not None)])


def _group_bytes(folder: Path, limit: str, used: str, dropped: str) -> int | None:
    """Return the bytes that a container may still allocate, by control groups; None without a limit."""
    try:
        left = int((folder / limit).read_text()) - int((folder / used).read_text())
    except (OSError, ValueError):  # not in a container, or no limit ("max")
        return None
    return left + _keyed(folder / "memory.stat").get(dropped, 0)


def _keyed(path: Path) -> dict[str, int]:
    """Return the number after each name in one of the kernel's files."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
