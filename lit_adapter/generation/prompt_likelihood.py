"""How likely the tokens of a given text are, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lit_adapter.generation.request import NonFiniteLogitsError, TokenLikelihood
from lit_adapter.generation.sampling import likelihoods
from lit_adapter.model.attention import CausalView
from lit_adapter.model.llama import Llama
from lit_adapter.model.loss import CHUNK_LOGITS


@torch.inference_mode()
def prompt_likelihoods(model: Llama, ids: Sequence[int], most: int) -> list[TokenLikelihood]:
    """Return the likelihoods of all tokens but the first, each after those before it.

    Args:
        model: with its adapter attached.
        ids: one token or more.
        most: how many of the most likely tokens to return at each place.

    Raises:
        NonFiniteLogitsError: logits are NaN or infinite.
    """
    device = model.embed_tokens.weight.device
    text = torch.tensor([list(ids)], device=device)
    position = torch.arange(len(ids), device=device)[None]
    hidden = model(text, CausalView(model.rotation(position)))[0, :-1]
    n_rows = max(1, CHUNK_LOGITS // model.config.vocab_size)
    found: list[TokenLikelihood] = []
    for part, token in zip(hidden.split(n_rows), text[0, 1:].split(n_rows), strict=True):
        rows = likelihoods(model.logits(part), token)
        if not rows.isfinite().all():
            raise NonFiniteLogitsError()
        found += [TokenLikelihood.of(row, most) for row in rows.tolist()]
    return found
