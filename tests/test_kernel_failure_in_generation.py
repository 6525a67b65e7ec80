"""A kernel that does not compile while requests are answered: the modules compute the rest of every answer.

The device is replaced as in `test_graph_lane`, and the CUDA executor by the modules, which break what they
were about to write before they fail.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
from test_engine import HOW, PROMPTS, alone, base_of, eight
from test_generate import tiny
from test_graph_lane import _LateLanding
from tiny_models import random_ids
from torch import Tensor

from lit_adapter.data.shared_starts import Scored
from lit_adapter.errors import UserError
from lit_adapter.generation import choosing, engine, graph_lane, lane
from lit_adapter.generation.adapter import Adapter
from lit_adapter.generation.choosing import likelihoods
from lit_adapter.generation.engine import Engine
from lit_adapter.generation.graph_lane import GraphLane
from lit_adapter.generation.lane import Lane
from lit_adapter.generation.request import Request
from lit_adapter.generation.settings import Sampling
from lit_adapter.model import executors
from lit_adapter.model.cache import ModuleDecode
from lit_adapter.model.executors import Executor, KernelError, kernels_given_up
from lit_adapter.model.pieces import Piece

WARNING = (
    "warning: the kernel _some_kernel does not compile on this device ('PassManager::run failed'); "
    "generation goes on without kernels, which is slower\n"
)


class Failing:
    """Fails at the ``at``-th ``moment``, and counts what is asked of the kernels after that."""

    def __init__(self) -> None:
        self.moment, self.at = "", 0
        self.count = self.later = 0

    def now(self, moment: str) -> bool:
        self.later += kernels_given_up() is not None
        self.count += moment == self.moment
        return moment == self.moment and self.count == self.at

    def error(self) -> KernelError:
        return KernelError("_some_kernel", RuntimeError("PassManager::run failed"))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    state = Failing()

    class Kernels(ModuleDecode):
        def _write_nonsense(self, slot: int, places: slice) -> None:
            for x in (self.cache.k, self.cache.v):
                x[:, slot, :, places] = 1e3

        def read(self, pieces: Sequence[Piece]) -> Tensor:
            if state.now("go_on" if any(piece.done for piece in pieces) else "read"):
                for piece in pieces:
                    self._write_nonsense(piece.slot, slice(piece.done, len(piece.prompt)))
                raise state.error()
            return super().read(pieces)

        def step(self, token: Sequence[int], position: Sequence[int]) -> Tensor:
            if state.now("step"):
                for slot, place in enumerate(position):
                    self._write_nonsense(slot, slice(place, place + 1))
                raise state.error()
            return super().step(token, position)

    def executor_class(self: Lane) -> type[ModuleDecode]:
        return Kernels if self.executor_name == "CUDA decoding" else ModuleDecode

    def capture(body: Callable[[], None]) -> Callable[[], None]:
        if kernels_given_up() is None and state.now("capture"):
            raise state.error()
        return body

    def advance(logits: Tensor, chosen: Tensor, token: Tensor, place: Tensor, last_place: Tensor) -> None:
        chosen.copy_(logits.argmax(-1))
        token.copy_(chosen)
        place.copy_((place + 1).minimum(last_place))

    greedy = ModuleType("lit_adapter.model.kernels.greedy")
    greedy.advance = advance  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lit_adapter.model.kernels.greedy", greedy)
    monkeypatch.setattr(executors, "_given_up", [])
    monkeypatch.setattr(lane, "choose_executor", _choice)
    monkeypatch.setattr(Lane, "executor_class", executor_class)
    monkeypatch.setattr(graph_lane, "Landing", _LateLanding)
    monkeypatch.setattr(graph_lane, "capture", capture)
    return state


@pytest.fixture(scope="module")
def adapters() -> list[Adapter]:
    return eight(base_of())


@pytest.fixture(scope="module")
def wanted(adapters: list[Adapter]) -> list[list[int]]:
    return [alone(number, adapters) for number in range(8)]


def _choice(*_: Any) -> Executor:
    why = kernels_given_up()
    return Executor("CUDA decoding" if why is None else "modules", why)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        (Lane, "read"),
        (Lane, "go_on"),
        (Lane, "step"),
        (GraphLane, "read"),
        (GraphLane, "go_on"),
        (GraphLane, "capture"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_answers_under_way_are_what_they_would_have_been(
    kind: type[Lane],
    moment: str,
    at: int,
    adapters: list[Adapter],
    wanted: list[list[int]],
    failing: Failing,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Eight adapters and settings; requests join while others are answered, some read in pieces."""
    monkeypatch.setattr(engine, "lane_class", lambda model: kind)
    failing.moment, failing.at = moment, at
    running = Engine()
    running.prompt_tokens = 12
    requests = [Request(*each) for each in zip(PROMPTS, HOW, adapters, strict=True)]
    waiting = list(requests)
    for _ in range(100):
        for _ in range(min(2, len(waiting))):
            running.add(waiting.pop(0))
        running.step()
    assert [request.answer for request in requests] == wanted
    assert capsys.readouterr().err == WARNING
    assert failing.later == 0


def test_a_sharded_base_ends_the_answers_in_one_line(failing: Failing) -> None:
    """Other processes may be waiting for a layer that this one would not gather again."""
    model = tiny()
    model.is_sharded = True
    failing.moment, failing.at = "step", 2
    request = Request([5, 6, 7], Sampling(max_new_tokens=9), Adapter.of(model))
    with pytest.raises(
        UserError, match=r"the kernel _some_kernel does not compile on this device .* cannot go on"
    ):
        list(Engine().run([request]))
    assert request.n_new == 2


def test_likelihoods_are_computed_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny()
    texts = [Scored(random_ids(length, seed=length).tolist(), 2) for length in (5, 9, 7)]
    wanted, compute = likelihoods(model, texts), choosing.target_log_likelihoods
    monkeypatch.setattr(executors, "_given_up", [])

    def fails_once(*given: Any) -> Any:
        if kernels_given_up() is None:
            raise Failing().error()
        return compute(*given)

    monkeypatch.setattr(choosing, "target_log_likelihoods", fails_once)
    assert likelihoods(model, texts) == wanted
    assert capsys.readouterr().err == WARNING
