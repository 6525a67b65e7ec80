"""The HTTP server around the application: uvicorn, which lets answers finish before it ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lit_adapter.errors import UserError
from lit_adapter.files.write import write_bytes
from lit_adapter.serving.app import Service
from lit_adapter.serving.errors import ApiError
from lit_adapter.serving.guard import Guard
from lit_adapter.serving.options import ServerOptions

STOPPED = ApiError(503, "the server is stopping", code="stopping", retry_after=5)


def bind(host: str, port: int) -> socket.socket:
    """Reserve an address before anything is loaded; nobody can connect yet.

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


def url_of(listening: socket.socket) -> str:
    """Return the address of a socket that is bound."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


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
    """Return uvicorn's protocol, with a time limit for sending a request's headers."""

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


class Server(uvicorn.Server):
    """Finishes open requests within the grace on the first SIGTERM or SIGINT; ends at once on the second."""

    on_start: Callable[[], None]
    """Is called when clients can connect."""

    def __init__(self, app: Any, service: Service, guard: Guard, options: ServerOptions) -> None:
        super().__init__(_config(app, options))
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
        """Say that the server ends, and let answers finish."""
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
        self._loop.call_later(seconds, partial(self.service.worker.close, STOPPED))
