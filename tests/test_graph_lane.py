"""Steps that run ahead of their reader give what steps taken one by one give.

The device's part is replaced: a captured step is one that runs when it is replayed, and tokens land when
they are waited for. On a CUDA device, `test_decode_on_cuda` runs the real thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import HOW, PROMPTS, alone, base_of, eight, together
from test_generate import answers, prompts, tiny
from tiny_models import random_ids
from torch import Tensor

import lit_adapter
from lit_adapter.errors import UserError
from lit_adapter.generation import engine, graph_lane
from lit_adapter.generation.adapter import Adapter
from lit_adapter.generation.engine import Engine
from lit_adapter.generation.graph_lane import GraphLane
from lit_adapter.generation.lane import Lane
from lit_adapter.generation.request import Request
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.cache import ModuleDecode
from lit_adapter.model.llama import Llama
from lit_adapter.serving.run import capture_graphs


class _LateLanding:
    def __init__(self, n_slots: int, width: int) -> None:
        self.sent: tuple[list[int], list[list[float]] | None] | None = None

    def send(self, tokens: Tensor, scores: Tensor | None) -> None:
        assert self.sent is None  # the place is free: what was sent before has been read
        self.sent = tokens.tolist(), None if scores is None else scores.tolist()

    def wait(self) -> tuple[list[int], list[list[float]] | None]:
        sent, self.sent = self.sent, None
        assert sent is not None
        return sent


captured: list[int] = []


def _capture(body: Callable[[], None]) -> Callable[[], None]:
    captured.append(1)
    return body


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_lane, "Landing", _LateLanding)
    monkeypatch.setattr(graph_lane, "capture", _capture)
    monkeypatch.setattr(GraphLane, "executor_class", lambda self: ModuleDecode)
    monkeypatch.setattr(graph_lane, "LEAST_USED", 8)  # so that a few captures come to pass
    monkeypatch.setattr(graph_lane, "PATIENCE", 2)
    captured.clear()


def ahead(model: Llama, asked: list[list[int]], how: Sampling, batch_size: int = 1) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "lane_class", lambda model: GraphLane)
        return answers(model, asked, how, batch_size)


@pytest.mark.parametrize(
    "how",
    [
        Sampling(max_new_tokens=14),
        Sampling(max_new_tokens=14, temperature=1.5, seed=3),
        Sampling(max_new_tokens=14, temperature=1.0, top_p=0.9, repetition_penalty=1.4, seed=8),
    ],
    ids=["greedy", "sampled", "penalised"],
)
@pytest.mark.parametrize("heads", [4, 2], ids=["mha", "gqa"])
def test_running_ahead_changes_no_token(heads: int, how: Sampling) -> None:
    model, asked = tiny(heads), prompts()
    wanted = answers(model, asked, how)
    for batch_size in (1, 2, 3, len(asked)):
        assert ahead(model, asked, how, batch_size) == wanted
    assert captured


@settings(max_examples=15)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 7), st.integers(1, 9))
def test_batches_of_any_shape_and_length_of_answer(lengths: list[int], batch_size: int, n_new: int) -> None:
    model = tiny()
    asked = [random_ids(length, seed=length + n).tolist() for n, length in enumerate(lengths)]
    how = Sampling(max_new_tokens=n_new, temperature=1.2, seed=n_new)
    assert ahead(model, asked, how, batch_size) == answers(model, asked, how, batch_size)


def test_no_step_is_started_that_no_request_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    advance = GraphLane._advance
    monkeypatch.setattr(GraphLane, "_advance", lambda self, kind: steps.append(kind) or advance(self, kind))
    model = tiny()
    with torch.inference_mode():
        request = Request([5, 6, 7], Sampling(max_new_tokens=9), Adapter.of(model))
        lane = GraphLane(model)
        lane.waiting.append(request)
        for n_new in range(1, 10):
            lane.advance()
            assert request.n_new == n_new
    assert request.ended
    assert lane.idle
    assert len(steps) == 8  # the first of nine tokens came with the prompt


def test_logits_that_are_nan_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    read = Lane._read

    def then_break(self: Lane, new: list[Request]) -> None:
        read(self, new)
        model.norm.used_weight.data[0] = float("nan")

    monkeypatch.setattr(Lane, "_read", then_break)
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        ahead(model, [[1, 2]], Sampling())


def test_requests_with_their_own_adapters_and_settings() -> None:
    """Also where a longer prompt than any before joins, and where the lane has to grow."""
    base = base_of()
    adapters = eight(base)
    wanted = [alone(number, adapters) for number in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "lane_class", lambda model: GraphLane)
        for batch_size in (8, 3):
            assert together(adapters, batch_size) == wanted
        its = Engine()
        requests = [Request(*each) for each in zip(PROMPTS, HOW, adapters, strict=True)]
        waiting = list(requests)
        while waiting or not all(request.ended for request in requests):
            if waiting:
                its.add(waiting.pop(0))
            its.step()
        assert [list(request.news) for request in requests] == wanted
        assert not its._lanes


@pytest.mark.parametrize("most", [1, 3, 8])
def test_prompts_read_in_pieces_while_steps_run_ahead(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What steps write into the slots of prompts that are being read does no harm."""
    adapters = eight(base_of())
    wanted = [alone(number, adapters) for number in range(8)]
    monkeypatch.setattr(engine, "lane_class", lambda model: GraphLane)
    running = Engine()
    running.prompt_tokens = most
    requests = [Request(*each) for each in zip(PROMPTS, HOW, adapters, strict=True)]
    waiting = list(requests)
    while waiting or not all(request.ended for request in requests):
        if waiting:
            running.add(waiting.pop(0))
        for _ in range(3):
            running.step()
    assert [request.answer for request in requests] == wanted


