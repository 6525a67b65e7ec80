"""The addresses of the server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from lit_adapter.errors import nearest, visible
from lit_adapter.serving import replies
from lit_adapter.serving.errors import ApiError, invalid
from lit_adapter.serving.event_stream import EventStream, unless_gone
from lit_adapter.serving.guard import visit_of
from lit_adapter.serving.jobs import Job, Jobs
from lit_adapter.serving.protocol import AdapterRequest, ChatRequest, CompletionRequest, Settings

logger = logging.getLogger(__name__)

B = TypeVar("B", bound=Settings)
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": "OpenAI's error object",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
    }
    for status in (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
}


class Service:
    """What the addresses need for their answers."""

    def __init__(self, jobs: Jobs, *, admins: bool, log_prompts: bool) -> None:
        self.jobs, self.adapters, self.worker = jobs, jobs.adapters, jobs.worker
        self.metrics = jobs.worker.metrics
        self.admins, self.log_prompts = admins, log_prompts
        self.ready = False

    async def answer(self, request: Request, body: B, start: Callable[[B], Job]) -> Response:
        """Start a job and answer it as its body asks: whole, or as a stream."""
        with self.worker.coming():
            # Rendering a template may start a process, and tokenizing a long text takes a while.
            job = await asyncio.to_thread(start, body)
        facts = visit_of(request.scope).facts
        facts |= {"model": body.model, "stream": body.stream, "choices": len(job.choices)}
        if self.log_prompts:
            facts["prompts"] = [job.model.tokenizer.decode(prompt) for prompt in job.prompts]
        headers = {"X-Ignored-Fields": ", ".join(body.ignored)} if body.ignored else {}

        def begun() -> None:
            if "first_token" not in facts:
                facts["first_token"] = round(time.monotonic() - visit_of(request.scope).started, 4)

        def ended() -> None:
            facts.update(job.usage)
            job.close()

        if body.stream:
            return EventStream(replies.stream(job, begun), ended, headers)
        try:
            answer = await unless_gone(request.receive, replies.whole(job))
        finally:
            ended()
        return Response(status_code=499) if answer is None else JSONResponse(answer, headers=headers)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _admin(request: Request) -> None:
    """Let only admin keys pass."""
    if not _service(request).admins:
        raise ApiError(
            403, "start the server with --api-keys and a line 'admin KEY' for this", code="no_admin"
        )
    if not visit_of(request.scope).is_admin:
        raise ApiError(403, "this needs an admin key", code="not_admin")


def make_app(service: Service) -> FastAPI:
    """Return the application; `Guard` belongs before it."""
    app = FastAPI(
        title="lit-adapter",
        description="Many adapters on one base, with OpenAI's interface.",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.service = service
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(HTTPException, _not_there)
    app.add_exception_handler(Exception, _failed)
    _add_interface(app)
    _add_admin(app)
    _add_probes(app)
    _add_page(app)
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        document["components"]["schemas"]["ErrorBody"] = _ERROR_SCHEMA
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return document

    app.openapi = described  # type: ignore[method-assign]
    return app


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _add_interface(app: FastAPI) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> Any:
        """List the base and every loaded adapter."""
        adapters = _service(request).adapters
        return {"object": "list", "data": [adapters.described(served) for served in adapters]}

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str = Path(max_length=200)) -> Any:
        """Describe one of them."""
        adapters = _service(request).adapters
        return adapters.described(adapters.find(name))

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Any:
        """Answer the last message of a conversation."""
        service = _service(request)
        return await service.answer(request, body, service.jobs.chat)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Any:
        """Continue texts."""
        service = _service(request)
        return await service.answer(request, body, service.jobs.completion)


def _add_admin(app: FastAPI) -> None:
    @app.post("/v1/adapters", status_code=201, dependencies=[Depends(_admin)])
    async def load(request: Request, body: AdapterRequest) -> Any:
        """Load an adapter of the server's folder, or load it again."""
        adapters = _service(request).adapters
        return adapters.described(await asyncio.to_thread(adapters.load_from_folder, body.name))

    @app.delete("/v1/adapters/{name}", dependencies=[Depends(_admin)])
    async def unload(request: Request, name: str = Path(max_length=200)) -> Any:
        """Unload an adapter; requests in progress finish with it."""
        await asyncio.to_thread(_service(request).adapters.unload, name)
        return {"id": name, "object": "model", "deleted": True}


