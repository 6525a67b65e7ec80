"""A server of a tiny base with adapters, in a thread of the tests' own process."""

from __future__ import annotations

import io
import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_adapter.serving.options import ServerOptions
from lit_adapter.serving.run import serve

NAMES = ("alpha", "beta", "gamma")


@dataclass
class Running:
    """A server that runs."""

    url: str
    stop: Callable[[], None]
    thread: threading.Thread
    log: io.StringIO = field(default_factory=io.StringIO)

    @property
    def v1(self) -> str:
        return self.url + "v1"

    @property
    def port(self) -> int:
        return int(self.url.rstrip("/").rpartition(":")[2])

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON or text, and headers of an answer; ``body`` is JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        request = urllib.request.Request(self.url + path.lstrip("/"), data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=250) as answer:
                return answer.status, parsed(answer.read()), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, parsed(error.read()), dict(error.headers)

    def counter(self, name: str) -> float:
        """The value of one of its metrics."""
        lines = self.ask("metrics")[1].splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).split()[1])


def parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode()


@contextmanager
def running(**options: Any) -> Iterator[Running]:
    """A server of these options, at a free port, until the block ends."""
    found: list[Running] = []
    ready, failed = threading.Event(), []
    log = io.StringIO()
    handler = logging.StreamHandler(log)

    def told(url: str, stop: Callable[[], None]) -> None:
        found.append(Running(url, stop, thread, log))
        ready.set()

    def run() -> None:
        try:
            given = {"port": 0, "slots": 8, "context": 200, "device": "cpu", "dtype": "float32", "grace": 5.0}
            serve(ServerOptions(**given | options), told)
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    for name in ("lit_adapter.serving", "lit_adapter.serving.access"):
        logging.getLogger(name).addHandler(handler)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(250)
    if failed:
        raise failed[0]
    try:
        yield found[0]
    finally:
        if thread.is_alive():
            found[0].stop()
        thread.join(250)
        for name in ("lit_adapter.serving", "lit_adapter.serving.access"):
            logging.getLogger(name).handlers.clear()
        assert not thread.is_alive()


def folder_of_adapters(base: Path, folder: Path) -> dict[str, Path]:
    """Adapters with random gates, by name."""
    from generation_fixtures import save_random_adapter

    return {
        name: save_random_adapter(base, folder / f"{name}.safetensors", seed)
        for seed, name in enumerate(NAMES)
    }
