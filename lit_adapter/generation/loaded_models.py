"""A terminal's partner in this process: adapters on one base, loaded when they are named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lit_adapter.errors import UserError
from lit_adapter.generation.settings import Sampling
from lit_adapter.generation.terminal import PLAIN

if TYPE_CHECKING:
    from lit_adapter.generation.adapted import AdaptedLlama

LEAST_ANSWER = 16
"""Tokens of the context that must be left for an answer; otherwise the conversation is too long."""


class LoadedModels:
    """A `terminal.Partner`: one base, with the adapters that were named so far.

    Args:
        model: answers first.
        name: of its adapter, as the user gave it; None for the plain base.
    """

    cut_after: int | None = None

    def __init__(self, model: AdaptedLlama, name: str | None = None) -> None:
        self.model, self.name = model, PLAIN if name is None else name
        self._loaded = {PLAIN: model.base} | ({name: model} if name is not None else {})

    def names(self) -> list[str]:
        """Return the adapters that were loaded so far, and ``none``."""
        return list(self._loaded)

    def choose(self, name: str) -> None:
        """Answer with another adapter: a file, a run's folder, or ``none``."""
        if name not in self._loaded:
            self._loaded[name] = self.model.with_adapter(name)
        self.model, self.name = self._loaded[name], name

    def answer(self, messages: Sequence[Mapping[str, Any]], sampling: Sampling) -> Iterator[str]:
        """Yield the answer to a conversation piece by piece."""
        room = self.model.room_for_chat(messages)
        if room < LEAST_ANSWER:
            raise UserError("the conversation fills the base's context; /reset starts again")
        most, answer, self.cut_after = sampling.max_new_tokens, "", None
        settings = asdict(sampling) | {"max_new_tokens": min(room, most)}
        for piece in self.model.stream_chat(messages, **settings):
            answer += piece
            yield piece
        if len(self.model.tokenizer.encode(answer)) >= most:
            self.cut_after = most

    def stop(self) -> None:
        """Do nothing: the next piece is computed within moments, and the reader stops there."""
