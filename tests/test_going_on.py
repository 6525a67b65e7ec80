"""A request goes on from what a slot holds of its prompt, and is answered as if it were computed afresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from generation_fixtures import save_random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import base_of, eight
from test_graph_lane import _capture, _LateLanding
from tiny_models import random_ids

import lit_adapter
from lit_adapter.errors import UserError
from lit_adapter.generation import engine, graph_lane
from lit_adapter.generation.adapter import Adapter
from lit_adapter.generation.engine import Engine
from lit_adapter.generation.graph_lane import GraphLane
from lit_adapter.generation.lane import MOST_KEPT
from lit_adapter.generation.request import Request
from lit_adapter.generation.settings import Sampling
from lit_adapter.grouping import n_common
from lit_adapter.model.cache import ModuleDecode

GREEDY = Sampling(max_new_tokens=9)
LANES = pytest.mark.parametrize("ahead", [False, True], ids=["step-by-step", "ahead"])


@pytest.fixture
def run_ahead(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Take steps as on CUDA, with the device's part replaced as in `test_graph_lane`."""

    def switch() -> None:
        monkeypatch.setattr(graph_lane, "Landing", _LateLanding)
        monkeypatch.setattr(graph_lane, "capture", _capture)
        monkeypatch.setattr(GraphLane, "executor_class", lambda self: ModuleDecode)
        monkeypatch.setattr(graph_lane, "LEAST_USED", 8)
        monkeypatch.setattr(engine, "lane_class", lambda model: GraphLane)

    return switch


def ids(length: int, seed: int) -> list[int]:
    found: list[int] = random_ids(length, seed=seed).tolist()
    return found


def ask(own: Engine, adapter: Adapter, prompt: list[int], how: Sampling = GREEDY, **more: Any) -> Request:
    request = Request(prompt, how, adapter, resumes=True, **more)
    for _ in own.run([request]):
        pass
    return request


def afresh(adapter: Adapter, prompt: list[int], how: Sampling = GREEDY) -> list[int]:
    return [token for _, token in Engine().run([Request(prompt, how, adapter)]) if token is not None]


WINDOWED = {"qkv_bias": True, "head_norms": True, "window": 9, "windowed_layers": (0, 2)}


@LANES
@pytest.mark.parametrize(
    ("which", "sizes"),
    [(0, {}), (2, {}), (5, {}), (0, WINDOWED)],
    ids=["prefix", "plain", "unrotated", "windows"],
)
def test_turn_after_turn_only_the_new_tokens_are_computed(
    ahead: bool, which: int, sizes: dict[str, Any], run_ahead: Any
) -> None:
    if ahead:
        run_ahead()
    adapter, own, prompt = eight(base_of(**sizes))[which], Engine(), ids(20, 1)
    how = [
        GREEDY,
        Sampling(max_new_tokens=7, temperature=1.1, seed=4),
        Sampling(max_new_tokens=8, repetition_penalty=1.3),
    ]
    for turn in range(6):
        request = ask(own, adapter, prompt, how[turn % 3])
        assert request.answer == afresh(adapter, prompt, how[turn % 3])
        # The last token of an answer is not in the cache yet.
        assert request.computed == (20 if turn == 0 else 1 + 5)
        prompt = [*prompt, *request.answer, *ids(5, 10 + turn)]
    (lane,) = own._lanes.values()
    assert len(lane.slots) == 1


