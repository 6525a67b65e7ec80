"""Rows that share starts: the same likelihoods as whole texts one by one, in fewer tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import open_adapter, random_llama

from lit_adapter.data.shared_starts import Scored, groups, packed_rows
from lit_adapter.generation.choosing import likelihoods
from lit_adapter.model import loss
from lit_adapter.model.attention import CausalView
from lit_adapter.model.config import AdapterConfig
from lit_adapter.model.llama import Llama

MODEL = open_adapter(random_llama(), AdapterConfig(layers=2, prompt_length=3))
HEAD = open_adapter(random_llama(1), AdapterConfig(version="v2", head=True))
"""With a bias and a scale on the output layer."""
TEXTS = st.lists(
    st.tuples(
        st.sampled_from([(), (5, 6, 7, 8, 9), (5, 6, 7, 8, 9, 10, 11), (5, 6)]),
        st.lists(st.integers(0, 60), max_size=9),
    ),
    min_size=1,
    max_size=12,
)


def scored(drawn: list[tuple[tuple[int, ...], list[int]]]) -> list[Scored]:
    texts = []
    for start, rest in drawn:
        ids = [1, *start, *rest, 2]
        texts.append(Scored(ids, max(1, min(len(ids) - 1, len(start) + len(rest) % 3))))
    return texts


@torch.inference_mode()
def alone(model: Llama, text: Scored) -> tuple[float, list[int]]:
    """The likelihood from the logits of the whole text, and the likeliest token at each scored place."""
    ids = torch.tensor([text.ids])
    view = CausalView(model.rotation(torch.arange(ids.shape[1])[None]))
    logits = model.logits(model(ids, view))[0].double()
    share = logits - logits.logsumexp(-1, keepdim=True)
    places = range(text.n_context, len(text.ids))
    likeliest = [int(logits[place - 1].argmax()) for place in places]
    return sum(float(share[place - 1, text.ids[place]]) for place in places), likeliest


@settings(max_examples=40)
@given(TEXTS, st.sampled_from([6, 20, 2048]), st.sampled_from([MODEL, HEAD]), st.sampled_from([7, 64]))
def test_every_text_has_the_likelihood_that_it_has_alone(
    drawn: list[tuple[tuple[int, ...], list[int]]], row_tokens: int, model: Llama, n_columns: int
) -> None:
    texts = scored(drawn)
    owners = [owner for _, owner in packed_rows(texts, row_tokens)]
    assert sorted({int(text) for owner in owners for text in owner}) == list(range(len(texts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CPU_COLUMNS", n_columns)
        scored_texts = likelihoods(model, texts)
    for text, found in zip(texts, scored_texts, strict=True):
        expected, likeliest = alone(model, text)
        wanted = list(text.ids[text.n_context :])
        assert abs(found.log_likelihood - expected) < 1e-6
        assert (found.n_tokens, found.is_greedy) == (len(wanted), likeliest == wanted)
        begun = [*wanted[: found.n_greedy], *([] if found.is_greedy else [found.then])]
        assert likeliest[: len(begun)] == begun


@given(TEXTS)
def test_sharing_never_takes_more_tokens_than_whole_texts(
    drawn: list[tuple[tuple[int, ...], list[int]]],
) -> None:
    texts = scored(drawn)
    found = groups(texts)
    assert sum(group.cost for group in found) <= sum(len(text.ids) - 1 for text in texts)
    assert sorted(i for group in found for i in group.texts) == list(range(len(texts)))
    assert sum(len(row.ids) for row, _ in packed_rows(texts)) == max(1, sum(group.cost for group in found))


def test_the_level_that_saves_most_is_shared() -> None:
    examples, question = list(range(3, 43)), [[50 + q] * 10 for q in range(4)]
    few_shot = [Scored([1, *examples, *q, choice], 51) for q in question for choice in (44, 45)]
    (group,) = groups(few_shot)  # one start for all questions: each is short
    assert group.n_shared == 41
    long_context = [
        Scored([1, *range(3, 8), *[50 + q] * 40, choice], 46) for q in range(4) for choice in (44, 45)
    ]
    assert [group.n_shared for group in groups(long_context)] == [46] * 4


def test_a_logit_far_below_the_others_costs_no_precision() -> None:
    """The output layer's bias moves the first of each block; log-likelihoods are never positive."""
    model = open_adapter(random_llama(1), AdapterConfig(version="v2", head=True))
    texts = [Scored([1, 5, 6, 8, 9, 2], 1)]
    [[row, _]] = packed_rows(texts)
    with torch.no_grad():
        model.lm_head.adapter_bias[::7] -= 1e9
        expected = -float(loss.row_loss(model.double(), row))
        model.float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CPU_COLUMNS", 7)
        scores, _ = loss.target_log_likelihoods(model, row)
    assert float(scores.sum()) == pytest.approx(expected, rel=1e-6)
    assert scores.max() < 0
