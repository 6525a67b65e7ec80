"""Likelihoods of given answers: which of several choices a model would answer, and how probable each is.

The probability of choice c is its likelihood divided by the sum over all choices:

    softmax over c of  sum_t log p(token t of c | prompt, earlier tokens of c)

The tokens are those that training learns for this answer, the end token included. Nothing is divided by the
answer's length: with their end tokens the choices exclude each other, so these are the model's own
probabilities, given that its answer is one of the choices.

A task's prompt is computed once: each choice is a segment that continues it, as records continue a preamble.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from lit_adapter.data.shared_starts import Scored, packed_rows
from lit_adapter.errors import UserError, shorten
from lit_adapter.generation.fallback import go_on_without_kernels
from lit_adapter.generation.request import NonFiniteLogitsError
from lit_adapter.generation.task import Task
from lit_adapter.model.executors import despite_kernels
from lit_adapter.model.llama import Llama
from lit_adapter.model.loss import target_log_likelihoods
from lit_adapter.text.template import Template
from lit_adapter.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ScoredChoice:
    """One of the choices, under one prompt."""

    text: str
    log_likelihood: float
    """Natural logarithm of the probability of the whole answer, its end token included."""
    probability: float
    """Its probability among the choices; these add up to 1."""


@dataclass(frozen=True)
class EncodedChoices:
    """A prompt and the answers to choose from, as token ids."""

    prompt: list[int]
    answers: list[list[int]]
    """The tokens of each choice, with the end token."""


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


@dataclass(frozen=True)
class TextLikelihood:
    """How likely a model finds the scored tokens of a text."""

    log_likelihood: float
    """Their sum, in nats."""
    n_tokens: int
    n_greedy: int
    """How many of them, from the first on, are the likeliest token at their position: the answer of greedy
    decoding begins with these."""
    then: int
    """The token that greedy decoding chooses after these; -1 if they are all of the scored tokens."""

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding gives these tokens."""
        return self.n_greedy == self.n_tokens


def likelihoods(
    model: Llama, texts: Sequence[Scored], finished: Callable[[int], None] | None = None
) -> list[TextLikelihood]:
    """Return the likelihood of each text's scored tokens, in packed rows that share starts.

    ``finished`` is called with the index of each text that is done.

    Raises:
        NonFiniteLogitsError: logits are NaN or infinite.
    """
    found = [TextLikelihood(0.0, 0, 0, -1)] * len(texts)
    for row, owner in packed_rows(texts):
        score = partial(target_log_likelihoods, model, row)
        values, likeliest = despite_kernels(score, partial(go_on_without_kernels, model))
        if not values.isfinite().all():
            raise NonFiniteLogitsError()
        for text in np.unique(owner).tolist():
            mine = torch.from_numpy(owner == text)  # in the order of the text: a shared start first
            unlike = (likeliest[mine] != row.target_id[mine]).nonzero()
            n_greedy = int(unlike[0]) if len(unlike) else int(mine.sum())
            then = int(likeliest[mine][n_greedy]) if len(unlike) else -1
            found[text] = TextLikelihood(float(values[mine].sum()), int(mine.sum()), n_greedy, then)
            if finished is not None:
                finished(text)
    return found


def choose(
    model: Llama,
    tasks: Sequence[EncodedChoices],
    choices: Sequence[str],
    batch_size: int,
    finished: Callable[[int], None] | None = None,
) -> list[list[ScoredChoice]]:
    """Return each task's choices with their probabilities, the most likely one first.

    ``batch_size`` tasks are computed at a time; ``finished`` is called with the index of each that is done.

    Raises:
        NonFiniteLogitsError: logits are NaN or infinite.
    """
    found: list[list[ScoredChoice]] = []
    for start in range(0, len(tasks), batch_size):
        found += [_ranked(choices, of_task) for of_task in _scores(model, tasks[start : start + batch_size])]
        if finished is not None:
            for number in range(start, len(found)):
                finished(number)
    return found


def _scores(model: Llama, tasks: Sequence[EncodedChoices]) -> list[list[float]]:
    """Return the log-likelihood of every choice of each task; they are computed together."""
    texts = [Scored([*task.prompt, *answer], len(task.prompt)) for task in tasks for answer in task.answers]
    found = iter(likelihoods(model, texts))
    return [[next(found).log_likelihood for _ in task.answers] for task in tasks]


def _ranked(choices: Sequence[str], log_likelihoods: Sequence[float]) -> list[ScoredChoice]:
    """Return the choices with their probabilities, the most likely one first."""
    probabilities = torch.tensor(log_likelihoods, dtype=torch.float64).softmax(0).tolist()
    scored = map(ScoredChoice, choices, log_likelihoods, probabilities)
    return sorted(scored, key=lambda choice: -choice.log_likelihood)
