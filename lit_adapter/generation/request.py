"""A request: one prompt to answer, with its own adapter, settings and stop rules."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_adapter.arguments import whole_number
from lit_adapter.errors import UserError
from lit_adapter.generation.adapter import Adapter
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.config import LlamaConfig


class NonFiniteLogitsError(UserError):
    """NaN or infinite logits, due to a damaged file or to an adapter whose training has failed."""

    def __init__(self) -> None:
        super().__init__("the model's logits are NaN or infinite; the base or the adapter is damaged")


def check_prompt(config: LlamaConfig, prompt: Sequence[int], settings: Sampling) -> None:
    """Check that prompt and answer fit the context.

    Raises:
        UserError: too long, or empty; names the numbers.
    """
    context = config.context_length
    if not prompt:
        raise UserError("the prompt has no token; give some text")
    if len(prompt) >= context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, but the base's context is {context}; shorten it"
        )
    if len(prompt) + settings.max_new_tokens > context:
        raise UserError(
            f"the prompt's {len(prompt)} tokens and max_new_tokens {settings.max_new_tokens} exceed the "
            f"base's context of {context}; lower max_new_tokens to {context - len(prompt)} or less"
        )


def check_batch_size(given: Any) -> int:
    """Return a batch size as Python's integer.

    Raises:
        UserError: it is below 1, or not a whole number (a TypeError too).
    """
    batch_size = whole_number("batch_size", given)
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; expected 1 or more")
    return batch_size


def check_stop_ids(config: LlamaConfig, settings: Sampling) -> None:
    """Check that the ids that end an answer are in the vocabulary.

    Raises:
        UserError: one is beyond it.
    """
    most = max(settings.stop_ids, default=0)
    if most >= config.vocab_size:
        raise UserError(f"stop_ids holds {most}, but the base's vocabulary ends at {config.vocab_size - 1}")


class TokenLikelihood(NamedTuple):
    """How likely a token was, before temperature, penalties and biases; natural logarithms."""

    log_probability: float
    most_likely: tuple[tuple[int, float], ...]
    """Ids and log-probabilities of the most likely tokens, as many as were asked for."""

    @classmethod
    def of(cls, row: Sequence[float], most: int) -> TokenLikelihood:
        """Return one row of `sampling.likelihoods` with its ``most`` most likely tokens."""
        n_kept = len(row) // 2
        pairs = zip(row[1 + n_kept :], row[1 : 1 + n_kept], strict=True)
        return cls(row[0], tuple((int(id_), value) for id_, value in pairs)[:most])


@dataclass(eq=False)
class Request:
    """One prompt to answer.

    Raises:
        UserError: a prompt or stop id that does not fit the model.
    """

    prompt: Sequence[int]
    """Token ids."""
    settings: Sampling
    adapter: Adapter
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer, in addition to those of the settings."""
    resumes: bool = False
    """Whether it continues from what a slot holds of its prompt, and leaves its slot to later requests."""
    bias: Mapping[int, float] = field(default_factory=dict)
    """What is added to the logits of some ids."""
    most_likely: int | None = None
    """How many tokens' likelihoods are wanted beside the chosen one's; None for none at all."""
    news: deque[int] = field(default_factory=deque, init=False)
    """Tokens of the answer that its owner has not taken yet."""
    likelihoods: deque[TokenLikelihood] = field(default_factory=deque, init=False)
    """The likelihoods of ``news``, if ``most_likely`` asks for them."""
    answer: list[int] = field(default_factory=list, init=False)
    """The tokens of the answer so far."""
    ended: bool = field(default=False, init=False)
    """Whether no token will follow; its slot is then free."""
    error: BaseException | None = field(default=None, init=False)
    """Why it ended without its whole answer."""
    token: int = field(default=0, init=False)
    """The newest token; it is not in the cache yet."""
    length: int = field(default=0, init=False)
    """Tokens in the cache."""
    computed: int = field(default=0, init=False)
    """Tokens of its prompt that were computed, not taken over from a slot."""

    def __post_init__(self) -> None:
        check_stop_ids(self.adapter.model.config, self.settings)
        check_prompt(self.adapter.model.config, self.prompt, self.settings)
        self.stop_ids = self.stop_ids | frozenset(self.settings.stop_ids)

    @property
    def n_new(self) -> int:
        """Number of tokens of the answer so far."""
        return len(self.answer)

    @property
    def cached(self) -> list[int]:
        """The tokens whose keys and values its slot holds, for certain."""
        return [] if self.error is not None else [*self.prompt, *self.answer][: self.length]

    @property
    def adjusted(self) -> bool:
        """Whether penalties or a bias change its logits."""
        return self.settings.penalised or bool(self.bias)

    @cached_property
    def keys(self) -> Tensor:
        """The random keys of its tokens: the n-th token is drawn with the n-th key, alone or in a batch."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        n, least = self.settings.max_new_tokens, torch.iinfo(torch.long).min
        return torch.empty(n, dtype=torch.long).random_(least, None, generator=generator)

    def receive(self, token: int, likelihoods: Sequence[float] | None = None) -> None:
        """Take the token chosen for it; -1 says that its logits are NaN or infinite.

        ``likelihoods`` is its row of `sampling.likelihoods`.
        """
        if self.ended:  # cancelled meanwhile
            return
        if token < 0:
            self.fail(NonFiniteLogitsError())
            return
        self.token = token
        if token in self.stop_ids:
            self.ended = True
            return
        self.answer.append(token)
        if likelihoods is not None and self.most_likely is not None:
            self.likelihoods.append(TokenLikelihood.of(likelihoods, self.most_likely))
        self.news.append(token)
        # Never set to False: another thread may have ended it.
        if self.n_new >= self.settings.max_new_tokens:
            self.ended = True

    def fail(self, error: BaseException) -> None:
        """End with an error, which its owner is given."""
        self.error, self.ended = error, True
