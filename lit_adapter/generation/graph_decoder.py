"""Decoding on CUDA: a whole step is one captured graph, and the device runs ahead of whoever reads.

Tokens, positions and everything a step needs stay on the device. While the host hands on the tokens of
one step, the device computes the next; what it computed for a text that had ended is thrown away. To
capture a step takes no longer than to launch its kernels once, so that no answer is too short for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_adapter.generation.decoder import Decoder, Slot
from lit_adapter.generation.sampling import choose
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.cache import DecodeView, KeyValueCache
from lit_adapter.model.llama import Llama

if TYPE_CHECKING:
    from lit_adapter.model.fused_decode import FusedDecode

LONG = 4 * 10**12
"""Tokens of prompts times weights that take the device longer than the host needs to capture a step."""
LEAST_USED = 256
"""Shortest cache that a graph of the module path attends to; longer ones are its doubles."""


class GraphDecoder(Decoder):
    """A `Decoder` whose steps are captured and run ahead; the arguments are the same."""

    def __init__(self, model: Llama, n_slots: int, length: int, settings: Sampling) -> None:
        super().__init__(model, n_slots, length, settings)
        self.refill = max(1, n_slots // 4)  # a prompt takes the time of several steps, many hardly more
        new = self.numbers.new_zeros
        self.token = new(n_slots, dtype=torch.long)
        self.place = new(2, n_slots, dtype=torch.long)  # of the newest token: in its text, in its answer
        self.position, self.drawn = self.place
        self.last_place = self.place.new_tensor([[length - 1], [settings.max_new_tokens - 1]])
        self.chosen = new(n_slots, dtype=torch.long)
        self.fused = fused_decoder(model, self.cache)
        self.landings = [Landing(n_slots), Landing(n_slots)]
        self.graphs: dict[int, Callable[[], None]] = {}
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

    def _read(self, prompts: Sequence[Sequence[int]], slots: Tensor) -> Tensor:
        if self.fused is None:
            return super()._read(prompts, slots)
        hidden = self.fused.read(prompts, slots.tolist())
        n_weights = sum(parameter.numel() for parameter in self.model.parameters())
        if sum(map(len, prompts)) * n_weights >= LONG and self.settings.max_new_tokens > 1:
            self._graph(self._looked_at(1))
        return hidden

    def step(self, slots: list[Slot | None]) -> list[int]:
        """Return the slots that have a new token, and start the step after it."""
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
        self._graph(self._looked_at(max(slot.length for slot in slots if slot) + 1))()
        for slot in slots:
            if slot:
                slot.length += 1
                slot.under_way += 1
        self.landings.reverse()
        self.landings[0].send(self.chosen)
        return _Ahead(list(slots), self.landings[0])

    def _graph(self, used: int) -> Callable[[], None]:
        """Return the step that attends to ``used`` of the cache, captured the first time."""
        if used not in self.graphs:
            self.graphs[used] = capture(lambda: self._advance(used))
        return self.graphs[used]

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
        logits = self._logits(used)
        if self.fused is not None and self.settings.greedy and self.seen is None:
            from lit_adapter.model.kernels import greedy  # needs Triton, see `fused_decoder`

            greedy.advance(logits, self.chosen, self.token, self.place, self.last_place)
            return
        token = choose(logits, self.settings, self.numbers[self.drawn], self.seen)
        self.chosen.copy_(token)
        torch.clamp(token, min=0, out=self.token)
        if self.seen is not None:
            self.seen.scatter_(1, self.token[:, None], True)
        # Slots whose text has ended go on counting until they are refilled; within their room.
        torch.minimum(self.place + 1, self.last_place, out=self.place)

    def _logits(self, used: int) -> Tensor:
        if self.fused is not None:
            return self.fused.step(self.token, self.position)
        position = self.position[:, None]
        view = DecodeView(self.cache, self.model.rotation(position), position, used, exact=False)
        return self.model.logits(self.model(self.token[:, None], view)[:, 0])


def fused_decoder(model: Llama, cache: KeyValueCache) -> FusedDecode | None:
    """Return what decodes the model with kernels of its own, if they compute it."""
    from lit_adapter.model import fused_decode  # needs Triton, which comes with CUDA builds of torch

    return fused_decode.decoder_for(model, cache)


def capture(body: Callable[[], None]) -> Callable[[], None]:
    """Record what ``body`` launches, without running it, and return what runs it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        # Not `torch.cuda.graph`, which first gives all unused memory back to the driver. Relaxed: kernels
        # that this is the first to use are loaded meanwhile.
        graph.capture_begin(capture_error_mode="relaxed")
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
