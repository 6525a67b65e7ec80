"""Answers requests, each with its own adapter and settings; they join and leave while others run."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Sequence

import torch

from lit_adapter.errors import UserError
from lit_adapter.generation.graph_lane import GraphLane
from lit_adapter.generation.lane import Lane
from lit_adapter.generation.request import Request, check_batch_size
from lit_adapter.model.llama import Llama

Answers = Generator[tuple[int, int | None], None, None]
"""Pairs of a request's index and a token of its answer, or None at its end."""


class Engine:
    """Takes the steps of all requests, from any thread: whoever waits for an answer drives all of them.

    A lane is dropped with its last request, and its cache with it, unless it holds something that later
    requests may continue from (`Request.resumes`), or `reserve` keeps it.
    """

    prompt_tokens: int | None = None
    """How many tokens of prompts a step reads while other requests are live; None reads all prompts first."""

    def __init__(self) -> None:
        self._added: deque[Request] = deque()
        self._lanes: dict[Llama, Lane] = {}  # changed by whoever steps, or by others while nobody does
        self._kept: set[Llama] = set()
        # A plain Lock: an interrupt can leave a Condition held, whose methods are Python code.
        self._lock = threading.Lock()
        self._process = os.getpid()

    def refuse_fork(self) -> None:
        """Refuse to compute in a process forked from the one that made this engine: it would wait forever.

        PyTorch's threads do not survive a fork, but the child believes that they are there.

        Raises:
            UserError: this is such a process.
        """
        if os.getpid() != self._process:
            raise UserError(
                f"the model was loaded in process {self._process}, from which this one, {os.getpid()}, was "
                "forked; PyTorch's threads do not survive that: load it here, or start processes by 'spawn'"
            )

    def add(self, request: Request) -> None:
        """Let the next step read the request's prompt."""
        self._added.append(request)

    def reserve(self, model: Llama, n_slots: int, length: int) -> None:
        """Keep a lane, with a cache for ``n_slots`` requests of ``length`` tokens, also when it is idle."""
        with self._lock, torch.inference_mode():
            lane = self._lanes.setdefault(model, lane_class(model)(model))
            lane.enlarge(n_slots, length)
            self._kept.add(model)

    def capture_reads(self, model: Llama) -> None:
        """Let a reserved lane capture, while it is idle, what reads short prompts."""
        with self._lock, torch.inference_mode():
            self._lanes[model].capture_reads()

    def step(self) -> None:
        """Take a step, or wait for the end of the one that another thread is taking.

        A step reads the prompts that wait, or gives every live request its next token, in each lane. An error
        ends the affected requests and is stored in them. Only an interrupt of this thread is raised; it ends
        all requests in progress, because it may have left a cache half written.
        """
        if self._lock.locked():
            with self._lock:  # another thread's step has ended
                return
        with self._lock:
            try:
                self._advance()
            except BaseException:
                self._fail_all()
                raise
            finally:
                self._drop_idle_lanes()

    @torch.inference_mode()
    def _advance(self) -> None:
        while self._added:
            request = self._added[0]  # removed when a lane has it: an interrupt between the two loses nothing
            model = request.adapter.model
            try:
                if model not in self._lanes:
                    self._lanes[model] = lane_class(model)(model)
                self._lanes[model].waiting.append(request)
            except Exception as error:
                request.fail(error)
            self._added.popleft()
        for lane in self._lanes.values():
            lane.advance(self.prompt_tokens)

    def _fail_all(self) -> None:
        """End every request of every lane, each with an error of its own."""
        for lane in self._lanes.values():
            for request in (*lane.waiting, *lane.reading, *lane.live):
                request.fail(RuntimeError("generation was interrupted in another thread; ask again"))
            lane.forget()

    def cancel(self, request: Request) -> None:
        """End a request; its slot is free at once, and tokens that its owner has not taken are dropped."""
        request.ended = True
        request.news.clear()
        request.likelihoods.clear()
        # A held lock may be this thread's own: garbage collection within a step can close a stream.
        if not self._lock.locked():
            with self._lock:
                self._drop_idle_lanes()

    def forget(self) -> None:
        """Free what ended requests have left in the caches for later ones."""
        with self._lock:
            for lane in self._lanes.values():
                lane.forget()
            self._drop_idle_lanes()

    def run(self, requests: Sequence[Request], batch_size: int = 1) -> Answers:
        """Answer requests, at most ``batch_size`` of these at a time.

        Yields:
            ``(index of the request, token)`` as tokens come, then ``(index, None)`` at its end.

        Raises:
            UserError: ``batch_size`` is not a whole number, or below 1.
            BaseException: the error of a request; the others are then cancelled, as when this is closed.
        """
        batch_size = check_batch_size(batch_size)
        if not requests:
            return
        # Longest first: prompts read together are about equally long, and the last ones are short.
        waiting = deque(sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt)))
        batch_size = min(batch_size, len(requests))
        # On CUDA reading one prompt takes as long as several steps, and reading many hardly longer.
        refill = max(1, batch_size // 4) if lane_class(requests[0].adapter.model) is GraphLane else 1
        running: dict[int, Request] = {}
        try:
            while waiting or running:
                n_free = min(batch_size - len(running), len(waiting))
                if n_free and n_free >= min(refill, len(waiting)):
                    for index in [waiting.popleft() for _ in range(n_free)]:
                        running[index] = requests[index]
                        self.add(requests[index])
                if not any(request.news or request.ended for request in running.values()):
                    self.step()
                for index, request in list(running.items()):
                    while request.news:
                        yield index, request.news.popleft()
                    if request.ended and not request.news:
                        del running[index]
                        if request.error is not None:
                            raise request.error
                        yield index, None
        finally:
            for request in running.values():
                self.cancel(request)

    def _drop_idle_lanes(self) -> None:
        self._lanes = {
            model: lane
            for model, lane in self._lanes.items()
            if model in self._kept or not lane.idle or lane.holds
        }


def lane_class(model: Llama) -> type[Lane]:
    """Return the class that takes a model's steps."""
    on_cuda = model.embed_tokens.weight.device.type == "cuda"
    # A graph keeps the addresses of matrices; those of a sharded model are gathered elsewhere each time.
    return GraphLane if on_cuda and not model.is_sharded else Lane
