"""An answer's tokens as text, piece by piece, up to a stop text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from lit_adapter.generation.engine import Engine
from lit_adapter.generation.request import Request
from lit_adapter.text.tokenizer import StreamDecoder, Tokenizer


class AnswerText:
    """An answer's text as its tokens come; text that may begin a stop text is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], begun: Sequence[int] = ()) -> None:
        self.decoder = StreamDecoder(tokenizer)
        self.stop, self.held, self.stopped = stop, "", False
        self.text = ""
        """All text returned so far, after that of ``begun``, the answer's first tokens."""
        for token in begun:
            self.text += self.push(token)

    def push(self, token: int | None) -> str:
        """Return the text that a token, or with None the end, makes certain to belong to the answer."""
        if self.stopped:
            return ""
        text = self.held + (self.decoder.flush() if token is None else self.decoder.push(token))
        if not self.stop:
            return text
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if places:
            self.stopped, self.held = True, ""
            return text[: min(places)]
        begun = (n for stop in self.stop for n in range(len(stop)) if text.endswith(stop[:n]))
        keep = 0 if token is None else max(begun, default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def pieces(
    engine: Engine,
    requests: Sequence[Request],
    answers: Sequence[AnswerText],
    batch_size: int,
    enough: Callable[[int, str], bool] | None = None,
) -> Iterator[tuple[int, str | None]]:
    """Answer requests, at most ``batch_size`` at a time, each into its `AnswerText`.

    ``enough`` is called with a request's index and its answer so far; true ends that answer.

    Yields:
        ``(index of the request, piece of text)``, beginning with the text that an answer has already, and
        ``(index, None)`` at each end.
    """
    yield from ((index, answer.text) for index, answer in enumerate(answers) if answer.text)
    with closing(engine.run(requests, batch_size)) as events:
        for index, token in events:
            answer = answers[index]
            piece = answer.push(token)
            answer.text += piece
            if piece and enough is not None:
                answer.stopped = answer.stopped or enough(index, answer.text)
            if answer.stopped:
                engine.cancel(requests[index])
            if piece:
                yield index, piece
            if token is None:
                yield index, None
