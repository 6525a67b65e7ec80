"""The requests that one model answers together: prompts are read into slots, steps give each slot a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_adapter.generation.fallback import go_on_without_kernels
from lit_adapter.generation.request import Request
from lit_adapter.generation.sampling import Choice, Past, choose, likelihoods
from lit_adapter.grouping import n_common
from lit_adapter.model.cache import ModuleDecode
from lit_adapter.model.cpu_decode import CpuDecode
from lit_adapter.model.executors import KernelError
from lit_adapter.model.executors import choose as choose_executor
from lit_adapter.model.llama import Llama
from lit_adapter.model.pieces import Piece

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
    past: Past | None = None
    """The past of every slot; None before a request with a penalty or a bias."""

    def __init__(self, model: Llama) -> None:
        self.model, self.executor_name = model, choose_executor(model, "decoding").name
        self.device = model.embed_tokens.weight.device
        self.waiting: list[Request] = []
        self.slots: list[Request] = []
        """The requests of the slots that were ever filled; an ended one leaves its slot to others."""
        self.reading: list[Request] = []
        """Requests whose prompts are not completely in their slots yet, in their order."""
        self._left: list[Request] = []
        """Requests that may keep their slots, the earliest first."""

    @property
    def live(self) -> list[Request]:
        """The requests that are being answered: their prompts are read."""
        return [request for _, request in self._live_slots()]

    def _live_slots(self) -> list[tuple[int, Request]]:
        return [(slot, request) for slot, request in enumerate(self.slots) if self._is_live(request)]

    def _is_live(self, request: Request) -> bool:
        return not request.ended and request not in self.reading

    @property
    def idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return all(request.ended for request in (*self.slots, *self.waiting))

    @property
    def holds(self) -> bool:
        """Whether ended requests have left something that later ones may continue from."""
        return any(request.resumes for request in self.slots)

    def forget(self) -> None:
        """Keep no slot for later requests."""
        for request in self.slots:
            request.resumes = False

    def advance(self, most: int | None = None) -> None:
        """Read the waiting prompts, or give every live request its next token.

        An error ends the requests that were being computed; their owners are given it.

        Args:
            most: how many tokens of prompts to read while other requests are live, which then have their next
                tokens in the same step; None reads all prompts first.
        """
        new = [request for request in self.waiting if not request.ended]
        self._attempt(new, lambda: self._place(new))
        self.waiting = []  # only now: an interrupt must find them
        self.reading = [request for request in self.reading if not request.ended]
        live, begun = self.live, self.reading
        self._attempt(begun, lambda: self._read(most if live else None))
        if live and (most is not None or not begun):
            self._attempt(self.live, self._step)

    def capture_reads(self) -> None:
        """Capture what reads short prompts, while there are no requests."""
        self._compute(lambda: self.executor.capture_reads())

    def _attempt(self, requests: list[Request], work: Callable[[], None]) -> None:
        if not requests:
            return
        try:
            self._compute(work)
        except Exception as error:
            for request in requests:
                if not request.ended:
                    request.fail(error)

    def _compute(self, work: Callable[[], None]) -> None:
        """Do some work, and repeat it by the modules if one of its kernels turns out not to compile.

        What the slots held before is still right: the work writes only after it.
        """
        reading, lengths = [*self.reading], {request: request.length for request in self.reading}
        try:
            work()
        except KernelError as error:
            self._go_on_with_modules(error)
            self.reading = reading
            for request, length in lengths.items():
                request.length = length
            work()

    def _go_on_with_modules(self, error: KernelError) -> None:
        """Let the modules compute the rest of all answers, continuing from what the slots hold."""
        go_on_without_kernels(self.model, error)
        self.executor_name = "modules"
        if self.executor is not None:
            self.executor = ModuleDecode.in_place_of(self.executor)

    def _place(self, new: list[Request]) -> None:
        """Give slots to requests; those with `Request.resumes` get what other slots hold of their prompts."""
        shared = [self._longest_shared(request) for request in new]
        slots = self._slots_for(new, shared)
        longest = max(len(request.prompt) + request.settings.max_new_tokens for request in new)
        self.enlarge(max([len(self.slots), *(slot + 1 for slot in slots)]), longest)
        for (source, n), slot in zip(shared, slots, strict=True):
            if n and source != slot:
                self.executor.move(source, slot, n)
        for request, slot, (_, n) in zip(new, slots, shared, strict=True):
            self.slots[slot : slot + 1] = [request]
            request.length, request.computed = n, len(request.prompt) - n
        self._left += [request for request in new if request.resumes]
        self.reading += new
        self._prepare(slots)

    def _read(self, most: int | None) -> None:
        """Read prompts, ``most`` tokens of them or all, and choose the first tokens of those that are read.

        They are read together in the order in which they came, whatever adapters they have.
        """
        pieces = []
        for request in self.reading:
            left = len(request.prompt) - request.length
            n = left if most is None else min(left, most)
            if not n:
                break
            most = None if most is None else most - n
            done, slot = request.length, self.slots.index(request)
            request.length += n
            pieces.append(Piece(request.prompt[: request.length], slot, request.adapter.prefixes, done))
        hidden = self.executor.read(pieces)
        n_read = sum(request.length == len(request.prompt) for request in self.reading[: len(pieces)])
        self.reading = self.reading[n_read:]  # a prompt that is not read to its end is the last of them
        if n_read:
            slots = [piece.slot for piece in pieces[:n_read]]
            self._begin_past(slots)
            self._choose(self.model.logits(hidden[:n_read]), slots)

    def _longest_shared(self, request: Request) -> tuple[int, int]:
        """Return the slot that holds the longest start of a prompt, and how many tokens; 0 if none does."""
        if not request.resumes:
            return 0, 0
        found = [
            (min(n_common(request.prompt, other.cached), len(request.prompt) - 1), slot)
            for slot, other in enumerate(self.slots)
            # A slot that nobody keeps may have been copied from since: what it holds is not known.
            if (other.resumes or not other.ended) and other.adapter.prefixes is request.adapter.prefixes
        ]
        n, slot = max(found, default=(0, 0))
        return (slot, n) if n >= LEAST_SHARED else (0, 0)

    def _slots_for(self, new: list[Request], shared: list[tuple[int, int]]) -> list[int]:
        """Return a slot for each request: the one that it resumes, if that loses little, or a free one."""
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

    def enlarge(self, n_slots: int, length: int) -> None:
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
        if self.past is not None:
            self.past = Past(*(enlarged(own, n_slots) for own in vars(self.past).values()))

    def executor_class(self) -> Callable[[Llama, int, int], Any]:
        """Return the class that computes this lane's model."""
        if self.executor_name == "CUDA decoding":
            # Imported here: it needs Triton, which CUDA builds of torch bring.
            from lit_adapter.model.fused_decode import FusedDecode

            return FusedDecode
        return CpuDecode if self.executor_name == "CPU decoding" else ModuleDecode

    def _prepare(self, slots: Sequence[int]) -> None:
        """Set up what the requests of slots need, before their prompts are read."""
        if self.past is None and any(self.slots[slot].adjusted for slot in slots):
            B, V = self.executor.cache.n_slots, self.model.config.vocab_size
            self.past = Past.empty(B, V, self.device)

    def _begin_past(self, slots: Sequence[int]) -> None:
        """Give slots the past of their requests, whose prompts are read; until then, steps may spoil it."""
        if self.past is not None:
            for slot in slots:
                self.past.begin(slot, self.slots[slot].prompt, self.slots[slot].bias)

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

        A request that is cancelled from now on is computed once more: the step's slots stay as they are.
        """
        live = [slot for slot, _ in self._live_slots()]
        n_live = len(live)
        for target in sorted(set(range(n_live)) - set(live)):
            source = live.pop()
            other = self.slots[target]
            if other.resumes or not other.ended:
                self.executor.swap(source, target, max(other.length, self.slots[source].length))
            else:
                self.executor.move(source, target, self.slots[source].length)
            self._swap_state(source, target)
            self.slots[target], self.slots[source] = self.slots[source], self.slots[target]
        return self.slots[:n_live]

    def _swap_state(self, one: int, other: int) -> None:
        """Exchange what this lane itself keeps of two slots."""
        if self.past is not None:
            self.past.swap(one, other)

    def _choose(self, logits: Tensor, slots: Sequence[int]) -> None:
        """Choose a token for each of ``slots`` from its ``logits [B, V]``."""
        requests = [self.slots[slot] for slot in slots]
        settings = [request.settings for request in requests]
        where = torch.tensor(list(slots), device=self.device)
        sampled = not all(how.greedy for how in settings)
        adjusted = any(request.adjusted for request in requests)
        choice = Choice.of(settings, self.device) if sampled or adjusted else None
        keys = torch.stack([r.keys[r.n_new] for r in requests]).to(self.device) if sampled else None
        past = self.past.of(where) if adjusted and self.past is not None else None
        token = choose(logits, choice, keys, past)
        if self.past is not None:
            self.past.add(where, token.clamp(min=0))
        scored = any(request.most_likely is not None for request in requests)
        scores = likelihoods(logits, token).tolist() if scored else [None] * len(requests)
        for request, chosen, row in zip(requests, token.tolist(), scores, strict=True):
            self._receive(request, chosen, row)

    def _receive(self, request: Request, token: int, likelihoods: Sequence[float] | None) -> None:
        """Give a request its next token, unless it has ended; see `Request.receive`."""
        if request.ended:  # cancelled meanwhile; another may have its slot
            return
        request.receive(token, likelihoods)
        if request.error is not None:
            self.executor.clear(self.slots.index(request))


def enlarged(x: Tensor, *shape: int) -> Tensor:
    """Return ``x`` with its first dimensions enlarged to ``shape`` by zeros."""
    new = x.new_zeros(*shape, *x.shape[len(shape) :])
    new[tuple(map(slice, x.shape))] = x
    return new
