"""The settings of a generation. No torch: command lines read them, with their help, before it loads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from lit_adapter.errors import UserError, nearest, shorten


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
    """Of the random numbers: the same seed gives the same text, alone or in a batch."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer, in addition to the base's own."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; expected 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature is {self.temperature}; expected a finite number, 0 (greedy) or more"
            )
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; expected 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected a number above 0, up to 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; expected a number from 0 (off) to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; expected a number above 0")
        if isinstance(self.stop, str):
            raise UserError(f"stop is the text {self.stop!r}; expected a tuple of texts, as ({self.stop!r},)")
        if "" in self.stop:
            raise UserError("stop holds an empty text, which every answer contains; remove it")
        below = next((token for token in self.stop_ids if token < 0), None)
        if below is not None:
            raise UserError(f"stop_ids holds {below}; expected token ids, 0 or more")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}; expected a whole number from 0 to 2**64 - 1")

    @classmethod
    def of(cls, **values: Any) -> Sampling:
        """Return settings by name, as Python callers give them.

        Raises:
            UserError: an unknown name, or a value out of its range.
        """
        names = [field.name for field in fields(cls)]
        unknown = next((name for name in values if name not in names), None)
        if unknown is not None:
            hint = nearest(unknown, names) or f"; expected {', '.join(names)}"
            raise UserError(f"unknown sampling setting '{unknown}'{hint}")
        return cls(**values)

    @property
    def penalised(self) -> bool:
        """Whether tokens seen before count."""
        return self.repetition_penalty != 1

    @property
    def greedy(self) -> bool:
        """Whether no random number is drawn."""
        return self.temperature == 0 or self.top_k == 1


def check_choices(choices: Sequence[str]) -> None:
    """Refuse choices between which there is nothing to choose.

    Raises:
        UserError: fewer than two, one that is empty, or two that are equal.
    """
    if isinstance(choices, str) or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"choices is {shorten(choices)}; expected a list of texts")
    if len(choices) < 2:
        raise UserError(f"choices holds {len(choices)}; expected two or more answers")
    if not all(choice.strip() for choice in choices):
        raise UserError("choices holds an empty answer; write a text")
    choice, count = Counter(choices).most_common(1)[0]
    if count > 1:
        raise UserError(f"choices holds {shorten(choice)} twice; keep one")
