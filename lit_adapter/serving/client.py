"""A terminal's partner at a server: the one of this package, or another with OpenAI's interface."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lit_adapter.errors import UserError, nearest, shorten
from lit_adapter.files.read import read_text
from lit_adapter.generation.settings import Sampling

SECONDS = 300.0
"""For a part of an answer to come: it may wait for a slot."""
ALWAYS = ("max_new_tokens", "temperature", "seed")
"""Settings whose defaults are not the server's."""


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
    for line in read_text(path).splitlines():
        words = line.split("#")[0].split()
        if words:
            if not (words[-1].isascii() and words[-1].isprintable()):
                raise UserError(f"{path}: the key has other characters than those of ASCII")
            return words[-1]
    raise UserError(f"{path}: no key; write it on a line")


class ServerModels:
    """A `terminal.Partner`: the models of a server.

    Args:
        url: its address, with or without ``/v1``.
        key: what it knows its client by, if it asks.
        name: of the model that answers first; by default the first adapter, or the base if there is none.

    Raises:
        UserError: an address that is none, a server that cannot be reached or refuses the key, or a model
            that it does not have.
    """

    cut_after: int | None = None

    def __init__(self, url: str, key: str | None = None, name: str | None = None) -> None:
        try:
            place = urlsplit(url)
            host, self._port = place.hostname, place.port
        except ValueError:
            host = None
        more = host and (place.username or place.query or place.fragment)
        if not host or more or place.scheme not in ("http", "https"):
            raise UserError(f"--url {shorten(url)}: expected an address such as http://127.0.0.1:8000")
        self._host = host
        self.url, self._is_secure = url.rstrip("/").removesuffix("/v1"), place.scheme == "https"
        self._path = place.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._connection: http.client.HTTPConnection | None = None
        self._stopped = False
        models = self._listed()
        first = next((model for model in models if model.get("parent")), models[0])
        self.name = str(first["id"])
        if name is not None:
            self.choose(name)

    def names(self) -> list[str]:
        """Return the names that the server has now."""
        return [str(model["id"]) for model in self._listed()]

    def choose(self, name: str) -> None:
        """Answer with another model of the server; ``none`` is its base."""
        models = self._listed()
        base = next((str(model["id"]) for model in models if not model.get("parent")), None)
        wanted, known = base if name == "none" and base else name, [str(model["id"]) for model in models]
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
            del body["max_tokens"]  # what room there is, which is less than was asked for
            yield from self._answer(body)

    def _answer(self, body: Any) -> Iterator[str]:
        with self._asking("POST", "/v1/chat/completions", body) as response:
            yield from self._pieces(response)

    def _pieces(self, response: http.client.HTTPResponse) -> Iterator[str]:
        """Yield the text of an event stream, and note at its end whether the answer was cut."""
        was_cut, n_tokens, ended = False, 0, False
        for line in self._lines(response):
            if line == b"[DONE]":
                ended = True
                break
            event = _parsed(line)
            if event.get("error"):
                raise self._refused(event, "the answer failed")
            for choice in event.get("choices", ()):
                was_cut = was_cut or choice.get("finish_reason") == "length"
                if text := choice.get("delta", {}).get("content"):
                    yield text
            n_tokens = (event.get("usage") or {}).get("completion_tokens", n_tokens)
        if not ended and not self._stopped:
            raise ServerError(self.url, "the server has gone in the middle of the answer")
        self.cut_after = n_tokens if was_cut else None

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """Yield the data of the events of a stream, until it ends."""
        try:
            for line in response:
                if line.startswith(b"data:"):
                    yield line[5:].strip()
        except (OSError, http.client.HTTPException):
            return

    def stop(self) -> None:
        """Close the connection, from a signal's handler too: the answer ends, and its slot is free."""
        self._stopped = True
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _listed(self) -> list[dict[str, Any]]:
        with self._asking("GET", "/v1/models") as response:
            models = _parsed(response.read()).get("data")
        if not isinstance(models, list) or not models or not all("id" in model for model in models):
            raise ServerError(self.url, "no list of models; is it a server with OpenAI's interface?")
        return models

    @contextmanager
    def _asking(self, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        """Send a request and give the beginning of its answer; the connection closes with the block.

        Raises:
            ServerError: the server cannot be reached, or answers with an error.
        """
        kind = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        self._connection = kind(self._host, self._port, timeout=SECONDS)
        content = None if body is None else json.dumps(body).encode()
        with closing(self._connection) as connection:
            try:
                connection.request(method, self._path + path, content, self._headers)
                response = connection.getresponse()
                refusal = b"" if response.status == http.client.OK else response.read()
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise ServerError(self.url, f"cannot reach a server there: {reason}") from None
            if response.status != http.client.OK:
                raise self._refused(_parsed(refusal), f"status {response.status} {response.reason}")
            yield response

    def _refused(self, answer: Mapping[str, Any], otherwise: str) -> ServerError:
        error = answer.get("error")
        if not isinstance(error, dict) or not error.get("message"):
            return ServerError(self.url, otherwise)
        return ServerError(self.url, str(error["message"]), error.get("code"), error.get("param"))


def _settings(sampling: Sampling) -> dict[str, Any]:
    """Return the settings of a request that are not the server's defaults, as its fields."""
    default = asdict(Sampling())
    given = {
        name: value for name, value in asdict(sampling).items() if name in ALWAYS or value != default[name]
    }
    return {"max_tokens": given.pop("max_new_tokens")} | given


def _parsed(content: bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one for anything else."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
