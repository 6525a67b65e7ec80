"""A server from start to end: load, warm up, listen, and on SIGTERM finish what is under way."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.middleware.cors import CORSMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from lit_adapter.device import free_bytes
from lit_adapter.errors import UserError, counted
from lit_adapter.files.write import write_bytes
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.lane import MOST_KEPT
from lit_adapter.generation.load import load
from lit_adapter.generation.request import Request
from lit_adapter.generation.settings import Sampling
from lit_adapter.model.llama import Llama
from lit_adapter.serving.adapters import Adapters, adapter_files
from lit_adapter.serving.app import Service, make_app
from lit_adapter.serving.errors import ApiError
from lit_adapter.serving.guard import LOCAL, Guard
from lit_adapter.serving.jobs import Jobs, Postbox
from lit_adapter.serving.keys import Keys
from lit_adapter.serving.metrics import Metrics
from lit_adapter.serving.names import check_name
from lit_adapter.serving.options import ServerOptions
from lit_adapter.serving.worker import Worker
from lit_adapter.streams import say
from lit_adapter.text.load import load_tokenizer
from lit_adapter.weights.adapter_file import read_adapter
from lit_adapter.weights.base_search import find_base

logger = logging.getLogger(__name__)

Ready = Callable[[str, Callable[[], None]], None]
MOST_UNASKED = 2**32
"""Bytes of keys and values on a CPU, unless ``--context`` asks for more."""
PROMPT_TOKENS = 256
"""Of prompts, that are read between two steps of other answers: a step takes about as long then."""
SCAN_SECONDS = 1.0
"""Between two looks at the folder of adapters."""


def serve(options: ServerOptions, ready: Ready | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        options: what, where and to whom.
        ready: is told the server's address, and a function that ends it as SIGTERM does.

    Raises:
        UserError: options that do not go together, an address that is taken, or files that `load` refuses.
    """
    options.check()
    keys = Keys(options.api_keys) if options.api_keys is not None else None
    listening = _bind(options.host, options.port)
    try:
        adapters = load_adapters(options)
        context = choose_context(adapters.base.model.model, options)
        _start_log()
        asyncio.run(_serve(options, keys, adapters, context, listening, ready))
    finally:
        listening.close()


