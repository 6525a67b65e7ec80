"""Streams of an engine that is faster than events are sent: one then has the tokens of several steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from serving_fixtures import Running, folder_of_adapters, running

from lit_adapter.generation.request import TokenLikelihood
from lit_adapter.serving import worker as module
from lit_adapter.serving.errors import ApiError
from lit_adapter.serving.metrics import Metrics
from lit_adapter.serving.worker import Choice, Event, Worker

ASK: dict[str, Any] = {
    "model": "alpha",
    "messages": [{"role": "user", "content": "Say it back."}],
    "max_tokens": 40,
    "temperature": 0.0,
}


@pytest.fixture(scope="module")
def fast(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose steps all fall into one interval between events."""
    paths = folder_of_adapters(tiny_base, tmp_path_factory.mktemp("fast"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EVENT_SECONDS", 6000.0)
        with running(base=tiny_base, adapters=paths) as server:
            server.ask("v1/chat/completions", ASK)  # the very first events are always due
            yield server


@pytest.fixture(scope="module")
def client(fast: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=fast.v1, api_key="none", max_retries=0, timeout=250)


@pytest.mark.parametrize("n", [1, 3])
def test_pieces_joined_are_the_whole_answer(client: openai.OpenAI, n: int) -> None:
    given = ASK | {"n": n, "temperature": 1.3, "seed": 4, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**given)
    parts = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert parts[-1].usage.total_tokens == whole.usage.total_tokens
    for wanted in whole.choices:
        own = [part.choices[0] for part in parts if part.choices and part.choices[0].index == wanted.index]
        assert "".join(choice.delta.content or "" for choice in own) == wanted.message.content
        tokens = [token for choice in own if choice.logprobs for token in choice.logprobs.content]
        assert [token.token for token in tokens] == [token.token for token in wanted.logprobs.content]
        assert [token.logprob for token in tokens] == pytest.approx(
            [token.logprob for token in wanted.logprobs.content], abs=1e-4
        )
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + [wanted.finish_reason]
        assert sum(bool(choice.delta.content) for choice in own) == 2  # the first text, and all the rest


def test_the_first_token_does_not_wait_for_others(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_adapter.model.cpu_decode import CpuDecode

    seen, plain = threading.Event(), CpuDecode.step

    def waiting(self: Any, *given: Any) -> Any:
        assert seen.wait(250)
        return plain(self, *given)

    monkeypatch.setattr(CpuDecode, "step", waiting)
    given = {"model": "alpha", "prompt": "Say", "max_tokens": 4, "logprobs": 0, "logit_bias": {"40": 100}}
    stream = client.completions.create(**given, stream=True)
    assert len(next(iter(stream)).choices[0].logprobs.tokens) == 1
    seen.set()
    assert sum(len(part.choices[0].logprobs.tokens) for part in stream if part.choices[0].logprobs) == 3


def test_a_stop_text_ends_an_answer_at_its_own_step(client: openai.OpenAI, fast: Running) -> None:
    whole = client.chat.completions.create(**ASK)
    said = whole.choices[0].message.content
    stop = said[len(said) // 2 :][:3]
    before = fast.counter("lit_adapter_tokens_total")
    parts = list(
        client.chat.completions.create(**ASK, stop=stop, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == said[: said.index(stop)]
    n_new = fast.counter("lit_adapter_tokens_total") - before
    assert parts[-1].usage.completion_tokens == n_new < whole.usage.completion_tokens


class Engine:
    """Gives each request the token 7 in every step that it is allowed to take."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.allowed = threading.Semaphore(0)

    def add(self, request: Any) -> None:
        self.given.append(request)

    def cancel(self, request: Any) -> None:
        request.news.clear()

    def step(self) -> None:
        if self.given:
            assert self.allowed.acquire(timeout=250)
        for request in self.given:
            request.n_new += 1
            request.news.append(7)
            request.likelihoods.append(TokenLikelihood(-0.5, ()))


@pytest.mark.parametrize(
    ("seconds", "pieces"),
    [(6000.0, lambda n: ["a", "a" * (n - 1)]), (0.0, lambda n: ["a"] * n)],
    ids=["fast", "slow"],
)
def test_what_was_not_sent_yet_comes_before_the_end_of_the_server(
    monkeypatch: pytest.MonkeyPatch, seconds: float, pieces: Callable[[int], list[str]]
) -> None:
    """And a step that takes longer than the interval has its own event."""
    monkeypatch.setattr(module, "EVENT_SECONDS", seconds)
    engine, events = Engine(), []
    ended = threading.Event()

    def deliver(event: Event) -> None:
        events.append(event)
        if event.finish:
            ended.set()

    settings = SimpleNamespace(max_new_tokens=100, stop=())
    request: Any = SimpleNamespace(
        ended=False, news=deque(), likelihoods=deque(), error=None, n_new=0, settings=settings
    )
    model: Any = SimpleNamespace(
        engine=engine, tokenizer=SimpleNamespace(strips_space=False, piece=lambda id_: b"a")
    )
    worker = Worker(model, 8, 8, Metrics(torch.device("cpu")))
    worker.start()
    worker.submit([Choice(0, model, [1, 2], request, deliver)])
    engine.allowed.release(4)
    while request.n_new < 4:
        threading.Event().wait(0.01)
    worker.close(ApiError(503, "the test is over"))
    engine.allowed.release()
    assert ended.wait(250)
    worker.join(250)
    assert [event.text for event in events] == [*pieces(request.n_new), ""]
    assert [token.offset for event in events for token in event.tokens] == list(range(request.n_new))
    assert events[-1].error is not None
