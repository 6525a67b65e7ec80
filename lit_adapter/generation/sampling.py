"""How the next token is chosen from its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_adapter.generation.settings import Sampling


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
