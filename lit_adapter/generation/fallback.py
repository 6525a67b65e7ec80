"""What generation does when a kernel turns out not to compile: the modules compute the rest."""

from __future__ import annotations

import sys

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
