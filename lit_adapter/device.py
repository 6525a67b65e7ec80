"""Which device and precision to use when the user leaves the choice to us."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from lit_adapter.errors import UserError

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """Return the named device, or CUDA's current device, or the CPU.

    Kernels and graphs go to CUDA's current device, so that no other can be named.

    Raises:
        UserError: a device that is not there.
    """
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = str(name)
    if name not in ("cpu", "cuda", "gpu", "cuda:0"):
        hint = "; to use another GPU set CUDA_VISIBLE_DEVICES" if name.startswith("cuda:") else ""
        raise UserError(f"device is {name!r}; expected auto, cpu or cuda{hint}")
    device = torch.device("cpu" if name == "cpu" else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name!r}, but this machine has no CUDA device; use cpu")
    return device


def own_device(device: torch.device) -> torch.device:
    """Return where this process of a run computes: each process of a node has its own GPU.

    Lightning and torchrun number them in LOCAL_RANK, SLURM in SLURM_LOCALID.
    """
    if device.type != "cuda":
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0))


def choose_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the named precision; by default bf16 where the device multiplies it faster, else fp32.

    Raises:
        UserError: an unknown name.
    """
    if isinstance(name, torch.dtype):
        return name
    if name in (None, "auto"):
        return torch.bfloat16 if _bf16_pays(device) else torch.float32
    if name not in DTYPES:
        raise UserError(f"dtype is {name!r}; expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _bf16_pays(device: torch.device) -> bool:
    """Measure it: processors without bf16 instructions are far slower with it than with fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would be timed waiting for each other where other work runs too
    try:
        return _product_seconds(torch.bfloat16) < _product_seconds(torch.float32)
    finally:
        torch.set_num_threads(n_threads)


def _product_seconds(dtype: torch.dtype) -> float:
    """Return the best of five timings of a small matrix product, in this thread's own processor time."""
    a, b = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.thread_time()
        torch.nn.functional.linear(a, b)
        best = min(best, time.thread_time() - start)
    return best


def free_bytes(device: torch.device, meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Return the memory that can still be had: of a GPU, or of this machine or container.

    What the process holds already is not in it. None where the system does not say.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    machine = _keyed(meminfo).get("MemAvailable:")
    if machine is None:
        return None
    left = [_group_bytes(cgroup, *names) for names in _CGROUP_FILES]
    return min([machine * 1024, *(bytes_ for bytes_ in left if bytes_ is not None)])


_CGROUP_FILES = (  # of the two versions of control groups: limit, use, and which of it the kernel may drop
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def _group_bytes(cgroup: Path, limit: str, used: str, statistics: str, dropped: str) -> int | None:
    """Return what a container may still take, or None without a limit."""
    try:
        left = int((cgroup / limit).read_text()) - int((cgroup / used).read_text())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return None
    return left + _keyed(cgroup / statistics).get(dropped, 0)


def _keyed(path: Path) -> dict[str, int]:
    """Read the first number after each name of a file that the kernel writes."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
