"""Events become OpenAI's objects: whole answers, and the chunks of streams."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from lit_adapter.serving.errors import ApiError
from lit_adapter.serving.jobs import Job
from lit_adapter.serving.protocol import ChatRequest
from lit_adapter.serving.worker import Event, Token
from lit_adapter.text.tokenizer import StreamDecoder, Tokenizer

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # `json.dumps` would make one each time


def token_text(tokenizer: Tokenizer, id_: int) -> str:
    """Return a token's own text; for a part of a character, its bytes in hexadecimal."""
    piece = tokenizer.piece(id_)
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
    return text or tokenizer.spelling(id_) or f"<{id_}>"


def _finite(value: float) -> float:
    return max(value, -9999.0)  # JSON has no infinity; OpenAI's own least value


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """Return the likelihoods of a chat's tokens."""

    def described(id_: int, value: float) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, id_),
            "logprob": _finite(value),
            "bytes": list(tokenizer.piece(id_)),
        }

    content = [
        described(token.id, token.likelihood.log_probability)
        | {"top_logprobs": [described(*pair) for pair in token.likelihood.most_likely]}
        for token in tokens
        if token.likelihood is not None
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """Return the likelihoods of a completion's tokens; the first one of an echoed prompt has none."""
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        known = token.likelihood
        text = token_text(tokenizer, token.id)
        found["tokens"].append(text)
        found["text_offset"].append(token.offset)
        found["token_logprobs"].append(None if known is None else _finite(known.log_probability))
        most = None
        if known is not None:
            most = {text: _finite(known.log_probability)}
            for id_, value in known.most_likely:
                most.setdefault(token_text(tokenizer, id_), _finite(value))
        found["top_logprobs"].append(most)
    return found


class Shape:
    """The form of a job's objects: those of chats, or those of text completions."""

    def __init__(self, job: Job) -> None:
        body: Any = job.body
        self.job, self.is_chat = job, isinstance(body, ChatRequest)
        kind = "chat.completion" if self.is_chat else "text_completion"
        chunk = "chat.completion.chunk" if self.is_chat else kind
        common = {"id": job.id, "created": job.created, "model": body.model}
        self.whole = {**common, "object": kind}
        self.chunk = {**common, "object": chunk}
        self.scored = body.logprobs if self.is_chat else body.logprobs is not None
        self.echoes = not self.is_chat and body.echo
        """Whether answers begin with their prompts."""

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Return the likelihoods of tokens, if they are wanted."""
        if not self.scored:
            return None
        make = chat_logprobs if self.is_chat else text_logprobs
        return make(self.job.model.tokenizer, tokens)

    def echo(self, index: int) -> str:
        """Return the prompt of a choice as text."""
        body: Any = self.job.body
        number = index // body.n
        given = body.prompts[number]
        return given if isinstance(given, str) else self.job.model.tokenizer.decode(given)

    def choice(self, index: int, text: str, tokens: Sequence[Token], finish: str) -> dict[str, Any]:
        """Return a whole answer."""
        content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        said = content if self.is_chat else {"text": text}
        return {"index": index, **said, "logprobs": self.logprobs(tokens), "finish_reason": finish}

    def delta(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        """Return a piece of an answer."""
        content = {"delta": {"content": text} if text else {}}
        said = content if self.is_chat else {"text": text}
        logprobs = self.logprobs(tokens) if tokens else None
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}


class _Echo:
    """Puts the prompts before the answers, and shifts the answers' positions accordingly."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.begun: dict[int, str] = {}

    def __call__(self, event: Event) -> Event:
        if not self.shape.echoes:
            return event
        if event.index not in self.begun:
            prompt = self.begun[event.index] = self.shape.echo(event.index)
            tokens = event.tokens
            if tokens and self.shape.scored:  # the first event of a scored choice has its prompt's tokens
                tokens = _placed(self.shape.job.model.tokenizer, tokens)
            return Event(event.index, prompt + event.text, tokens, event.finish)
        shift = len(self.begun[event.index])
        moved = [Token(token.id, token.offset + shift, token.likelihood) for token in event.tokens]
        return Event(event.index, event.text, moved, event.finish)


def _placed(tokenizer: Tokenizer, tokens: Sequence[Token]) -> list[Token]:
    """Return the tokens of a prompt with the positions where their texts begin."""
    decoder, at, placed = StreamDecoder(tokenizer), 0, []
    for token in tokens:
        placed.append(Token(token.id, at, token.likelihood))
        at += len(decoder.push(token.id))
    return placed


async def whole(job: Job) -> dict[str, Any]:
    """Return the complete answers of a job."""
    shape = Shape(job)
    echo = _Echo(shape)
    texts: list[str] = [""] * len(job.choices)
    tokens: list[list[Token]] = [[] for _ in job.choices]
    finish: dict[int, str] = {}
    async for event in job.events():
        said = echo(event)
        texts[said.index] += said.text
        tokens[said.index] += said.tokens
        if said.finish is not None:
            finish[said.index] = said.finish
    choices = [shape.choice(index, texts[index], tokens[index], finish[index]) for index in range(len(texts))]
    return {**shape.whole, "choices": choices, "usage": job.usage}


async def stream(job: Job, begun: Callable[[], None]) -> AsyncIterator[bytes]:
    """Yield the lines of an event stream; an error is its last event. ``begun`` is called at the first."""
    shape = Shape(job)
    echo = _Echo(shape)
    usage = {"usage": None} if job.body.usage_wanted else {}
    try:
        if shape.is_chat:
            for index in range(len(job.choices)):
                delta = {"role": "assistant", "content": ""}
                first = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
                yield _line({**shape.chunk, "choices": [first], **usage})
        async for event in job.events():
            begun()
            said = echo(event)
            deltas = []
            if said.text or said.tokens:
                deltas.append(shape.delta(said.index, said.text, said.tokens, None))
            if said.finish is not None:
                deltas.append(shape.delta(said.index, "", (), said.finish))
            yield b"".join(_line({**shape.chunk, "choices": [delta], **usage}) for delta in deltas)
        if usage:
            yield _line({**shape.chunk, "choices": [], "usage": job.usage})
    except ApiError as error:
        yield _line(error.body())
        return
    yield b"data: [DONE]\n\n"


def _line(value: dict[str, Any]) -> bytes:
    return b"data: " + _JSON.encode(value).encode() + b"\n\n"