def test_steps_compute_the_slots_of_live_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are left move to the first slots; what steps write for the others spoils no later answer."""
    adapters = eight(base_of())
    wanted = [alone(number, adapters) for number in range(8)]
    steps: list[tuple[int, list[int]]] = []
    advance = GraphLane._advance

    def watched(self: GraphLane, kind: graph_lane._Kind) -> None:
        last = int(self.last_place[0, 0])
        counting = {slot for slot, _ in self._live_slots()}
        idle = [slot for slot in range(len(self.place[0])) if slot not in counting]
        assert all(self.place[0, slot] == last for slot in idle)
        steps.append((kind.rows, sorted(counting)))
        advance(self, kind)

    monkeypatch.setattr(GraphLane, "_advance", watched)
    monkeypatch.setattr(engine, "lane_class", lambda model: GraphLane)
    running = Engine()
    running.reserve(adapters[0].model, 11, 90)
    for left in (5, 0):  # in the first slots of the second time are answers that were cancelled
        requests = [Request(*each) for each in zip(PROMPTS, HOW, adapters, strict=True)]
        for request in requests:
            running.add(request)
        running.step()
        running.step()
        for request in requests[:left]:
            running.cancel(request)
        while not all(request.ended for request in requests):
            running.step()
        assert [request.answer for request in requests[left:]] == wanted[left:]
    assert {rows for rows, _ in steps} >= {2, 8}
    assert all(slots[-1] < rows for rows, slots in steps if slots)


def test_a_step_whose_requests_another_thread_cancels_as_it_begins() -> None:
    model = tiny()
    with torch.inference_mode():
        requests = [Request([5, n], Sampling(max_new_tokens=9), Adapter.of(model)) for n in range(2)]
        lane = GraphLane(model)
        lane.waiting += requests
        lane.advance()
        for request in requests:
            request.ended = True
        assert lane._launch()[0] == []


def test_an_answer_that_fills_the_cache_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last step ran ahead of its end; the last place holds none of its keys."""
    model = tiny()
    adapter, how = Adapter.of(model), Sampling(max_new_tokens=10)
    monkeypatch.setattr(engine, "lane_class", lambda model: GraphLane)
    running = Engine()
    prompt = random_ids(6, seed=1).tolist()
    full = Request(prompt, how, adapter, resumes=True)
    other = Request([5, 6], Sampling(max_new_tokens=13), adapter)
    for request in (full, other):
        running.add(request)
    while not other.ended:
        running.step()
    going = Request([*prompt, *full.answer, 7, 8], how, adapter, resumes=True)
    fresh = Request(going.prompt, how, adapter)
    assert [*running.run([going])] == [*Engine().run([fresh])]
    assert going.computed == 3


def test_steps_do_not_spoil_the_penalties_of_a_prompt_that_is_being_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny()
    how = Sampling(max_new_tokens=12, repetition_penalty=1.5, frequency_penalty=1.0, presence_penalty=0.5)
    adapter = Adapter.of(model)
    asked = [random_ids(n, seed=n).tolist() for n in (5, 6, 7, 20)]
    wanted = [[token for _, token in Engine().run([Request(ids, how, adapter)])][:-1] for ids in asked]
    monkeypatch.setattr(engine, "lane_class", lambda model: GraphLane)
    running = Engine()
    running.prompt_tokens = 3
    requests = [Request(ids, how, adapter) for ids in asked]
    for request in requests[:3]:
        running.add(request)
    running.step()
    running.add(requests[3])  # in the fourth slot of four, which steps compute
    while not all(request.ended for request in requests):
        running.step()
    assert [request.answer for request in requests] == wanted


def test_a_server_captures_all_sizes_before_it_is_ready(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: set[tuple[int, bool]] = set()
    captured: list[ModuleDecode] = []
    advance = GraphLane._advance

    def watched(self: GraphLane, kind: graph_lane._Kind) -> None:
        kinds.add((kind.rows, kind.sampled))
        advance(self, kind)

    monkeypatch.setattr(GraphLane, "_advance", watched)
    monkeypatch.setattr(ModuleDecode, "capture_reads", lambda self: captured.append(self))
    monkeypatch.setattr(engine, "lane_class", lambda model: GraphLane)
    base = lit_adapter.load(base=tiny_base, device="cpu", dtype="float32")
    base.engine.reserve(base.model, 7 + 8, 64)
    capture_graphs(base, 7, [1, 2, 3])
    assert kinds == {(rows, sampled) for rows in (1, 2, 4, 8) for sampled in (False, True)}
    assert [decode.model for decode in captured] == [base.model]


def test_likelihoods_come_with_their_tokens() -> None:
    """From a step that has run ahead as from one that has not; with a bias and penalties among them."""
    adapters = eight(base_of())

    def found() -> list[tuple[list[int], list[float]]]:
        running = Engine()
        how = [replace(settings, presence_penalty=0.5 * (n % 3)) for n, settings in enumerate(HOW)]
        requests = [
            Request(prompt, settings, adapter, bias={n: 3.0}, most_likely=n % 4 if n else None)
            for n, (prompt, settings, adapter) in enumerate(zip(PROMPTS, how, adapters, strict=True))
        ]
        for request in requests:
            running.add(request)
        while not all(request.ended for request in requests):
            running.step()
        return [(r.answer, [value.log_probability for value in r.likelihoods]) for r in requests]

    plain = found()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "lane_class", lambda model: GraphLane)
        ahead = found()
    assert not plain[0][1]
    for (tokens, values), (others, their_values) in zip(plain, ahead, strict=True):
        assert tokens == others
        assert len(values) in (0, len(tokens))
        assert values == pytest.approx(their_values, abs=1e-5)
