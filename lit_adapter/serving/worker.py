"""The thread that takes the engine's steps; only it computes. Other threads submit choices and cancel them.

A choice waits in a queue until a slot is free, is read by the next step and answered with all others. Its
events, pieces of text with their tokens, are delivered after a step, all of them in one call. On a fast
device an event has the tokens of several steps: sending each one alone would take longer than computing it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.answer_text import AnswerText
from lit_adapter.generation.prompt_likelihood import prompt_likelihoods
from lit_adapter.generation.request import Request, TokenLikelihood
from lit_adapter.serving.errors import ApiError
from lit_adapter.serving.metrics import Metrics

logger = logging.getLogger(__name__)

BURST_SECONDS = 0.02
"""Longest time that the first request of a burst waits for the others, to be read with them."""
BURST_TOKENS = 1024
"""Prompt tokens after which an idle server admits no other request before answers begin."""
EVENT_SECONDS = 0.04
"""Shortest time between events of unfinished answers; first and last events do not wait."""


class Token(NamedTuple):
    """A token of a prompt or an answer, with the place in the text at which its own text begins."""

    id: int
    offset: int
    likelihood: TokenLikelihood | None


@dataclass(frozen=True)
class Event:
    """What one step, or several, have produced for a choice."""

    index: int
    text: str = ""
    tokens: Sequence[Token] = ()
    """With their likelihoods, if those are wanted."""
    finish: str | None = None
    """``stop`` or ``length``, at the end."""
    error: BaseException | None = None


Deliver = Callable[[Event], None]


@dataclass(eq=False)
class Choice:
    """One answer to one prompt. The fields below ``model`` change only in the worker's thread."""

    index: int
    model: AdaptedLlama
    prompt: Sequence[int]
    request: Request | None
    """None if nothing is to be generated."""
    deliver: Deliver
    """Called in the worker's thread."""
    prompt_most_likely: int | None = None
    """Asks for the likelihoods of the prompt, with this many of the most likely tokens; None for none."""
    cancelled: bool = False
    queued: float = field(default_factory=time.monotonic)
    n_counted: int = 0
    """Tokens of the answer that are in the metrics."""
    last: float = 0.0
    """The time of the newest of them; 0 before the first."""
    begun: bool = False
    """Whether it has had an event."""

    def __post_init__(self) -> None:
        self.text = AnswerText(self.model.tokenizer, self.request.settings.stop if self.request else ())
        self.released = 0  # characters of the answer that were taken
        self.read = ""  # text that was not taken yet
        self.held: list[Token] = []  # tokens whose text was not taken yet, if likelihoods are wanted

    @property
    def n_new(self) -> int:
        """Number of tokens of the answer so far."""
        return 0 if self.request is None else self.request.n_new

    def take(self, *, due: bool = True) -> Event | None:
        """Return an event of the tokens since the last one; None if there is nothing to send.

        If it is not ``due``, an unfinished answer is only searched for stop texts.
        """
        request = self.request
        assert request is not None
        due = due or request.ended or not self.begun
        if due or self.text.stop:
            self._read(request)
        return self._event(request) if due or self.text.stopped else None

    def _read(self, request: Request) -> None:
        """Turn the newest tokens into text, up to a stop text."""
        while request.news and not self.text.stopped:
            token = request.news.popleft()
            if request.likelihoods:
                offset = self.released + len(self.read) + len(self.text.held)
                self.held.append(Token(token, offset, request.likelihoods.popleft()))
            self.read += self.text.push(token)
        if request.ended and request.error is None:
            self.read += self.text.push(None)

    def _event(self, request: Request) -> Event | None:
        text, self.read = self.read, ""
        self.released += len(text)
        ended = request.ended or self.text.stopped
        sent = [
            token for token in self.held if token.offset < self.released or (ended and not self.text.stopped)
        ]
        self.held = [] if ended else self.held[len(sent) :]
        finish = None
        if ended:
            full = not self.text.stopped and request.n_new >= request.settings.max_new_tokens
            finish = "length" if full else "stop"
        if not (text or sent or finish):
            return None
        self.begun = True
        return Event(self.index, text, sent, finish, request.error)


