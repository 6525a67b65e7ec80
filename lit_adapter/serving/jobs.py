"""A checked body becomes choices for the worker, and the events of these choices come back in one queue."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lit_adapter.errors import UserError
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.request import Request
from lit_adapter.generation.settings import Sampling
from lit_adapter.serving.adapters import Adapters
from lit_adapter.serving.errors import ApiError, invalid
from lit_adapter.serving.limits import Limits
from lit_adapter.serving.protocol import ChatRequest, CompletionRequest, Settings
from lit_adapter.serving.rendering import encode_messages
from lit_adapter.serving.worker import Choice, Event, Worker


class Postbox:
    """Passes events of the worker's thread to queues of the event loop, in one call if they come together."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pending: deque[tuple[asyncio.Queue[Event], Event]] = deque()
        self._scheduled = False

    def put(self, queue: asyncio.Queue[Event], event: Event) -> None:
        """Put an event into a queue, from any thread."""
        self._pending.append((queue, event))
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False
        while self._pending:
            queue, event = self._pending.popleft()
            queue.put_nowait(event)


@dataclass(eq=False)
class Job:
    """A request in progress, with its choices."""

    worker: Worker
    body: Settings
    model: AdaptedLlama
    prompts: list[list[int]]
    choices: list[Choice]
    queue: asyncio.Queue[Event]

    def __post_init__(self) -> None:
        prefix = "chatcmpl" if isinstance(self.body, ChatRequest) else "cmpl"
        self.id, self.created = f"{prefix}-{secrets.token_hex(12)}", int(time.time())

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events of all choices until each has ended; `close` is for readers that leave before.

        Raises:
            ApiError: a choice has failed.
        """
        left = len(self.choices)
        while left:
            event = await self.queue.get()
            left -= event.finish is not None
            if event.error is not None:
                if event.text:
                    yield Event(event.index, event.text, event.tokens)
                raise told(event.error)
            yield event

    def close(self) -> None:
        """Cancel the choices that are still in progress."""
        self.worker.cancel(self.choices)

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's count of tokens; those of shared starts, which were not computed again, are ``cached``."""
        n_prompt, n_new = sum(map(len, self.prompts)), sum(choice.n_new for choice in self.choices)
        first = {id(choice.prompt): choice.request for choice in reversed(self.choices)}.values()
        cached = sum(len(r.prompt) - r.computed for r in first if r is not None and r.computed)
        return {
            "prompt_tokens_details": {"cached_tokens": cached},
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
        }


