"""Clients of a server, in a process of their own: what they compute is not in the server's way."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

FEW_TOKENS = 2
"""Length of answers that are asked for only for their first token."""
Seconds = list[float]
Prompt = Sequence[int]


@dataclass
class Answered:
    """When the events of one streamed answer came, in seconds after it was asked for."""

    times: Seconds
    """Empty if the server refused the request, its queue being full."""

    @property
    def first(self) -> float:
        """Time to the first token."""
        return self.times[0]


class Clients:
    """Asks a server from another process, and waits for the answers.

    Args:
        url: the server's address.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __enter__(self) -> Clients:
        self._process.submit(time.process_time).result()  # the process has begun
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()

    def ask(self, model: str, prompt: Prompt, n_new: int) -> Answered:
        """Ask for one answer."""
        return self.together([model], [prompt], n_new)[0]

    def together(self, models: Sequence[str], prompts: Sequence[Prompt], n_new: int) -> list[Answered]:
        """Ask for all answers at once."""
        return self._process.submit(_run, _together, self.url, models, prompts, n_new).result()

    def arrivals(
        self, models: Sequence[str], prompts: Sequence[Prompt], n_new: int, rate: float, seed: int
    ) -> list[Answered]:
        """Ask for answers at a mean of ``rate`` a second, by a Poisson process."""
        return self._process.submit(_run, _arrivals, self.url, models, prompts, n_new, rate, seed).result()


def _run(work: Callable[..., Coroutine[Any, Any, list[Answered]]], *given: Any) -> list[Answered]:
    return asyncio.run(work(*given))


async def _ask(url: str, model: str, prompt: Prompt, n_new: int) -> Answered:
    """Ask for one streamed answer; a long one does not end before its last token."""
    body = {"model": model, "prompt": list(prompt), "max_tokens": n_new, "temperature": 0, "stream": True}
    if n_new > FEW_TOKENS:
        body["logit_bias"] = {"0": -100, "1": -100, "2": -100}
    content = json.dumps(body).encode()
    place = urlsplit(url)
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    times: Seconds = []
    is_refused = b" 429 " in await reader.readline()
    async for line in reader:
        if line.startswith(b'data: {"id"'):
            times.append(time.perf_counter() - started)
    writer.close()
    if not times and not is_refused:
        raise RuntimeError("an answer without a token")
    return Answered(times)


async def _together(url: str, models: Sequence[str], prompts: Sequence[Prompt], n_new: int) -> list[Answered]:
    return await asyncio.gather(*(_ask(url, m, p, n_new) for m, p in zip(models, prompts, strict=True)))


async def _arrivals(
    url: str, models: Sequence[str], prompts: Sequence[Prompt], n_new: int, rate: float, seed: int
) -> list[Answered]:
    chance = random.Random(seed)
    tasks = []
    for model, prompt in zip(models, prompts, strict=True):
        tasks.append(asyncio.create_task(_ask(url, model, prompt, n_new)))
        await asyncio.sleep(chance.expovariate(rate))
    return await asyncio.gather(*tasks)
