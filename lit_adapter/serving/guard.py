"""What every request passes first: who asks, how much, how fast; and its line in the log."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from lit_adapter.serving.errors import ApiError
from lit_adapter.serving.keys import Keys
from lit_adapter.serving.limits import Limits
from lit_adapter.serving.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

access = logging.getLogger("lit_adapter.serving.access")
LOCAL = ("localhost", "127.0.0.1", "[::1]")
OPEN = ("/", "/page.css", "/page.js", "/health", "/health/live", "/health/ready")
"""Paths that need no key: the chat page asks for one, and probes have none."""


@dataclass
class Visit:
    """What is known of a request; endpoints add to it."""

    id: str = field(default_factory=lambda: f"req_{secrets.token_hex(8)}")
    started: float = field(default_factory=time.monotonic)
    status: int = 499
    """499: the client disconnected before an answer."""
    owner: str = ""
    """Whose requests count together: the key's line, or the address."""
    is_admin: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    """More for the log: the model, counts of tokens, the time to the first one."""


def visit_of(scope: MutableMapping[str, Any]) -> Visit:
    """Return the visit that `Guard` has begun."""
    visit: Visit = scope["visit"]
    return visit


class Guard:
    """An ASGI application before the real one.

    Args:
        app: the real one.
        limits: of every request.
        metrics: counts requests.
        keys: who may ask; None for everybody.
        hosts: names that clients may call the server by; None for any. A web page elsewhere whose host name
            is made to point here has another one.
    """

    def __init__(
        self, app: Any, limits: Limits, metrics: Metrics, keys: Keys | None, hosts: Collection[str] | None
    ) -> None:
        self.app, self.limits, self.metrics, self.keys, self.hosts = app, limits, metrics, keys, hosts
        self.draining = False
        self._under_way: Counter[str] = Counter()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = scope["visit"] = Visit()
        guarded = _Sender(send, visit, self.limits.send_seconds)
        counted, body = "", None
        try:
            self._admit(scope, visit)
            counted = self._count(scope, visit)
            body = await self._body(scope, receive)
            await self.app(scope, _replayed(body, receive), guarded)
        except ApiError as error:
            if guarded.begun:
                raise
            if body is None and error.status_code not in (408, 413, 431):
                with suppress(ApiError):  # a client that still sends would not see an answer
                    body = await self._read(receive)
            elif error.status_code == 413:
                await _discard(receive)
            # What is left of a body that was not read must not be taken for the next request.
            headers = {**(error.headers or {}), **({"Connection": "close"} if body is None else {})}
            await JSONResponse(error.body(), error.status_code, headers)(scope, receive, guarded)
        finally:
            if counted:
                self._under_way[counted] -= 1
                self._under_way += Counter()  # drops what is 0
            self._leave(scope, visit)

    def _admit(self, scope: MutableMapping[str, Any], visit: Visit) -> None:
        """Refuse strangers, and everybody while the server stops."""
        headers, path = Headers(scope=scope), scope["path"]
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self.limits.max_headers:
            raise ApiError(431, f"headers of more than {self.limits.max_headers} bytes", code="too_large")
        visit.owner = scope["client"][0] if scope.get("client") else "local"
        host = headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.hosts is not None and name not in self.hosts:
            raise ApiError(403, "this server answers only to its own name", code="unknown_host")
        if path in OPEN:
            return
        if self.draining:
            raise ApiError(503, "the server is stopping", code="stopping", retry_after=5)
        if self.keys is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            key = self.keys.find(given.strip()) if scheme.lower() == "bearer" else None
            if key is None:
                raise ApiError(401, "send a key: Authorization: Bearer KEY", code="invalid_api_key")
            visit.owner, visit.is_admin = f"key {key.line}", key.is_admin

    def _count(self, scope: MutableMapping[str, Any], visit: Visit) -> str:
        """Count a request that asks for answers, and return whose it is; an empty text for others."""
        if scope["method"] != "POST":
            return ""
        if self._under_way[visit.owner] >= self.limits.per_key:
            raise ApiError(
                429,
                f"{self.limits.per_key} requests with this key are in progress; wait for one to end",
                code="too_many_requests",
                retry_after=1,
            )
        self._under_way[visit.owner] += 1
        return visit.owner

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        """Return a request's body; refuse one that is too large, too slow or not JSON."""
        headers, most = Headers(scope=scope), self.limits.max_body
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise ApiError(413, f"a body of {length[:20]} bytes; expected {most} or fewer", code="too_large")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise ApiError(415, "expected Content-Type: application/json", code="wrong_content_type")
        return await self._read(receive)

    async def _read(self, receive: Receive) -> bytes:
        body, most = bytearray(), self.limits.max_body
        try:
            async with asyncio.timeout(self.limits.receive_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the connection ended within the body", code="incomplete")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise ApiError(413, f"the body has more than {most} bytes", code="too_large")
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            seconds = self.limits.receive_seconds
            raise ApiError(408, f"the body took more than {seconds:g} s", code="too_slow") from None

    def _leave(self, scope: MutableMapping[str, Any], visit: Visit) -> None:
        seconds = time.monotonic() - visit.started
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.request(route, visit.status, seconds)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": visit.id,
            "owner": visit.owner,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": visit.status,
            "seconds": round(seconds, 4),
            **visit.facts,
        }
        access.info(json.dumps(line))


async def _discard(receive: Receive, most: int = 2**24, seconds: float = 2.0) -> None:
    """Let a client finish sending: if its connection is closed while it sends, it does not see the answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while most > 0:
                message = await receive()
                most -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


class _Sender:
    """Notes an answer's status, adds the common headers, and limits how long sending may take."""

    def __init__(self, send: Send, visit: Visit, seconds: float) -> None:
        self.send, self.visit, self.seconds, self.begun = send, visit, seconds, False

    async def __call__(self, message: Message) -> None:
        """Send one message.

        Raises:
            OSError: the client does not take it.
        """
        if message["type"] == "http.response.start":
            self.begun, self.visit.status = True, message["status"]
            message["headers"] = [
                *message.get("headers", []),
                (b"x-request-id", self.visit.id.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
        try:
            async with asyncio.timeout(self.seconds):
                await self.send(message)
        except TimeoutError:
            self.visit.facts["left"] = "too slow a reader"
            raise OSError(f"the client has read nothing for {self.seconds:g} s") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a receiver that gives the whole body once, and then whatever comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
