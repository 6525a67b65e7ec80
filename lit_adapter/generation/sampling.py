"""How the next token of each row is chosen from its logits. Letters: B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_adapter.generation.settings import Sampling


@dataclass
class Choice:
    """The settings of every row, as tensors ``[B]``."""

    greedy: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    penalty: Tensor

    @classmethod
    def of(cls, settings: Sequence[Sampling], device: torch.device) -> Choice:
        """Return the settings of rows in the form that `choose` takes."""
        # Bounded below: a tiny temperature must not divide to an infinity or 0 / 0.
        table = [
            (max(how.temperature, 1e-30), how.top_p, how.min_p, how.repetition_penalty) for how in settings
        ]
        temperature, top_p, min_p, penalty = torch.tensor(table, dtype=torch.float32).T.to(device)
        greedy, top_k = torch.tensor([(how.greedy, min(how.top_k, 2**31)) for how in settings]).T.to(device)
        return cls(greedy.bool(), temperature, top_k, top_p, min_p, penalty)

    def put(self, rows: Tensor, other: Choice) -> None:
        """Replace the settings of ``rows``."""
        for own, new in zip(vars(self).values(), vars(other).values(), strict=True):
            own[rows] = new


def choose(
    logits: Tensor, choice: Choice | None, uniform: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """Choose a token in each row.

    Args:
        logits: ``[B, V]``.
        choice: the rows' settings; None takes the largest logit in every row.
        uniform: a random number in [0, 1) for each row ``[B]``; None if every row is greedy.
        seen: which tokens a row already holds ``[B, V]``; None if no row has a repetition penalty.

    Returns:
        Token ids ``[B]``; -1 where a row's logits are NaN or infinite.
    """
    logits = logits.float()
    broken = ~logits.amax(-1).isfinite()  # NaN anywhere, an overflow, or nothing to choose from
    if seen is not None and choice is not None:
        penalty = choice.penalty[:, None]
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    token = logits.argmax(-1)
    if uniform is not None and choice is not None:
        token = torch.where(choice.greedy, token, _sample(logits, choice, uniform))
    return token.masked_fill(broken, -1)


def _sample(logits: Tensor, choice: Choice, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution of the kept tokens, most likely first, at ``uniform``."""
    temperature, top_k, top_p, min_p = (
        x[:, None] for x in (choice.temperature, choice.top_k, choice.top_p, choice.min_p)
    )
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    probability, token = logits.softmax(-1).sort(-1, descending=True)
    keep = probability >= min_p * probability[:, :1]
    # At 1, a sum that was rounded up would cut off the tail of a large vocabulary.
    keep &= (probability.cumsum(-1) - probability < top_p) | (top_p >= 1)
    keep &= (torch.arange(logits.shape[1], device=logits.device) < top_k) | (top_k == 0)
    keep &= probability > 0
    keep[:, 0] = True
    cumulative = (probability * keep).cumsum(-1)
    point = (uniform.to(cumulative) * cumulative[:, -1]).unsqueeze(-1)
    # The kept tokens come first; rounded up to all of their mass, the point would pass the last of them.
    last = keep.sum(-1, keepdim=True) - 1
    rank = torch.searchsorted(cumulative, point, right=True).minimum(last)
    return token.gather(-1, rank).squeeze(-1)
