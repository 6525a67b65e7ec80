"""The likelihood of a plain text of any length, by the usual way of measuring perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.choosing import Scored, likelihoods
from lit_adapter.progress import count_progress

LONGEST_WINDOW = 2048
"""Most tokens of context when a plain file is measured."""


def windows(ids: Sequence[int], prefix: int, length: int) -> list[Scored]:
    """Cut a text into windows of at most ``length`` tokens of context, each token scored once.

    The first token is predicted from ``prefix``. The last window is as long as the others and scores only the
    tokens that are left, as in lm-evaluation-harness.
    """
    padded = [prefix, *ids]
    found = []
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        first = 0 if start == 0 else end - length
        found.append(Scored(padded[first : end + 1], start + 1 - first))
    return found


@dataclass(frozen=True)
class PlainText:
    """How well a model predicts a plain text."""

    tokens: int
    perplexity: float
    """Of a token: comparable between models with the same tokenizer."""
    bits_per_byte: float
    """Comparable between all models."""


def plain_text(model: AdaptedLlama, text: str, title: str) -> PlainText:
    """Measure a text, without a template."""
    tokenizer = model.tokenizer
    prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    length = min(model.model.config.context_length, LONGEST_WINDOW)
    parts = windows(tokenizer.encode(text), prefix, length)
    with count_progress(f"plain text, {title}", len(parts)) as finished:
        found = likelihoods(model.model, parts, finished)
    total, n_tokens = -sum(part.log_likelihood for part in found), sum(part.n_tokens for part in found)
    return PlainText(n_tokens, math.exp(total / n_tokens), total / math.log(2) / len(text.encode()))
