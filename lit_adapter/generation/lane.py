"""The requests that one model answers together: prompts are read into slots, steps give each slot a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_adapter.generation.request import Request
from lit_adapter.generation.sampling import Choice, Past, choose, likelihoods
from lit_adapter.model.cache import ModuleDecode, Prefixes
from lit_adapter.model.cpu_decode import CpuDecode
from lit_adapter.model.executors import choose as choose_executor
from lit_adapter.model.llama import Llama


class Lane:
    """Takes the steps of a model's requests one by one.

    Args:
        model: computes all of them; what distinguishes their adapters belongs to the slots.
    """

    executor: Any = None
    """Has the cache; None before the first request."""
    past: Past | None = None
    """Of every slot; None before a request with a penalty or a bias."""

    def __init__(self, model: Llama) -> None:
        self.model, self.executor_name = model, choose_executor(model, "decoding").name
        self.device = model.embed_tokens.weight.device
        self.waiting: list[Request] = []
        self.slots: list[Request] = []
        """The requests of the slots that were ever filled; an ended one leaves its slot to others."""

    @property
    def live(self) -> list[Request]:
        """The requests that are being answered."""
        return [request for request in self.slots if not request.ended]

    @property
    def idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return not self.live and all(request.ended for request in self.waiting)

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
        """Read prompts into free slots, those with the same adapter together, and choose the first tokens."""
        free = [slot for slot, request in enumerate(self.slots) if request.ended][: len(new)]
        added = new[len(free) :]
        free += range(len(self.slots), len(self.slots) + len(added))
        longest = max(len(request.prompt) + request.settings.max_new_tokens for request in new)
        self.enlarge(len(self.slots) + len(added), longest)
        self.slots += added
        groups: dict[Prefixes, list[int]] = {}
        for request, slot in zip(new, free, strict=True):
            self.slots[slot] = request
            request.length = len(request.prompt)
            groups.setdefault(request.adapter.prefixes, []).append(slot)
        self._prepare(free)
        hidden = [
            self.executor.read([self.slots[slot].prompt for slot in slots], slots, prefixes)
            for prefixes, slots in groups.items()
        ]
        order = [slot for slots in groups.values() for slot in slots]
        self._choose(self.model.logits(torch.cat(hidden)), order)

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
        """Return what computes this lane's model."""
        if self.executor_name == "CUDA decoding":
            # Imported here: it needs Triton, which CUDA builds of torch bring.
            from lit_adapter.model.fused_decode import FusedDecode

            return FusedDecode
        return CpuDecode if self.executor_name == "CPU decoding" else ModuleDecode

    def _prepare(self, slots: Sequence[int]) -> None:
        """Set up slots for the prompts that will be read: their past, if a request needs one."""
        if self.past is None and not any(request.adjusted for request in self.live):
            return
        if self.past is None:
            B, V = self.executor.cache.n_slots, self.model.config.vocab_size
            self.past = Past.empty(B, V, self.device)
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

        One that is cancelled from now on is computed once more: the step's slots stay as they are.
        """
        live = [slot for slot, request in enumerate(self.slots) if not request.ended]
        n_live = len(live)
        for target in sorted(set(range(n_live)) - set(live)):
            source = live.pop()
            self.executor.move(source, target, self.slots[source].length)
            if self.past is not None:
                self.past.copy(source, target)
            self.slots[target], self.slots[source] = self.slots[source], self.slots[target]
        return self.slots[:n_live]

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
            request.receive(chosen, row)


def enlarged(x: Tensor, *shape: int) -> Tensor:
    """Return ``x`` with its first dimensions enlarged to ``shape`` by zeros."""
    new = x.new_zeros(*shape, *x.shape[len(shape) :])
    new[tuple(map(slice, x.shape))] = x
    return new
