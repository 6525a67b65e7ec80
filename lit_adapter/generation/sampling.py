"""How the next token of each row is chosen from its logits. Letters: B rows, V vocabulary.

A token is drawn by the Gumbel-max trick: the largest ``log p(v) - log E(v)``, where E(v) is exponentially
distributed, has probability p(v). E(v) is a hash of the row's key and of v. The logits of a text differ in
their last bits when it is computed beside others; that changes a token only if two of these values are equal
to that precision. Comparing a random number with cumulative probabilities would change it more often: where
about equally likely tokens swap places in the order, all of them move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    truncates: bool = True
    """Whether a row may use one of the settings that leave out the less likely tokens."""

    @classmethod
    def of(cls, settings: Sequence[Sampling], device: torch.device) -> Choice:
        """Return the settings of rows in the form that `choose` takes."""
        # Bounded below: a tiny temperature must not divide to an infinity or 0 / 0.
        table = [
            (
                max(how.temperature, 1e-30),
                how.top_p,
                how.min_p,
                how.repetition_penalty,
                how.frequency_penalty,
                how.presence_penalty,
            )
            for how in settings
        ]
        temperature, top_p, min_p, *penalties = torch.tensor(table, dtype=torch.float32).T.to(device)
        greedy, top_k = torch.tensor([(how.greedy, min(how.top_k, 2**31)) for how in settings]).T.to(device)
        truncates = any(how.truncates for how in settings)
        repetition, frequency, presence = penalties
        return cls(
            greedy.bool(), temperature, top_k, top_p, min_p, repetition, frequency, presence, truncates
        )

    def of_rows(self, rows: Any) -> Choice:
        """Return the settings of some rows."""
        own: dict[str, Any] = {name: x[rows] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **own)

    def put(self, rows: Any, other: Choice) -> None:
        """Replace the settings of ``rows``."""
        for own, new in zip(vars(self).values(), vars(other).values(), strict=True):
            if isinstance(own, Tensor):
                own[rows] = new


@dataclass
class Past:
    """The tokens of rows so far, for penalties, and the biases of the rows; all ``[B, V]``."""

    seen: Tensor
    """Which tokens a row has, in its prompt or its answer."""
    count: Tensor
    """How often each token occurs in its answer."""
    bias: Tensor
    """What its request adds to the logits."""

    @classmethod
    def empty(cls, B: int, V: int, device: Any = None) -> Past:
        """Return the past of rows that have nothing yet."""
        new = torch.zeros(B, V, device=device)
        return cls(new.bool(), new.int(), new)

    def begin(self, row: int, prompt: Sequence[int], bias: Mapping[int, float]) -> None:
        """Give a row to a new request."""
        for own in vars(self).values():
            own[row] = 0
        self.seen[row, torch.tensor(prompt, device=self.seen.device)] = True
        if bias:
            ids, values = torch.tensor(list(bias)), torch.tensor(list(bias.values()))
            self.bias[row, ids.to(self.bias.device)] = values.to(self.bias)

    def add(self, rows: Tensor, token: Tensor) -> None:
        """Note the token ``[B]`` that each of ``rows [B]`` was given."""
        self.seen[rows, token] = torch.ones_like(rows, dtype=torch.bool)  # graphs cannot copy from the CPU
        self.count[rows, token] += 1

    def of(self, rows: Any) -> Past:
        """Return some rows."""
        return Past(*(own[rows] for own in vars(self).values()))

    def swap(self, one: int, other: int) -> None:
        """Exchange two rows."""
        for own in vars(self).values():
            own[[one, other]] = own[[other, one]]

    def adjust(self, logits: Tensor, choice: Choice) -> Tensor:
        """Return logits with biases added, and then the repetition, frequency and presence penalties applied.

        Repetition is that of arXiv 1909.05858; the other two, and the bias, are those of OpenAI's interface.
        """
        logits, repetition = logits + self.bias, choice.repetition[:, None]
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(self.seen, repeated, logits)
        return logits - choice.frequency[:, None] * self.count - choice.presence[:, None] * (self.count > 0)


def choose(
    logits: Tensor, choice: Choice | None, keys: Tensor | None = None, past: Past | None = None
) -> Tensor:
    """Choose a token in each row.

    Args:
        logits: ``[B, V]``.
        choice: the rows' settings; None takes the largest logit in every row.
        keys: a random int64 for each row ``[B]``; None if every row is greedy.
        past: of the rows; None if no row has a penalty or a bias.

    Returns:
        Token ids ``[B]``; -1 where a row's logits are NaN or infinite.
    """
    logits = logits.float()
    broken = ~logits.amax(-1).isfinite()  # NaN anywhere, an overflow, or nothing to choose from
    if past is not None and choice is not None:
        logits = past.adjust(logits, choice)
    token = logits.argmax(-1)
    if keys is not None and choice is not None:
        token = torch.where(choice.greedy, token, _sample(logits, choice, keys))
    return token.masked_fill(broken, -1)


def _sample(logits: Tensor, choice: Choice, keys: Tensor) -> Tensor:
    """Draw from the distribution of the kept tokens."""
    logits = (logits - logits.amax(-1, keepdim=True)) / choice.temperature[:, None]
    token = torch.arange(logits.shape[1], device=logits.device)
    if not choice.truncates:
        return (logits - _exponential(keys, token).log()).argmax(-1)
    top_k, top_p, min_p = (x[:, None] for x in (choice.top_k, choice.top_p, choice.min_p))
    rank = token
    logits, token = logits.sort(-1, descending=True)
    probability = logits.softmax(-1)
    keep = probability >= min_p * probability[:, :1]
    # At 1, a sum that was rounded up would cut off the tail of a large vocabulary.
    keep &= (probability.cumsum(-1) - probability < top_p) | (top_p >= 1)
    keep &= (rank < top_k) | (top_k == 0)
    keep[:, 0] = True
    drawn = (logits - _exponential(keys, token).log()).masked_fill(~keep, -torch.inf).argmax(-1, keepdim=True)
    return token.gather(-1, drawn)[:, 0]


def _exponential(keys: Tensor, token: Tensor) -> Tensor:
    """Return an exponentially distributed number ``[B, V]``, fp32, for each row's key and each token.

    The hash is SplitMix64's (Steele, Lea and Flood 2014); it is the same on every device.
    """
    z = keys[:, None] + token * -0x61C8864680B583EB
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    uniform = (((z >> 32) & 0xFFFFFFFF).float() + 0.5) * 2.0**-32
    return -torch.log1p(-uniform.clamp(max=1 - 2.0**-24))


MOST_LIKELY = 20
"""How many of the most likely tokens are kept for requests that ask for likelihoods."""


def likelihoods(logits: Tensor, token: Tensor) -> Tensor:
    """Return log-probabilities in fp64: of ``token [B]``, of the M most likely ones, and then their ids.

    They are ``[B, 1 + 2 M]``, and the model's own: before temperature, penalties and biases. M is
    `MOST_LIKELY`, or V if that is less.
    """
    log = logits.float().log_softmax(-1)
    own = log.gather(-1, token.clamp(min=0)[:, None])
    most, ids = log.topk(min(MOST_LIKELY, log.shape[-1]))
    return torch.cat((own.double(), most.double(), ids.double()), dim=-1)
