"""Choosing a token, against the distribution written down in numpy; settings and their refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lit_adapter.errors import UserError
from lit_adapter.generation import sampling
from lit_adapter.generation.settings import Sampling

GRID = 4096
UNIFORM = (torch.arange(GRID, dtype=torch.float64) + 0.5).float() / GRID
MARGIN = 1e-5
"""What fp32 and fp64 may decide differently is left out of the comparison."""


def choose(logits: torch.Tensor, how: Sampling, uniform: torch.Tensor, seen: Any) -> torch.Tensor:
    choice = sampling.Choice.of([how] * len(logits), logits.device)
    return sampling.choose(logits, choice, None if how.greedy else uniform, seen)


def penalised(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    return np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)


def reference(logits: np.ndarray, how: Sampling) -> np.ndarray:
    """The probability of every token, in fp64, one rule after the other on the whole distribution."""
    weight = np.exp((logits - logits.max()) / how.temperature)
    share = weight / weight.sum()
    order = np.argsort(-share)
    allowed = np.zeros(len(share), dtype=bool)
    reached = 0.0
    for rank, token in enumerate(order):
        assume(abs(reached - how.top_p) > MARGIN)
        assume(abs(share[token] - how.min_p * share[order[0]]) > MARGIN * share[order[0]] or rank == 0)
        if how.top_k and rank >= how.top_k:
            break
        if rank > 0 and (reached >= how.top_p or share[token] < how.min_p * share[order[0]]):
            break
        allowed[token] = True
        reached += share[token]
    kept = np.where(allowed, share, 0.0)
    return kept / kept.sum()


@st.composite
def situations(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Sampling]:
    vocab = draw(st.integers(2, 30))
    logits = np.array(draw(st.lists(st.integers(-90, 90), min_size=vocab, max_size=vocab, unique=True))) / 10
    seen = np.array(draw(st.lists(st.booleans(), min_size=vocab, max_size=vocab)))
    how = Sampling(
        temperature=draw(st.floats(0.2, 4.0)),
        top_k=draw(st.sampled_from([0, 0, 2, 3, vocab, vocab + 5])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.9, 0.5, 1e-3])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
    )
    return logits, seen, how


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(situations())
def test_an_even_grid_of_numbers_gives_the_reference_distribution(case: Any) -> None:
    logits, seen, how = case
    adjusted = penalised(logits, seen, how.repetition_penalty)
    assume(np.diff(np.sort(adjusted)).min() > 1e-3)  # equal logits have no order to agree on
    wanted = reference(adjusted, how)
    rows = torch.tensor(logits, dtype=torch.float32).expand(GRID, -1)
    mask = torch.tensor(seen).expand(GRID, -1) if how.repetition_penalty != 1 else None
    counts = np.bincount(choose(rows, how, UNIFORM, mask).numpy(), minlength=len(logits))
    # Of GRID points evenly spread over [0, 1), an interval of length p holds p * GRID, give or take one.
    assert np.abs(counts - wanted * GRID).max() <= 1.1
    assert not counts[wanted == 0].any()


@settings(max_examples=100, deadline=None)
@given(situations())
def test_the_largest_random_number_stays_among_the_kept(case: Any) -> None:
    logits, _, how = case
    wanted = reference(logits, how)
    largest = torch.tensor([1 - 2.0**-24])
    token = choose(torch.tensor(logits[None], dtype=torch.float32), how, largest, None)
    assert wanted[token.item()] > 0


def test_no_token_without_mass_is_ever_taken() -> None:
    logits = torch.full((1, 50), -1e4)
    logits[0, 7] = 3.0
    logits[0, 8] = 2.9
    for number in (0.0, 0.5, 1 - 2.0**-24):
        assert choose(logits, Sampling(temperature=1.0), torch.tensor([number]), None).item() in (7, 8)


@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(temperature=0.0, top_p=0.5), Sampling(temperature=2, top_k=1)]
)
def test_greedy_takes_the_largest(how: Sampling) -> None:
    logits = torch.randn(20, 31, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        choose(logits, how, torch.zeros(20), None), torch.from_numpy(logits.numpy().argmax(-1))
    )


@pytest.mark.parametrize("how", [Sampling(), Sampling(temperature=0.8, top_p=0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("bad", [[float("nan"), 1, 2], [float("inf"), 1, 2], [-float("inf")] * 3])
def test_logits_that_are_no_numbers_are_told_row_by_row(how: Sampling, bad: list[float]) -> None:
    rows = torch.tensor([bad, [0.0, 9e4, 0.0], [-float("inf"), -float("inf"), 1.0]])
    assert choose(rows, how, torch.full((3,), 0.3), None).tolist() == [-1, 1, 2]


@pytest.mark.parametrize("temperature", [1e-10, 1e-38, 1e-45, 1e-320])
def test_a_tiny_temperature_takes_the_largest(temperature: float) -> None:
    logits = torch.tensor([[79.0, 80.0, -80.0], [-3e38, -9.0, -8.0]])
    assert choose(logits, Sampling(temperature=temperature), torch.full((2,), 0.9), None).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected 1 or more"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"stop": ("a", "")}, "stop holds an empty text"),
        ({"temprature": 1}, "unknown sampling setting 'temprature'; did you mean 'temperature'?"),
        ({"zzz": 1}, "unknown sampling setting 'zzz'; expected max_new_tokens, temperature"),
    ],
)
def test_wrong_settings_are_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling.of(**value)


@settings(max_examples=50, deadline=None)
@given(st.lists(situations(), min_size=2, max_size=5), st.integers(0, 4))
def test_rows_with_their_own_settings_are_chosen_as_alone(cases: Any, greedy: int) -> None:
    vocab = min(len(logits) for logits, _, _ in cases)
    how = [Sampling() if row == greedy else how for row, (_, _, how) in enumerate(cases)]
    logits = torch.stack([torch.tensor(logits[:vocab], dtype=torch.float32) for logits, _, _ in cases])
    seen = torch.stack([torch.tensor(seen[:vocab]) for _, seen, _ in cases])
    uniform = UNIFORM[:: GRID // len(cases)][: len(cases)]
    together = sampling.choose(logits, sampling.Choice.of(how, logits.device), uniform, seen)
    alone = [
        choose(logits[row : row + 1], how[row], uniform[row : row + 1], seen[row : row + 1])
        for row in range(len(cases))
    ]
    assert torch.equal(together, torch.cat(alone))