def _add_probes(app: FastAPI) -> None:
    @app.get("/health")
    @app.get("/health/ready")
    async def ready(request: Request) -> Any:
        """Say whether requests are answered; status 503 if not."""
        service = _service(request)
        is_live = service.worker.alive
        status = {"live": is_live, "ready": is_live and service.ready}
        return JSONResponse(status, 200 if status["ready"] else 503)

    @app.get("/health/live")
    async def live(request: Request) -> Any:
        """Say whether the process works at all; status 503 if it should be restarted."""
        is_live = _service(request).worker.alive
        return JSONResponse({"live": is_live}, 200 if is_live else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Any:
        """Return the counters in Prometheus's format."""
        service = _service(request)
        service.metrics.adapters.set(len(service.adapters))
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    folder = files("lit_adapter.serving") / "page"
    headers = {
        "Content-Security-Policy": POLICY,
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    for path, (name, kind) in PAGE.items():
        content = (folder / name).read_bytes()

        async def page(request: Request, content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=f"{kind}; charset=utf-8", headers=headers)

        app.add_route(path, page, methods=["GET"])


def _reply(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status_code, error.headers)


async def _told(request: Request, error: Any) -> Response:
    return _reply(error)


async def _not_there(request: Request, error: Any) -> Response:
    messages = {
        400: "the body cannot be read; expected a JSON object in UTF-8",
        404: "there is nothing at this address",
        405: "this address does not take this method",
    }
    message = messages.get(error.status_code, str(error.detail))
    codes = {400: "invalid_json", 404: "not_found"}
    return _reply(ApiError(error.status_code, message, code=codes.get(error.status_code)))


async def _failed(request: Request, error: Exception) -> Response:
    logger.error("request %s failed", visit_of(request.scope).id, exc_info=error)
    return _reply(ApiError(500, "the server has failed to answer; its log says why", code="internal_error"))


async def _refused(request: Request, error: Any) -> Response:
    """Say what is wrong with a body, by its first mistake."""
    return _reply(_mistake(error.errors()[0]))


def _mistake(found: dict[str, Any]) -> ApiError:
    kind, where = found["type"], [part for part in found["loc"][1:] if part != "body"]
    param = _param(where)
    if kind == "json_invalid":
        return invalid(
            f"the body is not valid JSON: {found.get('ctx', {}).get('error', '')}", None, "invalid_json"
        )
    if kind == "missing" and not where:
        return invalid("the request has no body; expected a JSON object", None, "invalid_json")
    if kind in ("model_attributes_type", "model_type") and not where:
        return invalid("the body is not a JSON object", None, "invalid_json")
    if kind == "extra_forbidden":
        known = [*ChatRequest.model_fields, *CompletionRequest.model_fields]
        hint = nearest(str(where[-1]), sorted(set(known))) if len(where) == 1 else ""
        return invalid(f"unknown field '{param}'{hint}", param, "unknown_field")
    if kind == "not_offered":
        return invalid(visible(found["msg"]), found.get("ctx", {}).get("name") or param, "not_offered")
    if where[:1] == ["prompt"] and kind != "missing":
        return invalid(
            "prompt: expected a text, a list of texts, token ids, or a list of those, none of them empty",
            "prompt",
        )
    if kind == "missing":
        return invalid(f"'{param}' is missing", param, "missing_field")
    text = visible(found["msg"])
    return invalid(f"{param}: {text[:1].lower()}{text[1:]}" if param else text, param)


def _param(where: list[Any]) -> str | None:
    """Return a field's place as ``messages[0].content``."""
    path = ""
    for part in where:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() or not path:
            path += f".{part}" if path else part
    return visible(path[:200]) or None