class Worker:
    """Answers choices with one engine.

    Args:
        model: the plain base; its engine is the one of all adapters on it.
        n_slots: choices that are answered at a time.
        queue: choices that may wait.
        metrics: where it counts.
    """

    def __init__(self, model: AdaptedLlama, n_slots: int, queue: int, metrics: Metrics) -> None:
        self.engine, self.n_slots, self.queue, self.metrics = model.engine, n_slots, queue, metrics
        self._waiting: deque[Choice] = deque()
        self._running: list[Choice] = []
        self._lock = threading.Lock()  # of the two above
        self._work = threading.Event()
        self._closed: ApiError | None = None
        self._coming = 0
        self._due = 0.0  # when events of unfinished answers are sent next
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether choices are answered."""
        return self._thread.is_alive() and self._closed is None

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Announce, in the event loop's thread, a request whose choices will be submitted."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1
            self._work.set()

    def submit(self, choices: Sequence[Choice]) -> None:
        """Let the next steps answer all of these choices.

        Raises:
            ApiError: the queue is full (429), or the server stops (503).
        """
        with self._lock:
            if self._closed is not None:
                raise self._closed
            n_free = self.n_slots - len(self._running) + self.queue - len(self._waiting)
            if len(choices) > n_free:
                raise ApiError(
                    429,
                    f"the queue is full: {len(self._waiting)} answers wait; try again later",
                    code="queue_full",
                    retry_after=self._seconds_until_room(),
                )
            self._waiting += choices
        self._work.set()

    def _seconds_until_room(self) -> int:
        rounds = 1 + len(self._waiting) / self.n_slots
        return min(60, max(1, round(rounds * self.metrics.usual_seconds)))

    def cancel(self, choices: Sequence[Choice]) -> None:
        """End choices; their slots are free at once, and nothing more is delivered for them."""
        for choice in choices:
            choice.cancelled = True
            if choice.request is not None:
                choice.request.ended = True  # its other fields belong to the worker's thread
        self._work.set()

    def close(self, error: ApiError) -> None:
        """Accept no more choices, and end all present ones with an error."""
        with self._lock:
            self._closed = error
        self._work.set()

    def join(self, seconds: float) -> None:
        """Wait for the thread's end, after `close`."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while self._closed is None:
                self._work.clear()
                if not self._running:
                    self._gather()
                self._admit()
                if not self._running:
                    self.engine.step()  # drops the caches of adapters whose last answer was cancelled
                    self._work.wait(1.0)
                    continue
                started = time.monotonic()
                self.engine.step()
                self._hand_on(started)
        except BaseException:
            logger.exception("the engine's thread has failed")
            self._closed = ApiError(500, "the server has failed; its log says why", code="engine_failed")
        self._end_all()

    def _gather(self) -> None:
        """Wait for requests that come together with the first one: read later, they cost one more step."""
        until = time.monotonic() + BURST_SECONDS
        while self._waiting and self._coming and (left := until - time.monotonic()) > 0:
            self._work.wait(left)
            self._work.clear()

    def _admit(self) -> None:
        """Give free slots to choices that wait, in their order, and read the likelihoods of one prompt."""
        room: float = math.inf if self._running else BURST_TOKENS
        while True:
            with self._lock:
                self._waiting = deque(choice for choice in self._waiting if not choice.cancelled)
                self._count()
                if not self._waiting or len(self._running) >= self.n_slots or room <= 0:
                    return
                choice = self._waiting.popleft()
                self._running.append(choice)
            room -= len(choice.prompt)
            self.metrics.waited.observe(time.monotonic() - choice.queued)
            if choice.prompt_most_likely is not None or choice.request is None:
                self._read_prompt(choice)
            if choice.request is not None and not choice.request.ended:
                self.engine.add(choice.request)
            if choice.prompt_most_likely is not None:
                return

    def _read_prompt(self, choice: Choice) -> None:
        """Deliver the likelihoods of a choice's prompt; end the choice if nothing else is wanted."""
        error, tokens, most = None, [], choice.prompt_most_likely
        try:
            if most is not None:
                found = [None, *prompt_likelihoods(choice.model.model, choice.prompt, most)]
                tokens = [Token(id_, 0, value) for id_, value in zip(choice.prompt, found, strict=True)]
        except Exception as caught:  # an error of this choice, which its owner is told
            error = caught
            if choice.request is not None:
                choice.request.ended = True
        finish = "length" if error is not None or choice.request is None else None
        choice.deliver(Event(choice.index, "", tokens, finish, error))
        if finish:
            self._running.remove(choice)

    def _hand_on(self, started: float) -> None:
        """Deliver what is due after a step, and free the slots of choices that have ended."""
        now = time.monotonic()
        self.metrics.step.observe(now - started)
        if due := now >= self._due:
            self._due = now + EVENT_SECONDS
        left: list[Choice] = []
        for choice in self._running:
            if choice.cancelled:
                self._observe(choice, now)
                continue
            event = choice.take(due=due)
            if event is not None or not choice.last:
                self._observe(choice, now)
            if event is not None:
                choice.deliver(event)
            if event is None or event.finish is None:
                left.append(choice)
            elif choice.request is not None and not choice.request.ended:
                self.engine.cancel(choice.request)  # at a stop text
        with self._lock:
            self._running = left
            self._count()

    def _observe(self, choice: Choice, now: float) -> None:
        """Count a choice's newest tokens, and note when they came."""
        n_new = choice.n_new - choice.n_counted
        if not n_new:
            return
        choice.n_counted = choice.n_new
        self.metrics.tokens.inc(n_new)
        if choice.last:
            self.metrics.between_tokens.observe((now - choice.last) / n_new)
        else:
            self.metrics.first_token.observe(now - choice.queued)
        choice.last = now

    def _count(self) -> None:
        self.metrics.queue.set(len(self._waiting))
        self.metrics.slots.set(len(self._running))

    def _end_all(self) -> None:
        """End every choice with the error that the worker was closed with."""
        with self._lock:
            ended = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
            self._count()
        for choice in ended:
            event = None
            if choice.request is not None:
                with suppress(Exception):  # its error may be what ended the worker
                    event = None if choice.cancelled else choice.take()  # tokens that were not due yet
                self.engine.cancel(choice.request)
            if event is not None:
                self._observe(choice, time.monotonic())
                choice.deliver(event)
            if not choice.cancelled and (event is None or event.finish is None):
                choice.deliver(Event(choice.index, finish="stop", error=self._closed))
