"""CUDA graphs: what is launched once and replayed, without the host's work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch


def capture(body: Callable[[], None]) -> Callable[[], None]:
    """Record what ``body`` launches, without running it, and return what runs it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        # Not `torch.cuda.graph`, which first gives all unused memory back to the driver. Relaxed: kernels
        # used here for the first time are loaded meanwhile.
        graph.capture_begin(capture_error_mode="relaxed")
        try:
            body()
        except BaseException:
            with suppress(RuntimeError):  # what went wrong may have ended the capture
                graph.capture_end()
            raise
        graph.capture_end()
    return graph.replay
