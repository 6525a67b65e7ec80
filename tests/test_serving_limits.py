"""Who may ask, how much and how fast; adapters that come and go; and how a server ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from generation_fixtures import save_random_adapter
from serving_fixtures import Running, folder_of_adapters, running
from test_serving import SAY, stream_begun, until

from lit_adapter.cli.serve import main
from lit_adapter.errors import UserError
from lit_adapter.model.cpu_decode import CpuDecode
from lit_adapter.serving import adapters as adapters_module
from lit_adapter.serving import run as run_module
from lit_adapter.serving.keys import Keys
from lit_adapter.serving.limits import Limits

ROOT = Path(__file__).parents[1]
KEY, ADMIN = "key-of-a-client-0123456789", "key-of-an-admin-0123456789"
ASK = {"model": "alpha", "messages": SAY, "max_tokens": 3, "temperature": 0}
CHAT = "v1/chat/completions"


@pytest.fixture(scope="module")
def paths(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folder_of_adapters(tiny_base, tmp_path_factory.mktemp("served"))


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twentieth of a second for a token."""
    plain = CpuDecode.step

    def slow(self: Any, *given: Any) -> Any:
        time.sleep(0.05)
        return plain(self, *given)

    monkeypatch.setattr(CpuDecode, "step", slow)


def keys_file(folder: Path) -> Path:
    path = folder / "keys.txt"
    path.write_text(f"# of the team\n{KEY}\n\nadmin {ADMIN}  # of Ada\n", encoding="utf-8")
    return path


def test_keys_open_what_they_should_and_are_never_logged(
    tiny_base: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copy(paths["beta"], tmp_path / "beta.safetensors")
    given = {"base": tiny_base, "adapters": {"alpha": paths["alpha"]}, "folder": tmp_path}
    with running(**given, api_keys=keys_file(tmp_path)) as server:
        for path in ("", "page.js", "health", "health/ready"):
            assert server.ask(path)[0] == 200
        for path in ("v1/models", "metrics", "openapi.json", "v1/nothing"):
            status, answer, headers = server.ask(path)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer x", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer", f"Bearer {KEY[:-1]}"):
            assert server.ask(CHAT, ASK, Authorization=wrong)[0] == 401
        assert server.ask(CHAT, ASK, Authorization=f"Bearer {KEY}")[0] == 200
        body = {"name": "beta"}
        assert (
            server.ask("v1/adapters", body, Authorization=f"Bearer {KEY}")[1]["error"]["code"] == "not_admin"
        )
        assert server.ask("v1/adapters", body, Authorization=f"Bearer {ADMIN}")[0] == 201
        assert server.ask("v1/adapters/beta", method="DELETE", Authorization=f"Bearer {KEY}")[0] == 403
        assert server.ask("v1/models", Host="any.example", Authorization=f"Bearer {KEY}")[0] == 200
        log = server.log.getvalue()
        assert '"owner": "key 2"' in log
        assert KEY not in log
        assert ADMIN not in log


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no key; write one per line"),
        ("# nothing\n", "no key"),
        ("short\n", "line 1: the key has fewer than 16 characters"),
        (f"{KEY}\n{KEY}\n", "line 2: this key is given twice"),
        (f"{KEY} {ADMIN}\n", "line 1: expected KEY, or admin KEY"),
        (f"root {KEY}\n", "line 1: expected KEY, or admin KEY"),
    ],
)
def test_files_of_keys_that_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + message) as caught:
        Keys(path)
    assert KEY not in str(caught.value)