@LANES
def test_a_conversation_may_go_back_and_branch(ahead: bool, run_ahead: Any) -> None:
    if ahead:
        run_ahead()
    adapter, own, first = eight(base_of())[0], Engine(), ids(30, 2)
    answer = ask(own, adapter, first).answer
    longer = [*first, *answer, *ids(6, 3)]
    ask(own, adapter, longer)
    back = ask(own, adapter, [*first, *ids(4, 4)])  # most of what the slot holds: it is taken over
    assert back.answer == afresh(adapter, [*first, *ids(4, 4)])
    assert back.computed == 4
    other = ask(own, adapter, [*first[:12], *ids(20, 5)])  # little of it: a copy of the start
    assert other.answer == afresh(adapter, [*first[:12], *ids(20, 5)])
    assert other.computed == 20
    again = [*first, *ids(4, 4), *back.answer, 7]
    assert ask(own, adapter, again).computed == 2
    same = ask(own, adapter, again)
    assert same.computed == 1
    assert same.answer == afresh(adapter, again)


def test_what_another_adapter_computed_is_not_taken_over() -> None:
    adapters, own, prompt = eight(base_of()), Engine(), ids(30, 2)
    ask(own, adapters[0], prompt)
    found = ask(own, adapters[1], prompt)
    assert found.computed == 30
    assert found.answer == afresh(adapters[1], prompt)
    assert ask(own, adapters[0], prompt).computed == 1


def test_other_requests_meanwhile_leave_a_conversation_its_slot() -> None:
    adapter, own, prompt = eight(base_of())[0], Engine(), ids(25, 6)
    answer = ask(own, adapter, prompt).answer
    batch = [Request(ids(length, length), GREEDY, adapter) for length in (4, 9, 30, 12, 6)]
    found: dict[int, list[int]] = {n: [] for n in range(5)}
    for index, token in own.run(batch, 3):
        found[index] += [token] if token is not None else []
    assert [found[n] for n in range(5)] == [afresh(adapter, list(one.prompt)) for one in batch]
    longer = [*prompt, *answer, *ids(3, 7)]
    after = ask(own, adapter, longer)
    assert after.computed == 4
    assert after.answer == afresh(adapter, longer)


@LANES
def test_requests_at_the_same_time_share_a_start(ahead: bool, run_ahead: Any) -> None:
    if ahead:
        run_ahead()
    adapter, own, start = eight(base_of())[3], Engine(), ids(24, 8)
    ask(own, adapter, start)
    prompts = [[*start, *ids(length, 20 + length)] for length in (3, 8, 5, 1)]
    requests = [Request(prompt, GREEDY, adapter, resumes=True) for prompt in prompts]
    for _ in own.run(requests, 4):
        pass
    assert [request.answer for request in requests] == [afresh(adapter, prompt) for prompt in prompts]
    assert [request.computed for request in requests] == [3, 8, 5, 1]


def test_a_stopped_answer_can_be_gone_on_from() -> None:
    adapter, own, prompt = eight(base_of())[0], Engine(), ids(20, 1)
    request = Request(prompt, Sampling(max_new_tokens=30), adapter, resumes=True)
    run = own.run([request])
    told = [next(run)[1] for _ in range(4)]
    run.close()
    longer = [*prompt, *told, *ids(5, 3)]
    after = ask(own, adapter, longer)
    assert after.computed == 6
    assert after.answer == afresh(adapter, longer)


def test_few_slots_are_kept_and_all_can_be_freed() -> None:
    adapter, own = eight(base_of())[0], Engine()
    for seed in range(MOST_KEPT + 4):
        ask(own, adapter, ids(15, 100 + seed))
    (lane,) = own._lanes.values()
    assert len(lane.slots) == MOST_KEPT
    assert ask(own, adapter, ids(15, 100 + MOST_KEPT + 3)).computed == 1
    assert ask(own, adapter, ids(15, 100)).computed == 15  # the first one has lost its slot
    own.forget()
    assert not own._lanes


def test_a_failed_request_leaves_nothing_to_go_on_from() -> None:
    adapter, own, prompt = eight(base_of())[0], Engine(), ids(20, 1)
    request = Request(prompt, GREEDY, adapter, resumes=True)
    run = own.run([request])
    next(run)
    request.fail(UserError("broken"))
    with pytest.raises(UserError, match="broken"):
        list(run)
    assert ask(own, adapter, prompt).computed == 20


