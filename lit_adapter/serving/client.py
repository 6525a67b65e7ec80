"""A terminal's partner at a server: this package's, or another one with OpenAI's interface."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from lit_adapter.errors import UserError, nearest, shorten
from lit_adapter.generation.settings import Sampling
from lit_adapter.generation.terminal import PLAIN
from lit_adapter.serving.keys import words_of

SECONDS = 300.0
"""Longest wait for a part of an answer, which may have to wait for a slot."""
ALWAYS = ("max_new_tokens", "temperature", "seed")
"""Settings whose defaults are not the server's."""
LIMIT = 10_000_000
"""Most bytes of a body, or of a line of a stream; real ones are far shorter."""
UNREADABLE = (OSError, http.client.HTTPException, ValueError, RecursionError)
"""Errors that may end the reading of an answer."""
KINDS = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number"}
"""What JSON calls a type; others are shown as they are."""
VISIBLE = re.compile("[!-~]+")
"""Characters that a line of a request may have."""


class ServerError(UserError):
    """A server refuses a request, or cannot be reached.

    Args:
        url: the server.
        message: what it says.
        code: OpenAI's word for it, if it gives one.
        param: the field that it is about, if it names one.
    """

    def __init__(self, url: str, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(f"{url}: {message}")
        self.code, self.param = code, param


def read_key(path: Path) -> str:
    """Return the key in a file: its first word that is not in a comment, as in the file of ``--api-keys``.

    Raises:
        UserError: there is none, or it has characters that no header can carry.
    """
    *_, key = next(words_of(path), (0, [""]))[1]
    if not key:
        raise UserError(f"{path}: no key; write it on a line")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{path}: the key has characters outside ASCII")
    return key


class ServerModels:
    """A `terminal.Partner`: the models of a server.

    Args:
        url: its address, with or without ``/v1``.
        key: the API key, if the server asks for one.
        name: of the model that answers first; by default the first adapter, or the base if there is none.

    Raises:
        UserError: an invalid address, a server that cannot be reached or refuses the key, or a model that it
            does not have.
    """

    cut_after: int | None = None

    def __init__(self, url: str, key: str | None = None, name: str | None = None) -> None:
        place = _place(url)
        self.url, self._is_secure = url.rstrip("/").removesuffix("/v1"), place.scheme == "https"
        self._host, self._port = str(place.hostname), place.port or (443 if self._is_secure else 80)
        self._path = place.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._socket: socket.socket | None = None
        self._stopped = False
        models = self._listed()
        first = next((model for model in models if model.get("parent")), models[0])
        self.name = first["id"]
        if name is not None:
            self.choose(name)

    def names(self) -> list[str]:
        """Return the names that the server has now."""
        return [model["id"] for model in self._listed()]

    def choose(self, name: str) -> None:
        """Answer with another model of the server; ``none`` is its base."""
        models = self._listed()
        base = next((model["id"] for model in models if not model.get("parent")), None)
        wanted, known = base if name == PLAIN and base else name, [model["id"] for model in models]
        if wanted not in known:
            raise ServerError(
                self.url, f"no model {shorten(name)}{nearest(name, known) or '; it has ' + ', '.join(known)}"
            )
        self.name = wanted

    def answer(self, messages: Sequence[Mapping[str, Any]], sampling: Sampling) -> Iterator[str]:
        """Yield the answer to a conversation piece by piece."""
        self._stopped, self.cut_after = False, None
        body = {"model": self.name, "messages": list(messages), "stream": True, **_settings(sampling)}
        body["stream_options"] = {"include_usage": True}
        try:
            yield from self._answer(body)
        except ServerError as error:
            if self._stopped:
                return
            if error.code != "context_length_exceeded":
                raise
            if error.param != "max_tokens":
                message = "the conversation fills the server's context; /reset starts again"
                raise ServerError(self.url, message) from None
            del body["max_tokens"]  # the room that is left, which is less than was asked for
            yield from self._answer(body)

    def _answer(self, body: Any) -> Iterator[str]:
        with self._asking("POST", "/v1/chat/completions", body) as response:
            yield from self._pieces(response)

    def _pieces(self, response: http.client.HTTPResponse) -> Iterator[str]:
        """Yield the text of an event stream, and note at its end whether the answer was cut."""
        was_cut, n_tokens, ended = False, None, False
        for line in self._lines(response):
            if line == b"[DONE]":
                ended = True
                break
            with self._telling("cannot read its answer"):
                event = _event(line)
            if event.get("error"):
                raise self._refused(event, "the answer failed")
            for choice in event.get("choices", ()):
                was_cut = was_cut or choice.get("finish_reason") == "length"
                if text := choice.get("delta", {}).get("content"):
                    yield text.encode(errors="replace").decode()  # half a character cannot be written
            n_tokens = (event.get("usage") or {}).get("completion_tokens", n_tokens)
        if not ended and not self._stopped:
            raise ServerError(self.url, "the server disconnected in the middle of the answer")
        self.cut_after = n_tokens if was_cut else None

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """Yield the data of the events of a stream, until it ends."""
        while line := _line(response):
            if len(line) > LIMIT:
                raise ServerError(self.url, f"cannot read its answer: a line has more than {LIMIT:,} bytes")
            if line.startswith(b"data:"):
                yield line[5:].strip()

    def stop(self) -> None:
        """Close the connection, also from a signal handler: the answer ends, and its slot is free."""
        self._stopped = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _listed(self) -> list[dict[str, Any]]:
        asking, telling = self._asking("GET", "/v1/models"), self._telling("cannot read its list of models")
        with asking as response, telling:
            return _models(_body(response))

    @contextmanager
    def _asking(self, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        """Send a request and yield the beginning of its answer; the connection closes with the block.

        Raises:
            ServerError: the server cannot be reached, or answers with an error.
        """
        kind = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        content = None if body is None else json.dumps(body).encode()
        with closing(kind(self._host, self._port, timeout=SECONDS)) as connection:
            with self._telling("cannot reach a server there"):
                connection.connect()
                self._socket = connection.sock  # an answer without a length takes it from the connection
                connection.request(method, self._path + path, content, self._headers)
                response = connection.getresponse()
            with response:  # an answer without a length owns the connection, which is then not closed for us
                if response.status != http.client.OK:
                    raise self._refused(_refusal(response), f"status {response.status} {response.reason}")
                yield response

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Turn an error while reading inside the block into one line: ``what``, and the reason."""
        try:
            yield
        except UNREADABLE as error:
            raise ServerError(self.url, f"{what}: {_reason(error)}") from None

    def _refused(self, answer: Mapping[str, Any], otherwise: str) -> ServerError:
        error = answer.get("error")
        if not isinstance(error, dict) or not isinstance(error.get("message"), str):
            return ServerError(self.url, otherwise)
        return ServerError(self.url, error["message"] or otherwise, error.get("code"), error.get("param"))


def _settings(sampling: Sampling) -> dict[str, Any]:
    """Return the settings of a request that are not the server's defaults, as its fields."""
    default = asdict(Sampling())
    given = {
        name: value for name, value in asdict(sampling).items() if name in ALWAYS or value != default[name]
    }
    return {"max_tokens": given.pop("max_new_tokens")} | given


def _place(url: str) -> SplitResult:
    """Return the parts of a server's address.

    Raises:
        UserError: it is not one, or has parts that no server's address has.
    """
    try:
        place = urlsplit(url)
        host = (place.hostname or "").encode("idna").decode()
        more = "@" in place.netloc or place.query or place.fragment or place.port == 0
        is_one = bool(host and VISIBLE.fullmatch(host + place.path) and not more)
        is_one = is_one and place.scheme in ("http", "https")
    except ValueError:
        is_one = False
    if not is_one:
        raise UserError(f"--url {shorten(url)}: expected an address such as http://127.0.0.1:8000")
    return place


def _line(response: http.client.HTTPResponse) -> bytes:
    """Return the next line, or its first ``LIMIT + 1`` bytes; nothing if the server has disconnected."""
    try:
        return response.readline(LIMIT + 1)
    except (OSError, http.client.HTTPException, ValueError):
        return b""


def _body(response: http.client.HTTPResponse) -> bytes:
    """Return all of an answer that is not too long; see `UNREADABLE`."""
    content = response.read(LIMIT + 1)
    if len(content) > LIMIT:
        raise http.client.HTTPException(f"it has more than {LIMIT:,} bytes")
    if response.length:  # what is still to come, where it was said
        raise http.client.IncompleteRead(content, response.length)
    return content


def _refusal(response: http.client.HTTPResponse) -> dict[str, Any]:
    """Return what a server says with an error; nothing if that cannot be read."""
    try:
        return _object(_body(response))
    except UNREADABLE:
        return {}


def _reason(error: Exception) -> str:
    """Return in words why an answer cannot be read."""
    if isinstance(error, http.client.IncompleteRead):
        return "it ends in the middle"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, (OSError, http.client.HTTPException)):
        return reason
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    return f"{reason}; is it a server with OpenAI's interface?"


def _models(content: bytes) -> list[dict[str, Any]]:
    """Return the models of a list, each with its ``id``.

    Raises:
        ValueError: it is not a list of models, or has no model.
    """
    models = _object(content).get("data")
    for model in _checked(models, '"data"', list):
        _checked(_checked(model, 'a member of "data"', dict).get("id"), '"id"', str)
    if not models:
        raise ValueError('"data" has no model')
    return models


def _event(content: bytes) -> dict[str, Any]:
    """Return an event of an answer: an error, or one in which the fields in use have the right types.

    Raises:
        ValueError: it is none.
    """
    event = _object(content)
    if event.get("error"):
        return event
    for choice in _checked(event.get("choices", []), '"choices"', list):
        delta = _checked(choice, 'a member of "choices"', dict).get("delta", {})
        _checked(_checked(delta, '"delta"', dict).get("content"), '"content"', str, or_null=True)
    usage = _checked(event.get("usage"), '"usage"', dict, or_null=True) or {}
    _checked(usage.get("completion_tokens"), '"completion_tokens"', int, or_null=True)
    return event


def _object(content: bytes) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(content)
    except ValueError:
        raise ValueError("it is not JSON") from None
    return _checked(found, "it", dict)


def _checked(found: Any, name: str, kind: type, *, or_null: bool = False) -> Any:
    """Return a value of a type.

    Raises:
        ValueError: it has another.
    """
    if type(found) is kind or (or_null and found is None):
        return found
    is_now = KINDS.get(type(found)) or json.dumps(found)  # null, true or false
    raise ValueError(f"{name} is {is_now}, expected {KINDS[kind]}{' or null' * or_null}")
