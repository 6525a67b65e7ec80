"""How the next token is chosen from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_adapter.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Settings of one generation.

    Raises:
        UserError: a value out of its range.
    """

    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 takes the most likely token (greedy); 1 samples from the model's own distribution."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Sample among tokens at least this share as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divide (or multiply, if negative) the logits of tokens seen before; 1: off (arXiv 1909.05858)."""
    seed: int = 0
    """Of the samples: the same seed gives the same text, alone or in a batch."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer, beside the base's own."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; expected 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; expected a finite number, 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; expected 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected a number above 0, up to 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; expected a number from 0 (off) to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; expected a number above 0")
        if "" in self.stop:
            raise UserError("stop holds an empty text, which every answer contains; remove it")

    @property
    def greedy(self) -> bool:
        """Whether no random number is drawn."""
        return self.temperature == 0 or self.top_k == 1


def choose(logits: Tensor, settings: Sampling, uniform: Tensor, seen: Tensor | None) -> Tensor:
    """Choose a token in each row.

    Args:
        logits: ``[B, V]``.
        settings: how to choose.
        uniform: one random number in [0, 1) per row ``[B]``; not read when greedy.
        seen: which tokens a row holds already ``[B, V]``; None without a repetition penalty.

    Returns:
        Token ids ``[B]``; -1 where a row's logits are not numbers.
    """
    logits = logits.float()
    broken = logits.isnan().any(-1)
    if seen is not None:
        penalty = settings.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    token = logits.argmax(-1) if settings.greedy else _sample(logits, settings, uniform)
    return token.masked_fill(broken, -1)


def _sample(logits: Tensor, settings: Sampling, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution of the kept tokens, most likely first, at ``uniform``."""
    probability, token = (logits / settings.temperature).softmax(-1).sort(-1, descending=True)
    before = probability.cumsum(-1) - probability
    keep = (before < settings.top_p) & (probability >= settings.min_p * probability[:, :1])
    if settings.top_k:
        keep[:, settings.top_k :] = False
    keep[:, 0] = True
    cumulative = (probability * keep).cumsum(-1)
    # The point stays below the kept mass, so the first token whose sum passes it is a kept one.
    point = (uniform.to(cumulative) * cumulative[:, -1]).unsqueeze(-1)
    rank = torch.searchsorted(cumulative, point, right=True).clamp_(max=logits.shape[-1] - 1)
    return token.gather(-1, rank).squeeze(-1)