def _bind(host: str, port: int) -> socket.socket:
    """Take an address, before anything is loaded for it; nobody can connect yet.

    Raises:
        UserError: it is taken, or not this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port}: {error.strerror}") from None
    return listening


def load_adapters(options: ServerOptions) -> Adapters:
    """Load the base and all adapters.

    Raises:
        UserError: as `load`; a folder of adapters that is none, or that names no base where none is given.
    """
    folder = options.folder
    if folder is not None and not folder.is_dir():
        raise UserError(f"--adapters {folder}: not a folder")
    for name in options.adapters:
        check_name(name)
    base_folder = options.base or _named_base(options)
    template = options.template
    if template is None:
        template = "chat" if load_tokenizer(base_folder).chat_template else "alpaca"
    base = load(
        base=base_folder,
        device=options.device,
        dtype=options.dtype,
        template=template,
        verify=options.verify,
    )
    adapters = Adapters(base, base.base_name, folder)
    gc.freeze()  # what stays is not looked through again with every few adapters that are loaded
    for name, path in options.adapters.items():
        other = adapters.listed().get(name)
        if other is not None and not (path.exists() and path.samefile(other)):
            raise UserError(f"--adapter {name}: {other} has the same name; give the adapter another")
        adapters.load(name, path)
    adapters.scan(patient=False)
    gc.freeze()
    return adapters


def _named_base(options: ServerOptions) -> Path:
    """Return the base that the first adapter names; of those in a folder, the first one whose base is found.

    Raises:
        UserError: there is none.
    """
    for path in options.adapters.values():
        return find_base(read_adapter(path)[0].base, path)
    error = UserError(f"--adapters {options.folder}: no adapter in it names a base; give --base FOLDER")
    for _, path in sorted(adapter_files(options.folder).items() if options.folder else ()):
        try:
            return find_base(read_adapter(path)[0].base, path)
        except UserError as refused:
            error = refused
    raise error


def choose_context(model: Llama, options: ServerOptions) -> int:
    """Return the longest prompt with its answer, in tokens, that every slot has room for.

    Raises:
        UserError: ``--context`` is longer than the base's, or memory has no room for the slots.
    """
    config, weight = model.config, model.embed_tokens.weight
    most = config.context_length
    if options.context is not None and not 0 < options.context <= most:
        raise UserError(f"--context is {options.context}; expected 1 to {most}, the base's context")
    per_token = 2 * config.n_layer * config.n_kv_head * config.head_dim * weight.element_size()
    free = free_bytes(weight.device)
    per_context = per_token * (options.slots + MOST_KEPT)  # bytes
    room = most if free is None else free // 2 // per_context
    unasked = room if weight.device.type == "cuda" else max(64, MOST_UNASKED // per_context)
    wanted = options.context or min(most, room, unasked)
    if wanted > room or wanted < 64:
        raise UserError(
            f"{options.slots} slots of {max(wanted, 64)} tokens need more than half of the free memory; "
            "lower --slots or --context"
        )
    return wanted


async def _serve(
    options: ServerOptions,
    keys: Keys | None,
    adapters: Adapters,
    context: int,
    listening: socket.socket,
    ready: Ready | None,
) -> None:
    model = adapters.base.model
    metrics = Metrics(model.model.embed_tokens.weight.device)
    metrics.slots_total.set(options.slots)
    model.engine.reserve(model.model, options.slots + MOST_KEPT, context)
    model.engine.prompt_tokens = PROMPT_TOKENS
    worker = Worker(model, options.slots, options.limits.queue, metrics)
    jobs = Jobs(adapters, worker, options.limits, context, Postbox())
    service = Service(
        adapters,
        worker,
        jobs,
        metrics,
        admins=keys is not None and any(key.is_admin for key in keys.keys),
        log_prompts=options.log_prompts,
    )
    hosts = {*LOCAL, options.host} if options.is_local and keys is None else None
    app: Any = make_app(service)
    guard = app = Guard(app, options.limits, metrics, keys, hosts)
    if options.cors:
        app = CORSMiddleware(
            app,
            allow_origins=options.cors,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
        )
    _warm_up(model, options.slots)
    worker.start()
    service.ready = True
    server = _Server(_config(app, options), service, guard, options)
    watching = asyncio.create_task(_watch(adapters)) if options.folder is not None else None
    url = _url(listening)

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
        worker.close(_STOPPED)
        await asyncio.to_thread(worker.join, 30.0)


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


_STOPPED = ApiError(503, "the server is stopping", code="stopping", retry_after=5)


def _config(app: Any, options: ServerOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_protocol(options.limits.receive_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(options.grace) + 5,
        limit_concurrency=options.limits.connections,
    )


def _protocol(seconds: float) -> type[H11Protocol]:
    """Return uvicorn's protocol, with an end to connections that take long to send a request's headers."""

    class Protocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_request()

        def connection_lost(self, exc: Exception | None) -> None:
            self._arrived()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._await_request()
            else:
                self._arrived()

        def _await_request(self) -> None:
            if self._deadline is None:
                self._deadline = self.loop.call_later(seconds, self.transport.abort)

        def _arrived(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Protocol


class _Server(uvicorn.Server):
    """Ends on the first SIGTERM or SIGINT with what is under way, within the grace; on the second at once."""

    on_start: Callable[[], None]
    """Is called when clients can connect."""

    def __init__(
        self, config: uvicorn.Config, service: Service, guard: Guard, options: ServerOptions
    ) -> None:
        super().__init__(config)
        self.service, self.guard, self.grace = service, guard, options.grace
        self.ready_file = options.ready_file
        self._loop = asyncio.get_running_loop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.ready_file is not None:
            write_bytes(self.ready_file, b"ready\n")
        self.on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Say that it ends, and let answers end."""
        if self.ready_file is not None:
            self.ready_file.unlink(missing_ok=True)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to stop; the signal is not raised again afterwards, so that the status is 0."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self.guard.draining, self.service.ready = True, False
        seconds = 0.0 if self.force_exit else self.grace
        self._loop.call_later(seconds, partial(self.service.worker.close, _STOPPED))


async def _watch(adapters: Adapters) -> None:
    while True:
        await asyncio.sleep(SCAN_SECONDS)
        await asyncio.to_thread(adapters.scan)


@torch.inference_mode()
def _warm_up(model: AdaptedLlama, n_slots: int) -> None:
    """Take the steps that are slow the first time: of one text and, on CUDA, of all slots."""
    on_cuda = model.model.embed_tokens.weight.device.type == "cuda"
    prompt = model.template.encode_prompt(model.tokenizer, "Hello")
    for how in (Sampling(max_new_tokens=4), Sampling(max_new_tokens=4, temperature=1.0, top_p=0.9)):
        for number in {1, n_slots if on_cuda else 1}:
            requests = [Request(prompt, how, model.adapter) for _ in range(number)]
            for _ in model.engine.run(requests, number):
                pass


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
