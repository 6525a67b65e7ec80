"""Choosing a token, against the distribution written down in numpy; settings and their refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_models import random_llama

from lit_adapter.errors import UserError
from lit_adapter.generation import sampling
from lit_adapter.generation.adapter import Adapter
from lit_adapter.generation.request import Request, TokenLikelihood
from lit_adapter.generation.settings import Sampling

ADAPTER = Adapter.of(random_llama(context_length=10**6))
N_DRAWS = 8192


def random_keys(n: int, seed: int = 0) -> torch.Tensor:
    """The keys of an answer of n tokens."""
    request = Request([1], Sampling(max_new_tokens=n, seed=seed), ADAPTER)
    return request.keys


MARGIN = 1e-5
"""What fp32 and fp64 may decide differently is left out of the comparison."""


def choose(logits: torch.Tensor, how: Sampling, keys: torch.Tensor, seen: Any) -> torch.Tensor:
    choice = sampling.Choice.of([how] * len(logits), logits.device)
    return sampling.choose(logits, choice, None if how.greedy else keys, past_of(seen))


def past_of(seen: torch.Tensor | None) -> sampling.Past | None:
    """Of prompts that have these tokens, before the first token of an answer."""
    return None if seen is None else replace(sampling.Past.empty(*seen.shape), seen=seen)


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
@settings(max_examples=100)
@given(situations(), st.integers(0, 99))
def test_draws_have_the_reference_distribution(case: Any, seed: int) -> None:
    logits, seen, how = case
    adjusted = penalised(logits, seen, how.repetition_penalty)
    assume(np.diff(np.sort(adjusted)).min() > 1e-3)  # equal logits have no order to agree on
    wanted = reference(adjusted, how)
    rows = torch.tensor(logits, dtype=torch.float32).expand(N_DRAWS, -1)
    mask = torch.tensor(seen).expand(N_DRAWS, -1) if how.repetition_penalty != 1 else None
    counts = np.bincount(choose(rows, how, random_keys(N_DRAWS, seed), mask).numpy(), minlength=len(logits))
    deviation = np.sqrt(N_DRAWS * wanted * (1 - wanted))
    assert (np.abs(counts - wanted * N_DRAWS) <= 6 * deviation + 1).all()
    assert not counts[wanted == 0].any()


@pytest.mark.slow
def test_a_whole_vocabulary_is_drawn_as_often_as_it_is_likely() -> None:
    """Chi squared of 2,000 tokens, whose probabilities differ by a factor of 1,000."""
    logits = torch.linspace(0, 7, 2000)[torch.randperm(2000, generator=torch.Generator().manual_seed(1))]
    wanted = logits.double().softmax(-1).numpy() * 200 * 1000
    counts = np.zeros(2000)
    for part in random_keys(200 * 1000).split(1000):
        drawn = choose(logits.expand(1000, -1), Sampling(temperature=1.0), part, None)
        counts += np.bincount(drawn.numpy(), minlength=2000)
    squared = ((counts - wanted) ** 2 / wanted).sum()
    assert abs(squared - 1999) < 5 * (2 * 1999) ** 0.5


@pytest.mark.parametrize("how", [Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.99)])
def test_logits_that_differ_in_their_last_bits_give_the_same_tokens(how: Sampling) -> None:
    """As those of a text computed alone, or beside others, do; here most tokens are about as likely."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40, 50_000, generator=generator)
    noise = 2e-6 * torch.randn(40, 50_000, generator=generator)
    keys = random_keys(40)
    assert torch.equal(choose(logits, how, keys, None), choose(logits + noise, how, keys, None))


@settings(max_examples=100)
@given(situations(), st.integers(-(2**63), 2**63 - 1))
def test_every_draw_stays_among_the_kept(case: Any, key: int) -> None:
    logits, _, how = case
    wanted = reference(logits, how)
    token = choose(torch.tensor(logits[None], dtype=torch.float32), how, torch.tensor([key]), None)
    assert wanted[token.item()] > 0


def test_no_token_without_mass_is_ever_taken() -> None:
    logits = torch.full((1, 50), -1e4)
    logits[0, 7] = 3.0
    logits[0, 8] = 2.9
    drawn = choose(logits.expand(500, -1), Sampling(temperature=1.0), random_keys(500), None)
    assert set(drawn.tolist()) == {7, 8}


@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(temperature=0.0, top_p=0.5), Sampling(temperature=2, top_k=1)]
)
def test_greedy_takes_the_largest(how: Sampling) -> None:
    logits = torch.randn(20, 31, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        choose(logits, how, random_keys(20), None), torch.from_numpy(logits.numpy().argmax(-1))
    )