def told(error: BaseException) -> ApiError:
    """Return what a client is told about an error while answering it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):  # NaN or infinite logits: the adapter is damaged
        return ApiError(500, str(error), code="model_failed")
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return ApiError(503, "the server has too little memory for this request", code="out_of_memory")
    return ApiError(500, "the server has failed to answer; its log says why", code="internal_error")


class Jobs:
    """Makes jobs of bodies.

    Args:
        adapters: what is served.
        worker: answers.
        limits: of a request.
        context: longest prompt with its answer, in tokens.
        postbox: of the running event loop.
    """

    def __init__(
        self, adapters: Adapters, worker: Worker, limits: Limits, context: int, postbox: Postbox
    ) -> None:
        self.adapters, self.worker, self.limits, self.context = adapters, worker, limits, context
        self.postbox = postbox

    def chat(self, body: ChatRequest) -> Job:
        """Start a chat completion.

        Raises:
            ApiError: it cannot be answered.
        """
        model = self.adapters.find(body.model).model
        if len(body.messages) > self.limits.max_messages:
            most = self.limits.max_messages
            raise invalid(f"{len(body.messages)} messages; this server takes {most} or fewer", "messages")
        prompt = encode_messages(model.template, model.tokenizer, body.messages)
        wanted = body.max_completion_tokens or body.max_tokens
        most_likely = body.top_logprobs if body.logprobs else None
        return self._job(body, model, [prompt], wanted, most_likely)

    def completion(self, body: CompletionRequest) -> Job:
        """Start text completions.

        Raises:
            ApiError: they cannot be answered.
        """
        model = self.adapters.find(body.model).model
        n_vocab = model.model.config.vocab_size
        prompts = [_prompt_ids(model, prompt, n_vocab) for prompt in body.prompts]
        if body.max_tokens == 0 and not body.echo:
            raise invalid("max_tokens is 0; expected 1 or more, or echo: true", "max_tokens")
        return self._job(body, model, prompts, body.max_tokens, body.logprobs)

    def _job(
        self,
        body: Settings,
        model: AdaptedLlama,
        prompts: list[list[int]],
        wanted: int | None,
        most_likely: int | None,
    ) -> Job:
        self._check(body, len(prompts))
        queue: asyncio.Queue[Event] = asyncio.Queue()
        deliver = partial(self.postbox.put, queue)
        of_prompt = most_likely if isinstance(body, CompletionRequest) and body.echo else None
        choices = [
            Choice(index, model, prompt, request, deliver, of_prompt)
            for index, (prompt, request) in enumerate(
                self._requests(body, model, prompts, wanted, most_likely)
            )
        ]
        job = Job(self.worker, body, model, prompts, choices, queue)
        self.worker.submit(choices)
        self.worker.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return job

    def _requests(
        self,
        body: Settings,
        model: AdaptedLlama,
        prompts: Sequence[list[int]],
        wanted: int | None,
        most_likely: int | None,
    ) -> Iterator[tuple[list[int], Request | None]]:
        """Yield ``n`` requests for each prompt, with the prompt; None instead of a request for no token."""
        stop = _stop_texts(body, self.limits)
        bias, adapter = _bias(body.logit_bias, model.model.config.vocab_size), model.adapter
        first = secrets.randbits(64) if body.seed is None else body.seed
        for prompt in prompts:
            n_new = self._answer_length(prompt, wanted)
            for number in range(body.n):
                if not n_new:
                    yield prompt, None
                    continue
                # The first choice is the one that a request with n = 1 gets.
                sampling = _sampling(body, n_new, stop, (first + number) % 2**64)
                try:
                    request = Request(prompt, sampling, adapter, model.stop_ids, True, bias, most_likely)
                except UserError as error:
                    raise invalid(str(error)) from None
                yield prompt, request

    def _check(self, body: Settings, n_prompts: int) -> None:
        """Refuse more choices or longer stop texts than the limits allow."""
        if body.n > self.limits.max_n:
            raise invalid(f"n is {body.n}; this server takes {self.limits.max_n} or less", "n")
        if n_prompts * body.n > self.limits.max_choices:
            raise invalid(
                f"{n_prompts} prompts with n {body.n} are {n_prompts * body.n} answers; "
                f"this server takes {self.limits.max_choices} or fewer",
                "prompt",
            )

    def _answer_length(self, prompt: Sequence[int], wanted: int | None) -> int:
        """Return how many tokens an answer may have.

        Raises:
            ApiError: prompt and answer do not fit the context, or the answer is longer than is allowed.
        """
        most = self.limits.max_tokens
        if wanted is not None and wanted > most:
            raise invalid(f"max_tokens is {wanted}; this server takes {most} or less", "max_tokens")
        room = self.context - len(prompt)
        least = 1 if wanted is None else wanted
        if room < least:
            raise invalid(
                f"a prompt of {len(prompt)} tokens and max_tokens {least} exceed a context of {self.context}",
                "max_tokens" if room > 0 else "prompt",
                "context_length_exceeded",
            )
        return min(room, most) if wanted is None else wanted


def _prompt_ids(model: AdaptedLlama, prompt: str | list[int], n_vocab: int) -> list[int]:
    """Return the ids of a completion's prompt; a text begins with BOS if the base was trained with it."""
    if isinstance(prompt, str):
        tokenizer = model.tokenizer
        try:
            ids = tokenizer.encode(prompt)
        except UserError as error:
            raise invalid(str(error), "prompt") from None
        ids = [tokenizer.bos_id, *ids] if tokenizer.add_bos and tokenizer.bos_id is not None else ids
        if not ids:
            raise invalid(
                "the prompt is empty, and this base has no BOS to start with; write a text", "prompt"
            )
        return ids
    if max(prompt) >= n_vocab:
        raise invalid(f"the prompt holds {max(prompt)}; token ids end at {n_vocab - 1}", "prompt")
    return prompt


def _bias(given: Mapping[str, float], n_vocab: int) -> dict[int, float]:
    """Return the bias of each token id.

    Raises:
        ApiError: a key is no id of the vocabulary.
    """
    found = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 9 and int(key) < n_vocab):
            raise invalid(
                f"logit_bias has the key {key[:40]!r}; expected token ids from 0 to {n_vocab - 1}",
                "logit_bias",
            )
        found[int(key)] = value
    return found


def _stop_texts(body: Settings, limits: Limits) -> tuple[str, ...]:
    """Return the texts that end an answer.

    Raises:
        ApiError: there are too many, or one is too long.
    """
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stop) > limits.max_stop:
        raise invalid(f"{len(stop)} stop texts; this server takes {limits.max_stop} or fewer", "stop")
    if any(not 0 < len(text) <= limits.stop_characters for text in stop):
        raise invalid(f"a stop text has no or more than {limits.stop_characters} characters", "stop")
    return stop


def _sampling(body: Settings, n_new: int, stop: tuple[str, ...], seed: int) -> Sampling:
    return Sampling(
        max_new_tokens=n_new,
        temperature=body.temperature,
        top_k=max(0, body.top_k),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        seed=seed,
        stop=stop,
    )
