"""A lane on CUDA: a whole step is one captured graph, and the device runs ahead of whoever reads.

Tokens, positions and everything else that a step needs stay on the device. While the host passes on the
tokens of one step, the device computes the next; what it computes for a request that has ended is discarded.
Capturing a step takes no longer than launching its kernels once, so no answer is too short for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_adapter.generation.lane import Lane, enlarged
from lit_adapter.generation.request import Request
from lit_adapter.generation.sampling import MOST_LIKELY, Choice, choose, likelihoods
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.executors import KernelError
from lit_adapter.model.graphs import capture
from lit_adapter.model.kernels.sizes import power_of_two
from lit_adapter.model.llama import Llama
from lit_adapter.model.slot_prefixes import Prefixes

LONG = 4 * 10**12
"""Prompt tokens times weights that keep the device busy for longer than the host needs to capture a step."""
LEAST_USED = 256
"""Fewest keys that a graph of the modules attends to; larger numbers double it."""
PATIENCE = 64
"""Steps in a row that could compute fewer slots, before they do: a capture costs what these would save."""


class _Kind(NamedTuple):
    """What distinguishes one captured step from another."""

    rows: int  # slots that it computes, from the first on
    used: int  # keys that it attends to
    sampled: bool  # whether a request draws random numbers
    truncates: bool  # whether one of them leaves out the less likely tokens
    adjusted: bool  # whether a request has a penalty or a bias
    scored: bool  # whether a request asks for likelihoods


class GraphLane(Lane):
    """A `Lane` whose steps are captured and run ahead; the arguments are the same."""

    def __init__(self, model: Llama) -> None:
        super().__init__(model)
        self.n_weights = sum(parameter.numel() for parameter in model.parameters())
        new = torch.zeros
        self.token = new(0, dtype=torch.long, device=self.device)
        self.chosen = self.token
        self.place = new(2, 0, dtype=torch.long, device=self.device)
        """The positions of the newest tokens, in their texts and in their answers. A slot without a live
        request is parked: both are the last place, which holds no token of any text."""
        self.unparked: set[int] = set()
        self.rows = 0  # slots that steps compute
        self.too_many = 0  # steps in a row for which fewer would do
        self.keys = new(0, 0, dtype=torch.long, device=self.device)
        """The random keys of every slot's answer."""
        self.graphs: dict[_Kind, Callable[[], None]] = {}
        self.prefixes: Prefixes | None = None  # those that the graphs read
        self.ahead: tuple[list[tuple[int, Request]], Landing] | None = None
        """The step that the device takes while the host passes on the tokens of the step before."""

    @property
    def has_kernels(self) -> bool:
        """Whether kernels take the steps: each reads as many keys as its slot has."""
        return self.executor_name == "CUDA decoding"

    def _go_on_with_modules(self, error: KernelError) -> None:
        """Do the same; a step that the device has begun completes, and its tokens are still passed on."""
        super()._go_on_with_modules(error)
        self.graphs.clear()

    def _grow(self, n_slots: int, length: int) -> None:
        super()._grow(n_slots, length)
        self.graphs.clear()
        self.token, self.chosen = enlarged(self.token, n_slots), enlarged(self.chosen, n_slots)
        self.last_place = torch.full((2, 1), length - 1, device=self.device)
        place, kept = self.last_place.repeat(1, n_slots), sorted(self.unparked)
        place[:, kept] = self.place[:, kept]
        self.place = place
        self.keys = enlarged(self.keys, n_slots, length)
        width = 1 + 2 * min(MOST_LIKELY, self.model.config.vocab_size)
        self.scores = torch.zeros(n_slots, width, dtype=torch.double, device=self.device)
        self.landings = [Landing(n_slots, width), Landing(n_slots, width)]
        settings = [request.settings for request in self.slots]
        settings += [Sampling()] * (n_slots - len(settings))
        self.choice = Choice.of(settings, self.device)

    def _prepare(self, slots: Sequence[int]) -> None:
        """Give the device what its steps need to know of the new requests, before it is busy with them."""
        super()._prepare(slots)
        requests = [self.slots[slot] for slot in slots]
        where = torch.tensor(slots, device=self.device)
        self._park(slots)  # until their prompts are read
        self.choice.put(where, Choice.of([request.settings for request in requests], self.device))
        for slot, request in zip(slots, requests, strict=True):
            if not request.settings.greedy:
                self.keys[slot, : len(request.keys)] = request.keys.to(self.device)

    def _choose(self, logits: Tensor, slots: Sequence[int]) -> None:
        """Choose the first tokens of new requests, from which their steps continue."""
        new = [self.slots[slot] for slot in slots]
        n_tokens = sum(len(request.prompt) for request in new)
        if n_tokens * self.n_weights >= LONG and any(request.settings.max_new_tokens > 1 for request in new):
            # Captures the next step while the device still reads the prompts.
            self._graph(max(self.rows, self._size(len(self.live))))
        super()._choose(logits, slots)
        where = torch.tensor(slots, device=self.device)
        state = [(request.token, request.length, 1) for request in new]
        token, position, drawn = torch.tensor(state, device=self.device).T
        self.token[where], self.place[0, where], self.place[1, where] = token, position, drawn
        self.unparked |= set(slots)

    def _park(self, slots: Sequence[int]) -> None:
        """Move slots to the last place, where a step overwrites nothing that is needed."""
        for slot in slots:
            self.place[:, slot : slot + 1] = self.last_place
        self.unparked -= set(slots)

    def _swap_state(self, one: int, other: int) -> None:
        super()._swap_state(one, other)
        pair, swapped = [one, other], [other, one]
        for own in (self.token, self.keys):
            own[pair] = own[swapped]
        self.place[:, pair] = self.place[:, swapped]
        self.choice.put(pair, self.choice.of_rows(swapped))
        self.unparked = {dict(zip(pair, swapped, strict=True)).get(slot, slot) for slot in self.unparked}

    def _step(self) -> None:
        """Pass on the tokens of one step, and start the step after it."""
        if not self.live:
            return
        self.ahead = self.ahead or self._launch()
        requests, landing = self.ahead
        read = {request for _, request in requests}  # each has one token that was not passed on yet
        wanted = any(r.n_new + (r in read) < r.settings.max_new_tokens for r in self.live)
        self.ahead = self._launch() if wanted else None
        if self.ahead is None:
            self.rows = 0  # the next requests choose it again
        tokens, scores = landing.wait()
        for slot, request in requests:
            self._receive(request, tokens[slot], scores[slot] if scores else None)

    def _launch(self) -> tuple[list[tuple[int, Request]], Landing]:
        """Start one step of all live requests, and return them and where their tokens will arrive."""
        live = self._live_slots()
        self._resize(len(live))
        if any(slot >= self.rows for slot, _ in live):
            self._first_slots()
            live = self._live_slots()
        self._park(sorted(self.unparked - {slot for slot, _ in live}))
        self._graph(self.rows)()
        for _, request in live:  # the last place is that of parked slots
            request.length = min(request.length + 1, self.executor.cache.length - 1)
        self.landings.reverse()
        scored = any(request.most_likely is not None for _, request in live)
        self.landings[0].send(self.chosen, self.scores if scored else None)
        return live, self.landings[0]

    def _size(self, n: int) -> int:
        """Return how many slots steps compute for ``n`` requests: each number is a graph of its own."""
        return min(power_of_two(n), self.executor.cache.n_slots)

    def _resize(self, n: int) -> None:
        """Let the next steps compute the slots of ``n`` requests."""
        size = self._size(n)
        self.too_many = self.too_many + 1 if size < self.rows else 0
        if size > self.rows or self.too_many > PATIENCE:
            self.rows, self.too_many = size, 0

    def _graph(self, rows: int) -> Callable[[], None]:
        """Return a step of the first ``rows`` slots as the live requests need it, captured the first time."""
        live = self.live
        if self.prefixes is not self.executor.prefixes.joined:
            self.graphs.clear()
            self.prefixes = self.executor.prefixes.joined
        kind = _Kind(
            rows,
            self._used(max((request.length for request in live), default=0) + 1),
            sampled=not all(request.settings.greedy for request in live),
            truncates=any(request.settings.truncates for request in live),
            adjusted=any(request.adjusted for request in live),
            scored=any(request.most_likely is not None for request in live),
        )
        if kind not in self.graphs:
            self.executor.prepare(rows)
            self.graphs[kind] = capture(lambda: self._advance(kind))
        return self.graphs[kind]

    def _used(self, needed: int) -> int:
        """Return how many keys a graph attends to, given that ``needed`` are in use."""
        if self.has_kernels:
            return self.executor.cache.length
        size = LEAST_USED
        while size < needed:
            size *= 2
        return min(size, self.executor.cache.length)

    def _advance(self, kind: _Kind) -> None:
        """Take one step on the device: from ``token`` at ``place`` to ``chosen``, the next ``token``."""
        rows = slice(kind.rows)
        token, chosen, place = self.token[rows], self.chosen[rows], self.place[:, rows]
        logits = self.executor.captured_step(token, place[0], kind.used)
        if self.has_kernels and not (kind.sampled or kind.adjusted or kind.scored):
            from lit_adapter.model.kernels import greedy  # needs Triton, see `Lane.executor_class`

            greedy.advance(logits, chosen, token, place, self.last_place)
            return
        keys = self.keys[rows].gather(1, place[1:].T)[:, 0] if kind.sampled else None
        choice = self.choice.of_rows(rows)
        choice.truncates = kind.truncates
        past = self.past.of(rows) if kind.adjusted and self.past is not None else None
        chosen.copy_(choose(logits, choice, keys, past))
        if kind.scored:
            self.scores[rows] = likelihoods(logits, chosen)
        torch.clamp(chosen, min=0, out=token)
        if past is not None:
            past.add(torch.arange(len(token), device=self.device), token)
        torch.minimum(place + 1, self.last_place, out=place)


class Landing:
    """Host memory for the tokens ``[B]`` of one step, and for their `likelihoods`."""

    def __init__(self, n_slots: int, width: int) -> None:
        self.tokens = torch.empty(n_slots, dtype=torch.long, pin_memory=True)
        self.scores = torch.empty(n_slots, width, dtype=torch.double, pin_memory=True)
        self.landed = torch.cuda.Event()
        self.scored = False

    def send(self, tokens: Tensor, scores: Tensor | None) -> None:
        """Start the copies, after the work that makes the tokens."""
        self.scored = scores is not None
        self.tokens.copy_(tokens, non_blocking=True)
        if scores is not None:
            self.scores.copy_(scores, non_blocking=True)
        self.landed.record()

    def wait(self) -> tuple[list[int], list[list[float]] | None]:
        """Return the tokens and likelihoods as soon as they have arrived."""
        self.landed.synchronize()
        return self.tokens.tolist(), self.scores.tolist() if self.scored else None
