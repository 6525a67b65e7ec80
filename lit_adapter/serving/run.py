"""A server from start to end: load, warm up, listen, and on SIGTERM finish requests in progress."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from lit_adapter.errors import counted
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.engine import Engine
from lit_adapter.generation.lane import MOST_KEPT
from lit_adapter.generation.request import NonFiniteLogitsError, Request
from lit_adapter.generation.settings import Sampling
from lit_adapter.grouping import grouped
from lit_adapter.model.cpu_decode import FEW_ROWS
from lit_adapter.model.pieces import SHORT_READ
from lit_adapter.serving.adapters import Adapters
from lit_adapter.serving.app import Service, make_app
from lit_adapter.serving.guard import LOCAL, Guard
from lit_adapter.serving.jobs import Jobs, Postbox
from lit_adapter.serving.keys import Keys
from lit_adapter.serving.listening import STOPPED, Server, bind, url_of
from lit_adapter.serving.loading import choose_context, load_adapters
from lit_adapter.serving.metrics import Metrics
from lit_adapter.serving.options import ServerOptions
from lit_adapter.serving.worker import Worker
from lit_adapter.streams import say

Ready = Callable[[str, Callable[[], None]], None]
PROMPT_TOKENS = SHORT_READ
"""Prompt tokens read between two steps of other answers; reading them takes about as long as a step."""
WARM_UP = Sampling(max_new_tokens=4), Sampling(max_new_tokens=4, temperature=1.0, top_p=0.9)
"""Greedy and sampled: each has graphs of its own."""
SCAN_SECONDS = 1.0
"""Seconds between two scans of the folder of adapters."""


def serve(options: ServerOptions, ready: Ready | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        options: what, where and to whom.
        ready: is called with the server's address and a function that ends the server as SIGTERM does.

    Raises:
        UserError: options that do not go together, an address that is taken, or files that `load` refuses.
    """
    options.check()
    keys = Keys(options.api_keys) if options.api_keys is not None else None
    listening = bind(options.host, options.port)
    try:
        say("loading the base and the adapters", sys.stderr)
        adapters = load_adapters(options)
        context = choose_context(adapters.base.model.model, options)
        _start_log()
        asyncio.run(_serve(options, keys, adapters, context, listening, ready))
    finally:
        listening.close()


async def _serve(
    options: ServerOptions,
    keys: Keys | None,
    adapters: Adapters,
    context: int,
    listening: socket.socket,
    ready: Ready | None,
) -> None:
    service = _service(options, keys, adapters, context)
    hosts = {*LOCAL, options.host} if options.is_local and keys is None else None
    guard = Guard(make_app(service), options.limits, service.metrics, keys, hosts)
    _warm_up(adapters, options.slots, context)
    service.worker.start()
    service.ready = True
    server = Server(_shared(guard, options.cors), service, guard, options)
    watching = asyncio.create_task(_watch(adapters)) if options.folder is not None else None
    url = url_of(listening)

    def started() -> None:
        say(
            f"serving {adapters.base.name} and {counted(len(adapters), 'adapter')} at {url} "
            f"({options.slots} slots of {context} tokens)"
        )
        if ready is not None:
            ready(url, lambda: server.handle_exit(signal.SIGTERM, None))

    server.on_start = started
    try:
        await server.serve([listening])
    finally:
        if watching is not None:
            watching.cancel()
        service.worker.close(STOPPED)
        await asyncio.to_thread(service.worker.join, 30.0)


def _service(options: ServerOptions, keys: Keys | None, adapters: Adapters, context: int) -> Service:
    """Reserve what answers take of memory, and put together what gives them."""
    model = adapters.base.model
    model.engine.reserve(model.model, options.slots + MOST_KEPT, context)
    model.engine.prompt_tokens = PROMPT_TOKENS
    metrics = Metrics(model.model.embed_tokens.weight.device)
    metrics.slots_total.set(options.slots)
    worker = Worker(model, options.slots, options.limits.queue, metrics)
    jobs = Jobs(adapters, worker, options.limits, context, Postbox())
    admins = keys is not None and any(key.is_admin for key in keys.keys)
    return Service(jobs, admins=admins, log_prompts=options.log_prompts)


