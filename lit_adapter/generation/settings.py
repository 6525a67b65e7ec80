"""The settings of a generation. No torch: command lines read them, with their help, before it loads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from lit_adapter.arguments import number, of_kind, text, whole_number
from lit_adapter.errors import UserError, WrongTypeError, nearest, shorten

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda n: n >= 1, "1 or more"),
    "temperature": (lambda x: 0 <= x < math.inf, "a finite number, 0 (greedy) or more"),
    "top_k": (lambda n: n >= 0, "0 (off) or more"),
    "top_p": (lambda x: 0 < x <= 1, "a number above 0, up to 1 (off)"),
    "min_p": (lambda x: 0 <= x <= 1, "a number from 0 (off) to 1"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "a number above 0"),
    "frequency_penalty": (lambda x: -2 <= x <= 2, "a number from -2 to 2, 0 is off"),
    "presence_penalty": (lambda x: -2 <= x <= 2, "a number from -2 to 2, 0 is off"),
    "seed": (lambda n: 0 <= n < 2**64, "a whole number from 0 to 2**64 - 1"),
}
"""Which values a setting can have, and how a message says so."""
_WHOLE = ("max_new_tokens", "top_k", "seed")


@dataclass(frozen=True)
class Sampling:
    """Settings of one generation: the keywords of `AdaptedLlama.generate`, which says more about each.

    Numbers of other libraries (numpy's, torch's) become Python's. ``stop`` and ``stop_ids`` take any
    sequence, or None for none; ``stop`` also takes one text.

    Raises:
        UserError: a value of another type, or out of its range.
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
    frequency_penalty: float = 0.0
    """Subtract this from a token's logit for each time it occurs in the answer; -2 to 2, 0: off."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens that occur in the answer; -2 to 2, 0: off."""
    seed: int = 0
    """Seed of the random numbers; the same one gives the same text, alone or in a batch."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer, in addition to the base's own."""

    def __post_init__(self) -> None:
        self._take_types()
        for name, (fits, expected) in _RANGES.items():
            if not fits(getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)}; expected {expected}")
        if "" in self.stop:
            raise UserError("stop holds an empty text, which every answer contains; remove it")
        below = next((token for token in self.stop_ids if token < 0), None)
        if below is not None:
            raise UserError(f"stop_ids holds {below}; expected token ids, 0 or more")

    def _take_types(self) -> None:
        """Convert every value to Python's own type."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        kept: dict[str, Any] = {
            "stop": tuple(text("an element of stop", each) for each in _sequence("stop", stop, "texts")),
            "stop_ids": tuple(
                whole_number("an element of stop_ids", each)
                for each in _sequence("stop_ids", self.stop_ids, "token ids")
            ),
        }
        for name in _RANGES:
            read = whole_number if name in _WHOLE else number
            kept[name] = read(name, getattr(self, name))
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, **values: Any) -> Sampling:
        """Return settings by name, as Python callers give them.

        Raises:
            UserError: an unknown name, a value of another type, or one out of its range.
        """
        names = [field.name for field in fields(cls)]
        unknown = next((name for name in values if name not in names), None)
        if unknown is not None:
            hint = nearest(unknown, names) or f"; expected {', '.join(names)}"
            raise WrongTypeError(f"unknown sampling setting '{unknown}'{hint}")
        return cls(**values)

    def after(self, n_tokens: int) -> Sampling:
        """Return the settings for the rest of an answer whose first tokens already exist."""
        return replace(self, max_new_tokens=self.max_new_tokens - n_tokens) if n_tokens else self

    @property
    def penalised(self) -> bool:
        """Whether tokens seen before count."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def truncates(self) -> bool:
        """Whether the less likely tokens are left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def greedy(self) -> bool:
        """Whether no random number is drawn."""
        return self.temperature == 0 or self.top_k == 1


def check_choices(choices: Sequence[str]) -> None:
    """Refuse choices that leave nothing to choose.

    Raises:
        UserError: fewer than two, one that is empty, two that are equal, or not texts (a TypeError too).
    """
    if isinstance(choices, str):
        raise WrongTypeError("choices is a single text; expected a list of texts")
    if isinstance(choices, Mapping):
        raise WrongTypeError(f"choices is of type {type(choices).__name__}; expected a list of texts")
    for number_, choice in enumerate(of_kind("choices", choices, Collection, "a list of texts")):
        text(f"choices[{number_}]", choice)
    if len(choices) < 2:
        raise UserError(f"choices holds {len(choices)}; expected two or more answers")
    if not all(choice.strip() for choice in choices):
        raise UserError("choices holds an empty answer; write a text")
    choice, count = Counter(choices).most_common(1)[0]
    if count > 1:
        raise UserError(f"choices holds {shorten(choice)} twice; keep one")


def _sequence(name: str, value: Any, what: str) -> Collection[Any]:
    """Return the values of a sequence or set; none for None."""
    if value is None:
        return ()
    values: Collection[Any] = of_kind(name, value, Collection, f"a sequence of {what}, or None")
    return values
