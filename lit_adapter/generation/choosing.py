"""Likelihoods of given answers: which of several choices a model would answer, and how probable each is.

The probability of choice c is its likelihood divided by the sum over all choices:

    softmax over c of  sum_t log p(token t of c | prompt, earlier tokens of c)

The tokens are those that training learns for this answer, the end token included. Nothing is divided by the
answer's length: with their end tokens the choices exclude each other, so these are the model's own
probabilities, given that it answers with one of the choices.

A task's prompt is computed once: each choice is a segment that continues it, as records continue a preamble.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lit_adapter.errors import UserError, shorten
from lit_adapter.generation.request import NonFiniteLogitsError
from lit_adapter.generation.task import Task
from lit_adapter.model.attention import PackedRow, SegmentView
from lit_adapter.model.llama import Llama
from lit_adapter.model.loss import CHUNK_LOGITS
from lit_adapter.text.template import Template
from lit_adapter.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ScoredChoice:
    """One of the choices, under one prompt."""

    text: str
    log_likelihood: float
    """Natural logarithm of the probability of the whole answer, its end token included."""
    probability: float
    """Among the choices: theirs add up to 1."""


@dataclass(frozen=True)
class EncodedChoices:
    """A prompt and the answers to choose from, as token ids."""

    prompt: list[int]
    answers: list[list[int]]
    """Of each choice: its tokens and the end token."""


def encode_choices(
    tokenizer: Tokenizer, template: Template, task: Task, choices: Sequence[str], context: int
) -> EncodedChoices:
    """Encode a prompt with each choice as training does.

    Raises:
        UserError: a choice that does not fit the base's context with the prompt, or two choices with the same
            tokens; as `Template.encode_example`.
    """
    answers: dict[tuple[int, ...], str] = {}
    for choice in choices:
        ids, n_prompt = template.encode_example(tokenizer, *task, choice)
        if len(ids) > context:
            raise UserError(
                f"the prompt's {n_prompt} tokens and the {len(ids) - n_prompt} of choice {shorten(choice)} "
                f"exceed the base's context of {context}; shorten one of them"
            )
        same = answers.setdefault(tuple(ids[n_prompt:]), choice)
        if same != choice:
            raise UserError(f"choices {shorten(same)} and {shorten(choice)} have the same tokens; keep one")
    return EncodedChoices(ids[:n_prompt], list(map(list, answers)))


@torch.inference_mode()
def score(model: Llama, tasks: Sequence[EncodedChoices]) -> list[list[float]]:
    """Return the log-likelihood of every choice of each task, which are computed as one row.

    Raises:
        NonFiniteLogitsError: logits are NaN or infinite.
    """
    row, choice = _row(tasks)
    ids, position, target_index, target_id = row.inputs(model.embed_tokens.weight.device)
    view = SegmentView(row, model.rotation(position[None]))
    hidden = model(ids[None], view, target_index).squeeze(0)
    n_rows = max(1, CHUNK_LOGITS // model.config.vocab_size)
    losses = [
        F.cross_entropy(model.logits(part).float(), target, reduction="none")
        for part, target in zip(hidden.split(n_rows), target_id.split(n_rows), strict=True)
    ]
    counts = [len(task.answers) for task in tasks]
    total = torch.zeros(sum(counts), dtype=torch.float64).index_add(
        0, choice, -torch.cat(losses).double().cpu()
    )
    if not total.isfinite().all():
        raise NonFiniteLogitsError()
    return [part.tolist() for part in total.split(counts)]


def rank(choices: Sequence[str], log_likelihoods: Sequence[float]) -> list[ScoredChoice]:
    """Return the choices with their probabilities, the most likely one first."""
    probabilities = torch.tensor(log_likelihoods, dtype=torch.float64).softmax(0).tolist()
    scored = map(ScoredChoice, choices, log_likelihoods, probabilities)
    return sorted(scored, key=lambda choice: -choice.log_likelihood)


def _row(tasks: Sequence[EncodedChoices]) -> tuple[PackedRow, torch.Tensor]:
    """Return a row of prompts, each followed by its answers, and which choice every target belongs to."""
    tokens: list[tuple[int, int, int, int]] = []  # id, position, segment, preamble
    targets: list[tuple[int, int, int]] = []  # index in the row, id, choice
    segment = n_choices = 0
    for task in tasks:
        prompt, preamble = task.prompt, segment
        tokens += [(token, place, segment, preamble) for place, token in enumerate(prompt)]
        last = len(tokens) - 1
        for answer in task.answers:
            segment += 1
            places = [last, *range(len(tokens), len(tokens) + len(answer) - 1)]
            targets += [(place, token, n_choices) for place, token in zip(places, answer, strict=True)]
            tokens += [
                (token, len(prompt) + place, segment, preamble) for place, token in enumerate(answer[:-1])
            ]
            n_choices += 1
        segment += 1
    ids, position, segments, preambles = torch.tensor(tokens).unbind(1)
    index, target, choice = torch.tensor(sorted(targets)).unbind(1)
    return PackedRow(ids, position, segments, preambles, index, target), choice
