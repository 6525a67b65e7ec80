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
    broken = ~logits.amax(-1).isfinite()  # NaN anywhere, an overflow, or nothing to choose from
    if seen is not None:
        penalty = settings.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    token = logits.argmax(-1) if settings.greedy else _sample(logits, settings, uniform)
    return token.masked_fill(broken, -1)


def _sample(logits: Tensor, settings: Sampling, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution of the kept tokens, most likely first, at ``uniform``."""
    # Without the largest logit, and bounded below, a tiny temperature divides to no infinity or 0 / 0.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(settings.temperature, 1e-30)
    probability, token = logits.softmax(-1).sort(-1, descending=True)
    keep = probability >= settings.min_p * probability[:, :1]
    if settings.top_p < 1:  # at 1, a sum rounded up would cut off a large vocabulary's tail
        keep &= probability.cumsum(-1) - probability < settings.top_p
    if settings.top_k:
        keep[:, settings.top_k :] = False
    keep &= probability > 0
    keep[:, 0] = True
    cumulative = (probability * keep).cumsum(-1)
    point = (uniform.to(cumulative) * cumulative[:, -1]).unsqueeze(-1)
    # The kept tokens come first; rounded up to all of their mass, the point would pass the last of them.
    last = keep.sum(-1, keepdim=True) - 1
    rank = torch.searchsorted(cumulative, point, right=True).minimum(last)
    return token.gather(-1, rank).squeeze(-1)
