"""Compiles the kernels of attention for a GPU that need not be there, and prints what each needs.

    python tests/kernel_targets.py 89    # the compute capability, here of Ada

Each line has a kernel's name and its shared memory in bytes. Triton compiles for any target; only its driver,
which would launch the kernels, wants the device.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from lit_adapter.model.attention import PackedRow
from lit_adapter.model.kernels import attention, decode_attention, entry, prompt_prefix
from lit_adapter.model.prefix import PrefixState
from lit_adapter.model.tiles import HEAD_SIZES, plan_tiles

H, G, T, B = 4, 2, 200, 3
FORMS = [(0, False, False), (10, False, False), (10, True, True), (64, True, True)]
"""Prompt length, strengths by token, unrotated queries."""


class Compiled:
    """In place of an entry: compiles what it is given, and launches nothing."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: Any) -> Any:
        def compile_(*arguments: Any, **options: Any) -> None:
            kernel = self.function.warmup(*arguments, grid=grid, **options)
            print(self.function.__name__, kernel.metadata.shared)

        return compile_


def stand_in(capability: int) -> Any:
    """A driver that knows its device and nothing else."""
    return SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda *_: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_active_torch_device=lambda: torch.device("cpu"),
    )


def compile_attention(D: int, K: int, by_token: bool, unrotated: bool) -> None:
    """Compile forward and backward of one form of the prefix."""
    row = PackedRow(
        ids=torch.zeros(T, dtype=torch.long),
        position=torch.arange(T),
        segment=torch.arange(2).repeat_interleave(T // 2),
        preamble=torch.zeros(T, dtype=torch.long),
        target_index=torch.arange(T),
        target_id=torch.zeros(T, dtype=torch.long),
    )
    plan = plan_tiles(row, None, torch.device("cpu"))
    q, k, v = (torch.zeros(T, heads * D, dtype=torch.bfloat16) for heads in (H, G, G))
    rotation = (torch.zeros(T, D // 2), torch.zeros(T, D // 2))
    strength, kv = torch.zeros(H, K if by_token else D), torch.zeros(K, 2 * G * D, dtype=torch.bfloat16)
    prefix = attention.Prefix(kv, strength, by_token, unrotated) if K else None
    o, lse = attention.attend(q, k, v, rotation, plan, D, prefix)
    into = attention.Gradients(*(torch.zeros_like(x) for x in (q, k, v)))
    below = attention.PrefixGradients(torch.zeros_like(kv), torch.zeros_like(q[:K]), strength) if K else None
    attention.attend_backward(o, q, k, v, rotation, o, lse, plan, D, prefix, into, below)


def own_prefixes(D: int, K: int, by_token: bool, unrotated: bool) -> PrefixState:
    """A layer's prefixes, a row for each slot."""
    kv = torch.zeros(B, G, K, D, dtype=torch.bfloat16)
    return PrefixState(
        k=kv,
        v=kv,
        strength=torch.zeros(B, H, 1, D),
        unrotated=torch.zeros(B, 1, 1, 1, dtype=torch.bool) if unrotated else False,
        by_token=torch.zeros(B, H, K, 1) if by_token else None,
        hidden=torch.zeros(B, 1, K, 1),
    )


def compile_own_prefixes(D: int, K: int, by_token: bool, unrotated: bool) -> None:
    """Compile what adds to each prompt of a row the prefix of its slot."""
    q, prefix = torch.zeros(T, H * D, dtype=torch.bfloat16), own_prefixes(D, K, by_token, unrotated)
    tiles = prompt_prefix.plan([slice(0, T)], [1], torch.device("cpu"))
    rotation = (torch.zeros(T, D // 2), torch.zeros(T, D // 2))
    prompt_prefix.add(q, torch.arange(T, dtype=torch.int32), rotation, prefix, tiles, q)


def compile_queries(D: int, K: int, by_token: bool, unrotated: bool) -> None:
    """Compile attention to the cache, of queries that are alone, in many programs, and in tiles, in few."""
    for n_tiles, size, window in ((256, 1, 7), (2, 8, None)):
        q, slot = torch.zeros(n_tiles * size, H * D, dtype=torch.bfloat16), torch.zeros(n_tiles * size).long()
        cache, prefix = (
            torch.zeros(B, G, 500, D, dtype=torch.bfloat16),
            own_prefixes(D, K, by_token, unrotated),
        )
        rotation = (torch.zeros(500, D // 2), torch.zeros(500, D // 2))
        parts = decode_attention.Parts(n_tiles, size, (H, G), D, 500, q.device)
        some = prefix if K else None
        decode_attention.attend(q, (cache, cache), rotation, slot, some, slot[:B], parts, q, window, slot)


if __name__ == "__main__":
    capability = int(sys.argv[1])
    driver.set_active(stand_in(capability))
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)  # type: ignore[assignment]
    processors = SimpleNamespace(multi_processor_count=132)
    torch.cuda.get_device_properties = lambda device=None: processors  # type: ignore[assignment]
    for module in (attention, prompt_prefix, decode_attention):
        for name, kernel in vars(module).items():
            if isinstance(kernel, entry.Entry):
                setattr(module, name, Compiled(kernel.function))
    for form in FORMS:
        compile_attention(max(HEAD_SIZES), *form)
        compile_queries(max(HEAD_SIZES), *form)
    for form in FORMS[1:]:
        compile_own_prefixes(max(HEAD_SIZES), *form)