@pytest.mark.slow
@settings(max_examples=25)
@given(st.data())
def test_any_order_of_conversations_is_exact(data: st.DataObject) -> None:
    adapters = eight(base_of())[:2]
    own, talks = Engine(), [ids(12, 1), ids(16, 2), ids(12, 1)]
    how = Sampling(max_new_tokens=4)
    for step in range(6):
        which = data.draw(st.integers(0, 2))
        prompt = talks[which]
        if data.draw(st.booleans()):
            prompt = prompt[: data.draw(st.integers(1, len(prompt)))]
        prompt = [*prompt, *ids(data.draw(st.integers(1, 6)), 50 + step)]
        adapter = adapters[data.draw(st.integers(0, 1))]
        if data.draw(st.booleans()):
            plain = Request(ids(9, step), how, adapter)
            for _ in own.run([plain]):
                pass
        request = ask(own, adapter, prompt, how)
        assert request.answer == afresh(adapter, prompt, how)
        talks[which] = [*prompt, *request.answer]


def test_n_common() -> None:
    assert n_common([1, 2, 3], [1, 2, 4]) == 2
    assert n_common([1], [1, 2]) == 1
    assert n_common([], [1]) == 0


CHAT = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "red"}]


def test_chat_from_python(tiny_base: Path, tmp_path: Path) -> None:
    path = save_random_adapter(tiny_base, tmp_path / "a.safetensors")
    model = lit_adapter.load(path, tiny_base, device="cpu", dtype="float32")
    how = {"max_new_tokens": 12}
    talk = [{"role": "user", "content": "Say it back."}]
    for turn in range(3):
        fresh = lit_adapter.load(path, tiny_base, device="cpu", dtype="float32")
        answer = model.chat(talk, **how)
        assert answer == fresh.chat(talk, **how) == "".join(model.stream_chat(talk, **how))
        if turn == 0:  # one message is what an instruction is
            assert answer == model.generate("Say it back.", **how)
        talk += [
            {"role": "assistant", "content": answer or "red"},
            {"role": "user", "content": f"Again {turn}."},
        ]
    talks = [talk[:1], talk[:3], talk]
    assert model.chat_batch(talks, **how) == [model.chat(one, **how) for one in talks]
    model.forget()
    assert not model.engine._lanes


@LANES
def test_a_slot_that_another_request_has_left_is_not_gone_on_from(ahead: bool, run_ahead: Any) -> None:
    """The first request ends and the second moves to its slot, so that the second's old slot holds a copy."""
    if ahead:
        run_ahead()
    adapter, own = eight(base_of())[0], Engine()
    one, other = ids(20, 1), ids(20, 2)
    short = Request(one, Sampling(max_new_tokens=2), adapter)
    long = Request(other, Sampling(max_new_tokens=14), adapter)
    for request in (short, long):
        own.add(request)
    while not short.ended:
        own.step()
    own.step()
    assert not long.ended
    later = Request([*one, 7], GREEDY, adapter, resumes=True)
    own.add(later)
    while not (later.ended and long.ended):
        own.step()
    assert later.answer == afresh(adapter, [*one, 7])
    assert long.answer == afresh(adapter, other, Sampling(max_new_tokens=14))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("hello", "messages is of type str; expected a list of messages"),
        ([], "messages is empty"),
        (CHAT, "messages ends with the assistant's message"),
        ([{"role": "wizard", "content": "x"}], "turn 1: the role is 'wizard'"),
        ([{"role": "user", "content": None}], "turn 1: has no content, or null"),
        ([3], "turn 1: is the number 3; expected an object"),
    ],
)
def test_conversations_that_cannot_be_answered(tiny_base: Path, given: Any, message: str) -> None:
    model = lit_adapter.load(base=tiny_base, device="cpu", dtype="float32")
    with pytest.raises(UserError, match=message):
        model.chat(given)