def test_adapters_come_and_go_while_answers_run(
    tiny_base: Path, paths: dict[str, Path], tmp_path: Path, slow_steps: None
) -> None:
    """An answer ends with the adapter that it began with."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    shutil.copy(paths["beta"], folder / "beta.safetensors")
    admin = {"Authorization": f"Bearer {ADMIN}"}
    with running(base=tiny_base, folder=folder, api_keys=keys_file(tmp_path)) as server:

        def answer(**more: Any) -> Any:
            return server.ask(CHAT, {**ASK, "model": "beta", "max_tokens": 20, **more}, **admin)

        wanted = answer()[1]["choices"][0]["message"]["content"]
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(answer()))
        thread.start()
        until(lambda: found or "slots_used 1" in server.ask("metrics", **admin)[1])
        assert server.ask("v1/adapters/beta", method="DELETE", **admin)[:2] == (
            200,
            {"id": "beta", "object": "model", "deleted": True},
        )
        assert answer()[0] == 404
        thread.join()
        assert found[0][1]["choices"][0]["message"]["content"] == wanted
        # Another adapter under the same name.
        os.replace(shutil.copy(paths["gamma"], tmp_path / "new"), folder / "beta.safetensors")
        assert server.ask("v1/adapters", {"name": "beta"}, **admin)[0] == 201
        assert answer()[1]["choices"][0]["message"]["content"] != wanted


def test_requests_for_adapters_reach_no_file_but_the_folders_own(
    tiny_base: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    (folder / "run").mkdir(parents=True)
    shutil.copy(paths["alpha"], folder / "run" / "adapter.safetensors")
    shutil.copy(paths["beta"], tmp_path / "outside.safetensors")
    (folder / "bad.safetensors").write_bytes(b"no adapter")
    (folder / "a b.safetensors").write_bytes(paths["alpha"].read_bytes())
    admin = {"Authorization": f"Bearer {ADMIN}"}
    with running(base=tiny_base, folder=folder, api_keys=keys_file(tmp_path)) as server:
        names = [model["id"] for model in server.ask("v1/models", **admin)[1]["data"]]
        assert names == ["tiny", "run"]
        for name in ("../outside", str(tmp_path / "outside"), "outside", ".", "", "run/adapter", "\0"):
            status, answer, _ = server.ask("v1/adapters", {"name": name}, **admin)
            assert (status, answer["error"]["code"]) == (404, "adapter_not_found"), name
        for name in ("bad", "a b"):
            status, answer, _ = server.ask("v1/adapters", {"name": name}, **admin)
            assert (status, answer["error"]["code"]) == (400, "adapter_refused"), name
            assert str(tmp_path) not in json.dumps(answer)
        assert server.ask("v1/adapters", {"name": "tiny"}, **admin)[0] == 404
        assert server.ask("v1/adapters/tiny", method="DELETE", **admin)[1]["error"]["code"] == "base_model"
        assert server.ask("v1/adapters/none", method="DELETE", **admin)[0] == 404
    with running(base=tiny_base, api_keys=keys_file(tmp_path)) as server:
        assert server.ask("v1/adapters", {"name": "run"}, **admin)[1]["error"]["code"] == "no_folder"
    with running(base=tiny_base, folder=folder) as server:
        assert server.ask("v1/adapters", {"name": "run"})[1]["error"]["code"] == "no_admin"


def test_the_folder_is_followed(
    tiny_base: Path, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "SCAN_SECONDS", 0.05)

    def names() -> set[str]:
        return {model["id"] for model in server.ask("v1/models")[1]["data"]}

    with running(base=tiny_base, folder=tmp_path) as server:
        assert names() == {"tiny"}
        half = paths["alpha"].read_bytes()
        (tmp_path / "one.safetensors").write_bytes(half[: len(half) // 2])  # as while it is copied
        until(lambda: "one: refused" in server.log.getvalue())
        (tmp_path / "one.safetensors").write_bytes(half)
        until(lambda: names() == {"tiny", "one"})
        first = server.ask(CHAT, ASK | {"model": "one"})[1]["choices"]
        shutil.copy(paths["beta"], tmp_path / "one.safetensors")
        until(lambda: server.ask(CHAT, ASK | {"model": "one"})[1]["choices"] != first)
        (tmp_path / "one.safetensors").unlink()
        until(lambda: names() == {"tiny"})


def test_an_adapter_of_another_base_is_refused(tiny_base: Path, fused_base: Path, tmp_path: Path) -> None:
    other = save_random_adapter(fused_base, tmp_path / "other.safetensors")
    with pytest.raises(UserError), running(base=tiny_base, adapters={"other": other}):
        pass


def test_a_full_queue_says_when_to_come_again(
    tiny_base: Path, paths: dict[str, Path], slow_steps: None
) -> None:
    limits = Limits(queue=2)
    with running(base=tiny_base, adapters=paths, slots=1, limits=limits) as server:
        long = {"max_tokens": 60}
        connections = [stream_begun(server, **long)]
        status, answer, headers = server.ask(CHAT, ASK | {"n": 3})
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert answer["error"]["type"] == "rate_limit_error"
        assert 1 <= int(headers["retry-after"]) <= 60
        found: list[int] = []
        waiting = threading.Thread(target=lambda: found.append(server.ask(CHAT, ASK | {"n": 2})[0]))
        waiting.start()
        until(lambda: server.counter("lit_adapter_queue_length") == 2)
        assert server.ask(CHAT, ASK)[0] == 429
        connections[0].close()
        waiting.join()
        assert found == [200]
        assert server.ask(CHAT, ASK)[0] == 200


def test_a_client_that_leaves_the_queue_is_forgotten(
    tiny_base: Path, paths: dict[str, Path], slow_steps: None
) -> None:
    with running(base=tiny_base, adapters=paths, slots=1) as server:
        first = stream_begun(server)
        content = json.dumps(ASK)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        waiting = socket.create_connection(("127.0.0.1", server.port))
        waiting.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        until(lambda: server.counter("lit_adapter_queue_length") == 1)
        waiting.close()
        until(lambda: server.counter("lit_adapter_queue_length") == 0)
        first.close()
        until(lambda: server.counter("lit_adapter_slots_used") == 0)


def test_one_key_has_no_more_requests_than_it_may(
    tiny_base: Path, paths: dict[str, Path], slow_steps: None
) -> None:
    with running(base=tiny_base, adapters=paths, limits=Limits(per_key=2)) as server:
        connections = [stream_begun(server) for _ in range(2)]
        status, answer, headers = server.ask(CHAT, ASK)
        assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "too_many_requests", "1")
        assert server.ask("v1/models")[0] == 200
        connections[0].close()
        until(lambda: server.ask(CHAT, ASK)[0] == 200)
        connections[1].close()


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            return found
        if not part:
            return found
        found += part


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (HEAD + b"Content-Length: 100\r\n\r\n{", b"408 Request Timeout"),
        (HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"mod', b"408 Request Timeout"),
        (HEAD[:60], b""),
        (b"", b""),
        (HEAD + b"Content-Length: 99999999\r\n\r\n", b"413 "),
        (HEAD + b"Content-Length: nine\r\n\r\n", b"400 Bad Request"),
        (HEAD + b"Content-Length: -5\r\n\r\n", b"400 Bad Request"),
        (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b"400 Bad Request"),
        (HEAD + b"X: " + b"y" * 100_000 + b"\r\n\r\n", b"HTTP/1.1 4"),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"X%d: y\r\n" % n for n in range(20_000)), b"400 Bad Request"),
        (b"\x16\x03\x01\x02\x00 no http at all\r\n\r\n", b"400 Bad Request"),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n", b"400 Bad Request"),
    ],
    ids=[
        "body",
        "chunk",
        "head",
        "silence",
        "length",
        "word",
        "negative",
        "two",
        "header",
        "headers",
        "tls",
        "path",
    ],
)
def test_slow_and_broken_senders_are_cut_off(hasty: Running, sent: bytes, answer: bytes) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=250) as connection:
        started = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
            connection.sendall(sent)
        found = received(connection)
        assert answer in found[:200], found
        assert time.monotonic() - started < 60
    assert hasty.ask("health")[0] == 200


@pytest.fixture(scope="module")
def hasty(tiny_base: Path, paths: dict[str, Path]) -> Iterator[Running]:
    limits = Limits(receive_seconds=0.7, send_seconds=1.0)
    with running(base=tiny_base, adapters=paths, limits=limits) as server:
        yield server


def test_a_reader_that_does_not_read_loses_its_slot(hasty: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_adapter.serving import replies

    plain = replies._line
    monkeypatch.setattr(replies, "_line", lambda value: plain(value) + b": " + b"x" * 3_000_000 + b"\n\n")
    body = {**ASK, "max_tokens": 80, "stream": True, "logit_bias": {"0": -100, "1": -100}}
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", hasty.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(HEAD + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        until(lambda: "too slow a reader" in hasty.log.getvalue())
        until(lambda: hasty.counter("lit_adapter_slots_used") == 0)


def test_pages_elsewhere_may_ask_only_if_they_are_named(tiny_base: Path, paths: dict[str, Path]) -> None:
    named = "https://chat.example.org"
    with running(base=tiny_base, adapters=paths, cors=(named,)) as server:
        assert server.ask("v1/models", Origin=named)[2]["access-control-allow-origin"] == named
        assert "access-control-allow-origin" not in server.ask("v1/models", Origin="https://x.org")[2]


def test_on_sigterm_answers_end_and_new_ones_are_refused(
    tiny_base: Path, paths: dict[str, Path], tmp_path: Path, slow_steps: None
) -> None:
    with running(base=tiny_base, adapters=paths, ready_file=tmp_path / "ready", grace=250.0) as server:
        until((tmp_path / "ready").exists)
        connection = stream_begun(server, max_tokens=40)
        server.stop()
        until(lambda: not answers_at(server.port))
        rest = received(connection)
        assert b"[DONE]" in rest
        server.thread.join(250)
        assert not server.thread.is_alive()
        assert not (tmp_path / "ready").exists()


def answers_at(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def test_after_the_grace_an_answer_ends_with_an_error(
    tiny_base: Path, paths: dict[str, Path], slow_steps: None
) -> None:
    with running(base=tiny_base, adapters=paths, grace=0.3) as server:
        connection = stream_begun(server, max_tokens=85)
        server.stop()
        rest = received(connection)
        assert b"the server is stopping" in rest
        assert b"[DONE]" not in rest
        server.thread.join(250)
        assert not server.thread.is_alive()


COMMANDS: list[tuple[list[str], str]] = [
    ([], "give --base FOLDER, or adapters with --adapter NAME=FILE or --adapters FOLDER"),
    (["--adapters", "."], "--adapters .: no adapter in it names a base; give --base FOLDER"),
    (["--adapter", "a="], "--adapter 'a=': expected NAME=FILE, or a file"),
    (["--adapter", "a.safetensors"], "a.safetensors: no such adapter file"),
    (["--adapter", "a=x", "--adapter", "a=y"], "the name a is taken by x; give NAME=FILE"),
    (["--adapter", "out/a", "--adapter", "b/a.safetensors"], "the name a is taken by out/a"),
    (["--adapter", "../a=x"], "--adapter '../a=x': 'a=x' cannot be its name; give NAME=../a=x"),
    (
        ["--base", "b", "--host", "0.0.0.0"],
        "--host 0.0.0.0 can be reached from elsewhere; give --api-keys FILE",
    ),
    (["--base", "b", "--insecure"], "--insecure has no meaning for this address"),
    (["--base", "b", "--port", "70000"], "--port is 70000; expected 0 (any free one) to 65535"),
    (["--base", "b", "--slots", "0"], "--slots is 0; expected 1 or more"),
    (["--base", "b", "--context", "0"], "--context is 0; expected 1 or more"),
    (["--base", "b", "--grace", "-1"], "--grace is -1.0; expected 0 or more"),
    (["--base", "b", "--cors", "*"], "--cors *: expected an origin such as https://"),
    (["--base", "b", "--prot", "1"], "unknown option '--prot'; did you mean '--port'?"),
    (["--base", "b", "--api-keys", "no-such-file"], "no-such-file: cannot read: No such file"),
    (["--base", "b", "--adapters", "no-such-folder"], "--adapters no-such-folder: not a folder"),
    (["--base", "no-such-base"], "no-such-base"),
    (["--adapter", "a=no-such-file"], "no-such-file"),
]


@pytest.mark.parametrize(("argv", "message"), COMMANDS, ids=lambda value: " ".join(value)[:40])
def test_commands_that_are_refused(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main([*argv, "--port", "0"] if "--port" not in argv else argv)
    assert message in str(caught.value)


def test_an_address_that_is_taken_is_told_before_anything_is_loaded(tiny_base: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port}: Address already in use"):
            main(["--base", str(tiny_base), "--port", str(port)])


def test_more_slots_or_context_than_there_is_room_for(tiny_base: Path) -> None:
    with pytest.raises(UserError, match=r"--context is 9999; expected 1 to 1024, the base's context"):
        main(["--base", str(tiny_base), "--port", "0", "--context", "9999", "--device", "cpu"])
    with pytest.raises(UserError, match="need more than half of the free memory; lower --slots or --context"):
        main(["--base", str(tiny_base), "--port", "0", "--slots", "100000000", "--device", "cpu"])


def test_a_state_tells_a_file_from_one_that_took_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("x")
    before = adapters_module.state_of(path)
    other = tmp_path / "b"
    other.write_text("y")
    os.utime(other, ns=(0, path.stat().st_mtime_ns))
    os.replace(other, path)
    assert adapters_module.state_of(path) != before


@pytest.mark.slow
def test_the_script_ends_with_status_0_on_sigterm(
    tiny_base: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    """While an answer runs, and with another process that has the port's connection open."""
    ready = tmp_path / "ready"
    command = [
        sys.executable,
        "scripts/serve.py",
        "--adapter",
        f"alpha={paths['alpha']}",
        "--base",
        str(tiny_base),
    ]
    command += [
        "--port",
        "0",
        "--ready-file",
        str(ready),
        "--device",
        "cpu",
        "--context",
        "200",
        "--slots",
        "4",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until(ready.exists)
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"serving tiny and 1 adapter at http://127.0.0.1:(\d+)/", line)
        assert found, line
        body = json.dumps(ASK | {"max_tokens": 80, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", int(found[1]))) as connection:
            connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            connection.recv(1)
            process.send_signal(signal.SIGTERM)
            assert b"[DONE]" in received(connection)
        assert process.wait(250) == 0
        errors = process.stderr.read() if process.stderr else ""
        assert "Traceback" not in errors
        (access,) = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
        assert access["status"] == 200