def _shared(app: Any, origins: Sequence[str]) -> Any:
    """Let web pages of some origins send requests."""
    if not origins:
        return app
    headers = ["Authorization", "Content-Type"]
    methods = ["GET", "POST", "DELETE"]
    return CORSMiddleware(app, allow_origins=origins, allow_methods=methods, allow_headers=headers)


async def _watch(adapters: Adapters) -> None:
    while True:
        await asyncio.sleep(SCAN_SECONDS)
        await asyncio.to_thread(adapters.scan)


def _warm_up(adapters: Adapters, n_slots: int, context: int) -> None:
    """Take the steps that are slow the first time: with one text, and with adapters of all forms together.

    On CUDA there are as many texts as slots, on a CPU as many as it packs its matrices for.
    """
    base = adapters.base.model
    own = [served.model.adapter for served in adapters if served.model.adapter.model is base.model]
    forms = list({adapter.prefixes.form: adapter for adapter in own}.values())
    prompt = base.template.encode_prompt(base.tokenizer, "Hello")
    most = n_slots if base.model.embed_tokens.weight.is_cuda else min(n_slots, FEW_ROWS)
    for how in WARM_UP:
        chosen = [*forms, *islice(cycle(own), max(0, most - len(forms)))]
        for _ in base.engine.run([Request(prompt, how, base.adapter)]):
            pass
        for together in grouped(chosen, lambda _: 1, n_slots):
            _answer(base.engine, [Request(prompt, how, adapter) for adapter in together])
    if base.model.embed_tokens.weight.is_cuda:
        long = list(islice(cycle(prompt), min(PROMPT_TOKENS + 1, context - WARM_UP[0].max_new_tokens)))
        for adapter in (base.adapter, *forms):  # the kernels of packed rows
            _answer(base.engine, [Request(long, WARM_UP[0], adapter)])
        capture_graphs(base, n_slots, prompt)


def capture_graphs(base: AdaptedLlama, n_slots: int, prompt: Sequence[int]) -> None:
    """Capture, on an idle engine on CUDA, steps of every number of texts and the reading of short prompts.

    Capturing one takes as long as several steps, which a client would wait for.
    """
    base.engine.capture_reads(base.model)
    for how in WARM_UP:
        for n in _doubled(n_slots):
            _answer(base.engine, [Request(prompt, how, base.adapter) for _ in range(n)])


def _doubled(most: int) -> list[int]:
    """Return the powers of two below a number, and the number."""
    return [*(2**n for n in range((most - 1).bit_length())), most]


def _answer(engine: Engine, requests: Sequence[Request]) -> None:
    """Answer requests together; those of a damaged adapter may fail, as they would for its users."""
    for request in requests:
        engine.add(request)
    while not all(request.ended for request in requests):
        engine.step()
    for request in requests:
        if request.error is not None and not isinstance(request.error, NonFiniteLogitsError):
            raise request.error


def _start_log() -> None:
    """Write the log on standard error: the access log's lines as they are, others with their level."""
    plain, leveled = logging.StreamHandler(sys.stderr), logging.StreamHandler(sys.stderr)
    plain.setFormatter(logging.Formatter("%(message)s"))
    leveled.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    access = logging.getLogger("lit_adapter.serving.access")
    access.addHandler(plain)
    access.setLevel(logging.INFO)
    access.propagate = False
    own = logging.getLogger("lit_adapter.serving")
    own.addHandler(leveled)
    own.setLevel(logging.INFO)
    uvicorn_log = logging.getLogger("uvicorn")
    uvicorn_log.addHandler(leveled)
    uvicorn_log.setLevel(logging.WARNING)
