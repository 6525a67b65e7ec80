"""Decoding on CUDA: a whole step is one captured graph, and the device runs ahead of whoever reads.

Tokens, positions and everything a step needs stay on the device. While the host hands on the tokens of
one step, the device computes the next; what it computed for a text that had ended is thrown away. The
first step runs as it is, which loads its kernels, and is all that the shortest answers need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_adapter.generation.decoder import Decoder, Slot
from lit_adapter.generation.sampling import choose
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.cache import DecodeView
from lit_adapter.model.fused_step import FusedStep, fusible
from lit_adapter.model.llama import Llama

LEAST_USED = 256
"""Shortest cache that a graph of the module path attends to; longer ones are its doubles."""


class GraphDecoder(Decoder):
    """A `Decoder` whose steps are captured and run ahead; the arguments are the same."""

    def __init__(self, model: Llama, n_slots: int, length: int, settings: Sampling) -> None:
        super().__init__(model, n_slots, length, settings)
        self.refill = max(1, n_slots // 4)  # a prompt takes the time of several steps, many hardly more
        new = self.numbers.new_zeros
        self.token, self.position, self.drawn = (new(n_slots, dtype=torch.long) for _ in range(3))
        self.chosen = new(n_slots, dtype=torch.long)
        self.rows = torch.arange(n_slots, device=self.device)
        self.fused: FusedStep | None = None
        self.landings: list[Landing] = []
        self.graphs: dict[int, Callable[[], None]] = {}
        self.loaded = False
        self.ahead: _Ahead | None = None

    def prefill(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], slots: Sequence[int]
    ) -> list[Slot]:
        """Read prompts into free slots and choose the first token of each."""
        new = super().prefill(prompts, numbers, slots)
        state = torch.tensor([[slot.token, slot.length] for slot in new], device=self.device)
        where = torch.tensor(slots, device=self.device)
        self.token[where], self.position[where] = state.unbind(1)
        self.drawn[where] = 1
        return new

    def step(self, slots: list[Slot | None]) -> list[int]:
        """Return the slots that have a new token, and start the step after it."""
        if not self.landings:  # not before the first token is out: Triton alone takes long to import
            self.fused = FusedStep(self.model, self.cache) if fusible(self.model) else None
            self.landings = [Landing(self.cache.n_slots), Landing(self.cache.n_slots)]
        read = self.ahead or self._launch(slots)
        limit = self.settings.max_new_tokens
        wanted = any(slot.n_new + slot.under_way < limit for slot in slots if slot)
        self.ahead = self._launch(slots) if wanted else None
        tokens = read.landing.wait()
        changed = []
        for index, slot in enumerate(read.slots):
            if slot is not None and slots[index] is slot:  # else its text ended, or a new one took its place
                slot.under_way -= 1
                slot.receive(tokens[index])
                changed.append(index)
        return changed

    def _launch(self, slots: list[Slot | None]) -> _Ahead:
        """Start one step of all slots and the way of its tokens to the host."""
        used = self._looked_at(max(slot.length for slot in slots if slot) + 1)
        if used in self.graphs:
            self.graphs[used]()
        elif not self.loaded:
            self._advance(used)
            self.loaded = True
        else:
            self.graphs[used] = capture(lambda: self._advance(used))
            self.graphs[used]()
        for slot in slots:
            if slot:
                slot.length += 1
                slot.under_way += 1
        self.landings.reverse()
        self.landings[0].send(self.chosen)
        return _Ahead(list(slots), self.landings[0])

    def _looked_at(self, used: int) -> int:
        """Return how much of the cache a graph looks at: fused kernels read each text's own length."""
        if self.fused is not None:
            return self.cache.length
        size = LEAST_USED
        while size < used:
            size *= 2
        return min(size, self.cache.length)

    def _advance(self, used: int) -> None:
        """Do one step on the device: from ``token`` at ``position`` to ``chosen``, the next ``token``."""
        uniform = self.numbers[self.drawn]
        token = choose(self._logits(used), self.settings, uniform, self.seen)
        self.chosen.copy_(token)
        self.token.copy_(token.clamp(min=0))
        if self.seen is not None:
            self.seen[self.rows, self.token] = True
        # Slots whose text has ended go on counting until they are refilled; within their room.
        self.position.add_(1).clamp_(max=self.cache.length - 1)
        self.drawn.add_(1).clamp_(max=len(self.numbers) - 1)

    def _logits(self, used: int) -> Tensor:
        if self.fused is not None:
            return self.fused(self.token, self.position)
        position = self.position[:, None]
        view = DecodeView(self.cache, self.model.rotation(position), position, used, exact=False)
        return self.model.head(self.model(self.token[:, None], view)[:, 0])


def capture(body: Callable[[], None]) -> Callable[[], None]:
    """Record what ``body`` launches, without running it, and return what runs it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        # Not `torch.cuda.graph`, which first gives all unused memory back to the driver.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            body()
        finally:
            graph.capture_end()
    return graph.replay


class Landing:
    """Host memory for the tokens of one step.

    Args:
        n_slots: how many.
    """

    def __init__(self, n_slots: int) -> None:
        self.tokens = torch.empty(n_slots, dtype=torch.long, pin_memory=True)
        self.landed = torch.cuda.Event()

    def send(self, tokens: Tensor) -> None:
        """Start the copy, behind the work that makes the tokens."""
        self.tokens.copy_(tokens, non_blocking=True)
        self.landed.record()

    def wait(self) -> list[int]:
        """Return the tokens as soon as they are there."""
        self.landed.synchronize()
        return self.tokens.tolist()


@dataclass
class _Ahead:
    """A step that the device does while the host hands on the tokens before it."""

    slots: list[Slot | None]
    landing: Landing
