"""Kernels as Python launches them: one that cannot be compiled is reported by name.

Triton compiles a kernel at its first launch with each kind of arguments, which can be in the middle of a run.
"""

from __future__ import annotations

import subprocess
from functools import partial
from typing import Any

import torch
from triton.errors import TritonError

from lit_adapter.model.executors import KernelError

LAUNCHED = "Triton Error [CUDA]"
"""The beginning of the CUDA driver's messages, which are about a kernel that has been compiled."""


class Entry:
    """A compiled function that Python launches as ``entry[grid](...)``, like Triton's own.

    A launch raises `KernelError` where the kernel cannot be compiled for its arguments, or needs more than
    the device has.
    """

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: Any) -> Any:
        """Return what launches the kernel over ``grid``."""
        return partial(self._launch, self.function[grid])

    def _launch(self, launch: Any, *arguments: Any, **options: Any) -> None:
        try:
            launch(*arguments, **options)
        except (TritonError, subprocess.CalledProcessError, OSError) as error:
            raise KernelError(self.function.__name__, error) from error
        except RuntimeError as error:  # of MLIR's passes, or of a missing C compiler
            if isinstance(error, torch.OutOfMemoryError) or str(error).startswith(LAUNCHED):
                raise
            raise KernelError(self.function.__name__, error) from error