@pytest.mark.parametrize("how", [Sampling(), Sampling(temperature=0.8, top_p=0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("bad", [[float("nan"), 1, 2], [float("inf"), 1, 2], [-float("inf")] * 3])
def test_logits_that_are_no_numbers_are_told_row_by_row(how: Sampling, bad: list[float]) -> None:
    rows = torch.tensor([bad, [0.0, 9e4, 0.0], [-float("inf"), -float("inf"), 1.0]])
    assert choose(rows, how, random_keys(3), None).tolist() == [-1, 1, 2]


@pytest.mark.parametrize("temperature", [1e-10, 1e-38, 1e-45, 1e-320])
def test_a_tiny_temperature_takes_the_largest(temperature: float) -> None:
    logits = torch.tensor([[79.0, 80.0, -80.0], [-3e38, -9.0, -8.0]])
    assert choose(logits, Sampling(temperature=temperature), random_keys(2), None).tolist() == [1, 2]


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
        ({"frequency_penalty": 2.1}, "frequency_penalty is 2.1; expected a number from -2 to 2"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
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


@settings(max_examples=50)
@given(st.lists(situations(), min_size=2, max_size=5), st.integers(0, 4))
def test_rows_with_their_own_settings_are_chosen_as_alone(cases: Any, greedy: int) -> None:
    vocab = min(len(logits) for logits, _, _ in cases)
    how = [Sampling() if row == greedy else how for row, (_, _, how) in enumerate(cases)]
    logits = torch.stack([torch.tensor(logits[:vocab], dtype=torch.float32) for logits, _, _ in cases])
    seen = torch.stack([torch.tensor(seen[:vocab]) for _, seen, _ in cases])
    keys = random_keys(len(cases), seed=greedy)
    together = sampling.choose(logits, sampling.Choice.of(how, logits.device), keys, past_of(seen))
    alone = [
        choose(logits[row : row + 1], how[row], keys[row : row + 1], seen[row : row + 1])
        for row in range(len(cases))
    ]
    assert torch.equal(together, torch.cat(alone))


@settings(max_examples=60)
@given(situations(), st.data())
def test_penalties_and_biases_are_those_of_the_formula(case: Any, data: st.DataObject) -> None:
    """In fp64, from the list of tokens, one token of the vocabulary after the other."""
    logits, _, how = case
    vocab, penalty = len(logits), st.floats(-2, 2)
    how = replace(how, frequency_penalty=data.draw(penalty), presence_penalty=data.draw(penalty))
    tokens = st.integers(0, vocab - 1)
    prompt = data.draw(st.lists(tokens, min_size=1, max_size=6))
    answer = data.draw(st.lists(tokens, max_size=8))
    bias = data.draw(st.dictionaries(tokens, st.integers(-100, 100).map(float), max_size=4))
    past = sampling.Past.empty(3, vocab)
    past.begin(1, [*range(vocab)], {0: 5.0})  # another request had this row
    past.begin(1, prompt, bias)
    for token in answer:
        past.add(torch.tensor([1]), torch.tensor([token]))
    past.swap(1, 2)
    wanted = []
    for token, logit in enumerate(logits):
        logit = logit + bias.get(token, 0.0)
        if token in prompt + answer:
            logit = logit / how.repetition_penalty if logit > 0 else logit * how.repetition_penalty
        n = answer.count(token)
        wanted.append(logit - how.frequency_penalty * n - how.presence_penalty * (n > 0))
    rows = torch.tensor(logits, dtype=torch.float32).expand(3, -1)
    found = past.adjust(rows, sampling.Choice.of([how] * 3, rows.device))
    np.testing.assert_allclose(found[2].numpy(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], rows[0])
    assert torch.equal(found[0], rows[0])


def test_likelihoods_are_those_of_the_logits() -> None:
    logits = torch.randn(4, 33, generator=torch.Generator().manual_seed(2))
    token = torch.tensor([5, 0, 32, -1])
    log = np.log(np.exp(logits.double().numpy()) / np.exp(logits.double().numpy()).sum(-1, keepdims=True))
    rows = sampling.likelihoods(logits, token).tolist()
    for row, mine, chosen in zip(rows, log, token.tolist(), strict=True):
        found = TokenLikelihood.of(row, 3)
        assert found.log_probability == pytest.approx(mine[max(chosen, 0)], abs=1e-5)
        order = np.argsort(-mine)[:3]
        assert [id_ for id_, _ in found.most_likely] == order.tolist()
        assert [value for _, value in found.most_likely] == pytest.approx(mine[order].tolist(), abs=1e-5)
