"""What generation does when a kernel turns out not to compile, or when memory runs out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lit_adapter import streams
from lit_adapter.errors import UserError
from lit_adapter.model.executors import KernelError, give_up_kernels
from lit_adapter.model.llama import Llama


def go_on_without_kernels(model: Llama, error: KernelError) -> None:
    """Leave everything from now on to the modules, and say so in one line.

    Raises:
        UserError: the base is sharded, and other processes may be waiting for this one's part of a layer.
    """
    if model.is_sharded:
        raise UserError(f"{error}; one of several processes cannot go on without it") from error
    give_up_kernels(error)
    streams.say(f"warning: {error}; generation goes on without kernels, which is slower", sys.stderr)


@contextmanager
def enough_memory(batch_size: int) -> Iterator[None]:
    """Turn a GPU's allocation that fails into one line that names the setting to lower.

    Raises:
        UserError: in place of torch's own error.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of GPU memory with --batch_size {batch_size}; run again with a smaller one: "
            "finished answers are kept"
        ) from None
