"""A lane on CUDA: a whole step is one captured graph, and the device runs ahead of whoever reads.

Tokens, positions and everything else that a step needs stay on the device. While the host hands on the
tokens of one step, the device computes the next; what it computes for a request that had ended is discarded.
Capturing a step takes no longer than launching its kernels once, so that no answer is too short for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_adapter.generation.lane import Lane, enlarged
from lit_adapter.generation.request import Request
from lit_adapter.generation.sampling import Choice, choose
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.cache import Prefixes
from lit_adapter.model.llama import Llama

LONG = 4 * 10**12
"""Prompt tokens times weights that keep the device busy for longer than the host needs to capture a step."""
LEAST_USED = 256
"""Fewest keys that a graph of the modules attends to; larger numbers are its doubles."""


class _Kind(NamedTuple):
    """What distinguishes one captured step from another."""

    used: int  # keys that it attends to
    sampled: bool  # whether a request draws random numbers
    penalised: bool  # whether a request has a repetition penalty


class GraphLane(Lane):
    """A `Lane` whose steps are captured and run ahead; the arguments are the same."""

    def __init__(self, model: Llama) -> None:
        super().__init__(model)
        self.has_kernels = self.executor_name == "CUDA decoding"  # each reads as many keys as its slot has
        new = torch.zeros
        self.token = new(0, dtype=torch.long, device=self.device)
        self.chosen = self.token
        self.place = new(2, 0, dtype=torch.long, device=self.device)
        """Of the newest tokens, in their texts and in their answers."""
        self.numbers = new(0, 0, device=self.device)
        """The random numbers of every slot's answer."""
        self.graphs: dict[_Kind, Callable[[], None]] = {}
        self.prefixes: Prefixes | None = None  # those that the graphs read
        self.ahead: tuple[list[tuple[int, Request]], Landing] | None = None
        """The step that the device takes while the host hands on the tokens of the step before."""

    def _grow(self, n_slots: int, length: int) -> None:
        super()._grow(n_slots, length)
        self.graphs.clear()
        self.token, self.chosen = enlarged(self.token, n_slots), enlarged(self.chosen, n_slots)
        self.place = enlarged(self.place, 2, n_slots)
        self.last_place = torch.full((2, 1), length - 1, device=self.device)
        self.numbers = enlarged(self.numbers, n_slots, length)
        self.landings = [Landing(n_slots), Landing(n_slots)]
        settings = [request.settings for request in self.slots]
        settings += [Sampling()] * (n_slots - len(settings))
        self.choice = Choice.of(settings, self.device)

    def _prepare(self, slots: Sequence[int]) -> None:
        """Give the device what its steps need to know of the new requests, before it is busy with them."""
        super()._prepare(slots)
        requests = [self.slots[slot] for slot in slots]
        where = torch.tensor(slots, device=self.device)
        self.choice.put(where, Choice.of([request.settings for request in requests], self.device))
        for slot, request in zip(slots, requests, strict=True):
            if not request.settings.greedy:
                self.numbers[slot, : len(request.numbers)] = request.numbers.to(self.device)

    def _choose(self, logits: Tensor, slots: Sequence[int]) -> None:
        """Choose the first tokens of new requests, from which their steps go on."""
        new = [self.slots[slot] for slot in slots]
        n_weights = sum(parameter.numel() for parameter in self.model.parameters())
        n_tokens = sum(len(request.prompt) for request in new)
        if n_tokens * n_weights >= LONG and any(request.settings.max_new_tokens > 1 for request in new):
            self._graph()  # captures the next step while the device still reads the prompts
        super()._choose(logits, slots)
        where = torch.tensor(slots, device=self.device)
        state = [(request.token, request.length, 1) for request in new]
        token, position, drawn = torch.tensor(state, device=self.device).T
        self.token[where], self.place[0, where], self.place[1, where] = token, position, drawn

    def _step(self) -> None:
        """Hand on the tokens of one step, and start the step after it."""
        if not self.live:
            return
        requests, landing = self.ahead or self._launch()
        read = {request for _, request in requests}  # each of them has one token that was not handed on yet
        wanted = any(r.n_new + (r in read) < r.settings.max_new_tokens for r in self.live)
        self.ahead = self._launch() if wanted else None
        tokens = landing.wait()
        for slot, request in requests:
            if self.slots[slot] is request:  # otherwise a new request has taken its place
                request.receive(tokens[slot])

    def _launch(self) -> tuple[list[tuple[int, Request]], Landing]:
        """Start one step of all slots, and return its requests and where its tokens will arrive."""
        self._graph()()
        live = [(slot, request) for slot, request in enumerate(self.slots) if not request.ended]
        for _, request in live:
            request.length += 1
        self.landings.reverse()
        self.landings[0].send(self.chosen)
        return live, self.landings[0]

    def _graph(self) -> Callable[[], None]:
        """Return the step that the live requests need, captured the first time."""
        live = self.live
        if self.prefixes is not self.executor.prefixes.joined:
            self.graphs.clear()
            self.prefixes = self.executor.prefixes.joined
        kind = _Kind(
            self._used(max((request.length for request in live), default=0) + 1),
            sampled=not all(request.settings.greedy for request in live),
            penalised=any(request.settings.penalised for request in live),
        )
        if kind not in self.graphs:
            self.graphs[kind] = capture(lambda: self._advance(kind))
        return self.graphs[kind]

    def _used(self, needed: int) -> int:
        """Return how many keys a graph attends to, of which ``needed`` are there."""
        if self.has_kernels:
            return self.executor.cache.length
        size = LEAST_USED
        while size < needed:
            size *= 2
        return min(size, self.executor.cache.length)

    def _advance(self, kind: _Kind) -> None:
        """Take one step on the device: from ``token`` at ``place`` to ``chosen``, the next ``token``."""
        logits = self.executor.captured_step(self.token, self.place[0], kind.used)
        if self.has_kernels and not (kind.sampled or kind.penalised):
            from lit_adapter.model.kernels import greedy  # needs Triton, see `Lane.executor_class`

            greedy.advance(logits, self.chosen, self.token, self.place, self.last_place)
            return
        uniform = self.numbers.gather(1, self.place[1:].T)[:, 0] if kind.sampled else None
        seen = self.seen if kind.penalised else None
        token = choose(logits, self.choice, uniform, seen)
        self.chosen.copy_(token)
        torch.clamp(token, min=0, out=self.token)
        if seen is not None:
            seen.scatter_(1, self.token[:, None], True)
        # Slots without a request go on counting, within their room, until they are filled.
        torch.minimum(self.place + 1, self.last_place, out=self.place)


def capture(body: Callable[[], None]) -> Callable[[], None]:
    """Record what ``body`` launches, without running it, and return what runs it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        # Not `torch.cuda.graph`, which first gives all unused memory back to the driver. Relaxed: kernels
        # used here for the first time are loaded meanwhile.
        graph.capture_begin(capture_error_mode="relaxed")
        try:
            body()
        finally:
            graph.capture_end()
    return graph.replay


class Landing:
    """Host memory for the tokens ``[B]`` of one step."""

    def __init__(self, n_slots: int) -> None:
        self.tokens = torch.empty(n_slots, dtype=torch.long, pin_memory=True)
        self.landed = torch.cuda.Event()

    def send(self, tokens: Tensor) -> None:
        """Start the copy, after the work that makes the tokens."""
        self.tokens.copy_(tokens, non_blocking=True)
        self.landed.record()

    def wait(self) -> list[int]:
        """Return the tokens as soon as they have arrived."""
        self.landed.synchronize()
        return self.tokens.tolist()
