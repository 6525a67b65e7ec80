"""An answer's tokens as text, piece by piece, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from lit_adapter.text.tokenizer import StreamDecoder, Tokenizer


class AnswerText:
    """An answer's text as its tokens come; text that may begin a stop text is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], begun: Sequence[int] = ()) -> None:
        self.decoder = StreamDecoder(tokenizer)
        self.stop, self.held, self.stopped = stop, "", False
        self.text = ""
        """All that was returned, and what ``begun``, the answer's first tokens, says."""
        for token in begun:
            self.text += self.push(token)

    def push(self, token: int | None) -> str:
        """Return the text that a token, or with None the end, makes certain to belong to the answer."""
        if self.stopped:
            return ""
        text = self.held + (self.decoder.flush() if token is None else self.decoder.push(token))
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if places:
            self.stopped, self.held = True, ""
            return text[: min(places)]
        begun = (n for stop in self.stop for n in range(len(stop)) if text.endswith(stop[:n]))
        keep = 0 if token is None else max(begun, default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]
