"""A stand-in for the Hugging Face Hub on this machine, and the scripts run against it."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from warm_runs import run_script

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "a-token-that-may-write"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as listing, fetching and committing to a repository needs."""

    repositories: ClassVar[dict[str, Path]]
    fetched: ClassVar[list[str]]
    cards: ClassVar[list[str]]
    made: ClassVar[dict[str, bool]]
    home: ClassVar[Path]
    address: ClassVar[str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").removeprefix("api/models/").split("/")
        name, verb, revision, rest = "/".join(parts[:2]), *(*parts[2:], "", "", "")[:3]
        if name == "org/gated":
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        if name not in self.repositories:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("", "main", "v1", COMMIT):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        folder = self.repositories[name]
        if verb != "resolve":
            files = sorted(folder.iterdir())
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in files]
            description = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
            content = json.dumps(tree if verb == "tree" else description).encode()
            return self.answer(200, {"Content-Type": "application/json"}, content)
        content = (folder / rest).read_bytes()
        if self.command == "GET":
            self.fetched.append(rest)
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.answer(200, headers, content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {}, b'{"error": "Invalid token"}')
        parts = self.path.split("?")[0].strip("/").removeprefix("api/models/").split("/")
        if parts[-1] == "validate-yaml":
            content = json.loads(body)["content"]
            self.cards.append(content)
            return self.answer(200, {}, b'{"errors": [], "warnings": []}')
        if parts[-2:] == ["repos", "create"]:
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name.startswith("others/"):
                return self.answer(403, {}, b'{"error": "Forbidden"}')
            self.made[name] = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.repositories.setdefault(name, self.home / name).mkdir(parents=True, exist_ok=True)
            return self.answer(200, {}, json.dumps({"url": f"{self.address}/{name}"}).encode())
        name, verb = "/".join(parts[:2]), parts[2]
        if verb == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            files = [{**file, "shouldIgnore": False} for file in files]
            return self.answer(200, {}, json.dumps({"files": files}).encode())
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                content = base64.b64decode(line["value"]["content"])
                (self.repositories[name] / line["value"]["path"]).write_bytes(content)
        made = {"commitUrl": f"{self.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
        return self.answer(200, {}, json.dumps({"success": True, **made}).encode())

    def answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command in ("GET", "POST"):
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[type[Hub]]:
    class Handler(Hub):
        repositories: ClassVar[dict[str, Path]] = {}
        fetched: ClassVar[list[str]] = []
        cards: ClassVar[list[str]] = []
        made: ClassVar[dict[str, bool]] = {}
        home: ClassVar[Path] = tmp_path / "the-hub"

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    Handler.address = f"http://127.0.0.1:{server.server_port}"
    yield Handler
    server.shutdown()
    server.server_close()
    thread.join()


def script(
    place: Path, endpoint: str, *arguments: object, name: str = "download.py", **variables: str
) -> subprocess.CompletedProcess[str]:
    own = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(place / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return run_script(name, *arguments, folder=place, **(own | variables))
