"""The requests that one model answers together: prompts are read into slots, steps give each slot a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_adapter.generation.request import Request
from lit_adapter.generation.sampling import Choice, choose
from lit_adapter.model.cache import ModuleDecode, Prefixes
from lit_adapter.model.cpu_decode import CpuDecode
from lit_adapter.model.executors import choose as choose_executor
from lit_adapter.model.llama import Llama

LEAST_SHARED = 8
"""Tokens below which a common start is computed again."""
MOST_KEPT = 8
"""Slots that ended requests keep for later ones; one more takes the slot that was left first."""


class Lane:
    """Takes the steps of a model's requests one by one.

    Args:
        model: computes all of them; what distinguishes their adapters belongs to the slots.
    """

    executor: Any = None
    """Has the cache; None before the first request."""
    seen: Tensor | None = None
    """Which tokens a slot holds already ``[B, V]``; None before a request with a repetition penalty."""

    def __init__(self, model: Llama) -> None:
        self.model, self.executor_name = model, choose_executor(model, "decoding").name
        self.device = model.embed_tokens.weight.device
        self.waiting: list[Request] = []
        self.slots: list[Request] = []
        """The requests of the slots that were ever filled; an ended one leaves its slot to others."""
        self._left: list[Request] = []
        """Requests that may keep their slots, the earliest first."""

    @property
    def live(self) -> list[Request]:
        """The requests that are being answered."""
        return [request for request in self.slots if not request.ended]

    @property
    def idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return not self.live and all(request.ended for request in self.waiting)

    @property
    def holds(self) -> bool:
        """Whether ended requests have left something that later ones may go on from."""
        return any(request.resumes for request in self.slots)

    def forget(self) -> None:
        """Keep no slot for later requests."""
        for request in self.slots:
            request.resumes = False

    def advance(self) -> None:
        """Read the waiting prompts, or give every live request its next token.

        An error ends the requests that were being computed; it is left to their owners.
        """
        new = [request for request in self.waiting if not request.ended]
        try:
            if new:
                self._read(new)
            else:
                self._step()
        except Exception as error:
            for request in new or self.live:
                request.fail(error)
        self.waiting = []  # only now: an interrupt must find them

    def _read(self, new: list[Request]) -> None:
        """Read prompts into slots, those with the same adapter together, and choose the first tokens.

        What a slot holds of a prompt that `Request.resumes` is not computed again.
        """
        shared = [self._longest_shared(request) for request in new]
        slots = self._slots_for(new, shared)
        longest = max(len(request.prompt) + request.settings.max_new_tokens for request in new)
        self._enlarge(max([len(self.slots), *(slot + 1 for slot in slots)]), longest)
        for (source, n), slot in zip(shared, slots, strict=True):
            if n and source != slot:
                self.executor.move(source, slot, n)
        groups: dict[Prefixes | int, list[int]] = {}  # one that goes on from a slot is read alone
        for request, slot, (_, n) in zip(new, slots, shared, strict=True):
            self.slots[slot : slot + 1] = [request]
            request.length, request.computed = len(request.prompt), len(request.prompt) - n
            groups.setdefault(slot if n else request.adapter.prefixes, []).append(slot)
        self._left += [request for request in new if request.resumes]
        self._prepare(slots)
        hidden = [self._read_group(group) for group in groups.values()]
        order = [slot for group in groups.values() for slot in group]
        self._choose(self.model.logits(torch.cat(hidden)), order)

    def _read_group(self, slots: list[int]) -> Tensor:
        first = self.slots[slots[0]]
        prefixes, done = first.adapter.prefixes, len(first.prompt) - first.computed
        if done:
            hidden: Tensor = self.executor.go_on(first.prompt, done, slots[0], prefixes)
        else:
            hidden = self.executor.read([self.slots[slot].prompt for slot in slots], slots, prefixes)
        return hidden

    def _longest_shared(self, request: Request) -> tuple[int, int]:
        """Return the slot that holds the longest start of a prompt, and how many tokens; 0 if none does."""
        if not request.resumes:
            return 0, 0
        found = [
            (min(n_common(request.prompt, other.cached), len(request.prompt) - 1), slot)
            for slot, other in enumerate(self.slots)
            if other.adapter.prefixes is request.adapter.prefixes
        ]
        n, slot = max(found, default=(0, 0))
        return (slot, n) if n >= LEAST_SHARED else (0, 0)

    def _slots_for(self, new: list[Request], shared: list[tuple[int, int]]) -> list[int]:
        """Return a slot for each request: the one it goes on from, if that loses little, or a free one."""
        chosen: list[int | None] = []
        for source, n in shared:
            is_own = n and source not in chosen and self.slots[source].ended
            chosen.append(source if is_own and 2 * n >= len(self.slots[source].cached) else None)
        kept = [r for r in self._left if r.resumes and r.ended and r in self.slots]
        self._left = [r for r in self._left if r.resumes and r in self.slots]
        n_too_many = max(0, len(kept) + chosen.count(None) - MOST_KEPT)
        for request in kept[:n_too_many]:
            request.resumes = False
        sources = {source for source, n in shared if n}
        free = [
            slot
            for slot, request in enumerate(self.slots)
            if request.ended and not request.resumes and slot not in sources
        ]
        free += range(len(self.slots), len(self.slots) + len(new))
        places = iter(free)
        return [next(places) if slot is None else slot for slot in chosen]

    def _enlarge(self, n_slots: int, length: int) -> None:
        """Make room for ``n_slots`` requests of ``length`` tokens; a cache grows by a quarter or more."""
        if self.executor is not None:
            cache = self.executor.cache
            if n_slots <= cache.n_slots and length <= cache.length:
                return
            n_slots, length = (
                max(needed, old + old // 4) if needed > old else old
                for needed, old in ((n_slots, cache.n_slots), (length, cache.length))
            )
        self._grow(n_slots, min(length, self.model.config.context_length))

    def _grow(self, n_slots: int, length: int) -> None:
        executor = self.executor_class()(self.model, n_slots, length)
        if self.executor is not None:
            executor.take(self.executor)
        self.executor = executor
        self.seen = None if self.seen is None else enlarged(self.seen, n_slots)

    def executor_class(self) -> Callable[[Llama, int, int], Any]:
        """Return what computes this lane's model."""
        if self.executor_name == "CUDA decoding":
            # Imported here: it needs Triton, which CUDA builds of torch bring.
            from lit_adapter.model.fused_decode import FusedDecode

            return FusedDecode
        return CpuDecode if self.executor_name == "CPU decoding" else ModuleDecode

    def _prepare(self, slots: Sequence[int]) -> None:
        """Set up slots for the prompts that will be read: their tokens, if a request has a penalty."""
        if self.seen is None and not any(request.settings.penalised for request in self.live):
            return
        if self.seen is None:
            shape = (self.executor.cache.n_slots, self.model.config.vocab_size)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for slot in slots:
            self.seen[slot] = False
            self.seen[slot, torch.tensor(self.slots[slot].prompt, device=self.device)] = True

    def _step(self) -> None:
        """Put every live request's newest token into the cache and choose the next."""
        live = self._first_slots()
        if not live:
            return
        logits = self.executor.step([r.token for r in live], [r.length for r in live])
        for request in live:
            request.length += 1
        self._choose(logits, range(len(live)))

    def _first_slots(self) -> list[Request]:
        """Move live requests to the first slots, so that no step computes a free one, and return them.

        One that is cancelled from now on is computed once more: the step's slots stay as they are.
        """
        live = [slot for slot, request in enumerate(self.slots) if not request.ended]
        n_live = len(live)
        for target in sorted(set(range(n_live)) - set(live)):
            source = live.pop()
            if self.slots[target].resumes:
                self.executor.swap(source, target)
            else:
                self.executor.move(source, target, self.slots[source].length)
            if self.seen is not None:
                self.seen[target] = self.seen[source]
            self.slots[target], self.slots[source] = self.slots[source], self.slots[target]
        return self.slots[:n_live]

    def _choose(self, logits: Tensor, slots: Sequence[int]) -> None:
        """Choose a token for each of ``slots`` from its ``logits [B, V]``."""
        requests = [self.slots[slot] for slot in slots]
        settings = [request.settings for request in requests]
        where = torch.tensor(list(slots), device=self.device)
        sampled = not all(how.greedy for how in settings)
        penalised = any(how.penalised for how in settings)
        choice = Choice.of(settings, self.device) if sampled or penalised else None
        uniform = torch.stack([r.numbers[r.n_new] for r in requests]).to(self.device) if sampled else None
        seen = self.seen[where] if penalised and self.seen is not None else None
        token = choose(logits, choice, uniform, seen)
        if self.seen is not None:
            self.seen[where, token.clamp(min=0)] = True
        for request, chosen in zip(requests, token.tolist(), strict=True):
            request.receive(chosen)


def n_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two texts have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def enlarged(x: Tensor, *shape: int) -> Tensor:
    """Return ``x`` with its first dimensions enlarged to ``shape`` by zeros."""
    new = x.new_zeros(*shape, *x.shape[len(shape) :])
    new[tuple(map(slice, x.shape))] = x
    return new
