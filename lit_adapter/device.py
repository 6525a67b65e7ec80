"""Which device and precision to use when the user leaves the choice to us."""

from __future__ import annotations

import time

import torch

from lit_adapter.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str | None = None) -> torch.device:
    """Return the named device, or the first CUDA device, or the CPU.

    Raises:
        UserError: a device that is not there.
    """
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda" if name == "gpu" else str(name))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise UserError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    return device


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
