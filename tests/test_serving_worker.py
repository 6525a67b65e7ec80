"""The thread that takes the engine's steps: which requests a step reads together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_adapter.serving import worker as module
from lit_adapter.serving.errors import ApiError
from lit_adapter.serving.metrics import Metrics
from lit_adapter.serving.worker import Choice, Event, Worker


class Engine:
    """Ends each request with its first step, and says what it had been given by then."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.steps: list[int] = []
        self.stepped = threading.Event()

    def add(self, request: Any) -> None:
        self.given.append(request)

    def step(self) -> None:
        for request in self.given:
            request.ended = True
        if self.given:
            self.steps.append(len(self.given))
            self.stepped.set()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def worker(engine: Engine) -> Iterator[Worker]:
    model: Any = SimpleNamespace(engine=engine)
    found = Worker(model, 8, 8, Metrics(torch.device("cpu")))
    found.start()
    yield found
    found.close(ApiError(503, "the test is over"))
    found.join(60)


def choice(length: int = 2) -> Choice:
    tokenizer = SimpleNamespace(strips_space=False)
    settings = SimpleNamespace(max_new_tokens=1, stop=())
    request: Any = SimpleNamespace(
        ended=False, news=[], likelihoods=[], error=None, n_new=1, settings=settings
    )
    model: Any = SimpleNamespace(tokenizer=tokenizer, model=None)
    return Choice(0, model, [1] * length, request, lambda event: None)


def test_requests_of_a_burst_are_read_in_one_step(
    worker: Worker, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BURST_SECONDS", 600.0)
    with worker.coming():
        worker.submit([choice()])
        assert not engine.stepped.wait(0.3)
        worker.submit([choice()])
    assert engine.stepped.wait(250)
    assert engine.steps[0] == 2


def test_long_prompts_of_a_burst_do_not_keep_the_first_answer(
    worker: Worker, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BURST_SECONDS", 600.0)
    with worker.coming():
        worker.submit([choice(600), choice(600), choice(3)])
    assert engine.stepped.wait(250)
    assert engine.steps[0] == 2


def test_a_request_does_not_wait_long_for_others(
    worker: Worker, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BURST_SECONDS", 0.001)
    with worker.coming():
        worker.submit([choice()])
        assert engine.stepped.wait(250)


def test_a_request_that_comes_alone_does_not_wait(
    worker: Worker, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BURST_SECONDS", 600.0)
    with worker.coming():
        worker.submit([choice()])
    assert engine.stepped.wait(250)


def test_a_choice_whose_prompt_fails_keeps_its_request(
    worker: Worker, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other threads cancel and count choices: what they have just seen must not be gone when they use it."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(module, "prompt_likelihoods", fail)
    one, events, told = choice(), list[Event](), threading.Event()
    one.prompt_most_likely = 1

    def deliver(event: Event) -> None:
        events.append(event)
        told.set()

    one.deliver = deliver
    worker.submit([one])
    assert told.wait(250)
    assert str(events[0].error) == "no memory"
    assert one.request is not None
    assert one.request.ended
    worker.close(ApiError(503, "the test is over"))
    worker.join(60)
    assert (len(events), engine.given) == (1, [])
