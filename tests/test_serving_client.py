"""`chat.py` at a server: the terminal's conversation is the same, and the server's models answer."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, Literal

import pytest
from generation_fixtures import ROOT
from serving_fixtures import Running, folder_of_adapters, running
from test_chat_script import Terminal
from test_serving import until

import lit_adapter
from lit_adapter.cli.chat import main
from lit_adapter.errors import UserError
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.loaded_models import LoadedModels
from lit_adapter.generation.settings import Sampling
from lit_adapter.generation.terminal import Conversation, converse
from lit_adapter.model.cpu_decode import CpuDecode
from lit_adapter.serving import client, worker
from lit_adapter.serving.client import ServerModels, read_key

KEY = "key-of-a-client-0123456789"


@pytest.fixture(scope="module")
def paths(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folder_of_adapters(tiny_base, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(tiny_base: Path, paths: dict[str, Path]) -> Iterator[Running]:
    with running(base=tiny_base, adapters=paths, context=600) as found:
        yield found


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> AdaptedLlama:
    return lit_adapter.load(base=tiny_base, device="cpu", dtype="float32")


LINES = ["Say it.", "Again.", "/undo", "And again.", "/adapter {}", "Once more.", "/reset", "Say it."]
SAMPLINGS = [
    Sampling(max_new_tokens=8),
    Sampling(max_new_tokens=10, temperature=1.3, top_k=20, top_p=0.9, seed=5, stop=("e",)),
    Sampling(max_new_tokens=10, temperature=0.8, min_p=0.05, repetition_penalty=1.3, frequency_penalty=0.5),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "penalised"])
def test_a_conversation_at_a_server_is_the_one_with_loaded_models(
    server: Running,
    base: AdaptedLlama,
    paths: dict[str, Path],
    sampling: Sampling,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said, told = [], []
    here = LoadedModels(base.with_adapter(paths["alpha"]), str(paths["alpha"]))
    there = ServerModels(server.v1, name="alpha")
    for partner, other in ((here, str(paths["beta"])), (there, "beta")):
        talk = Conversation(partner, sampling, io.StringIO())
        converse(talk, iter(line.format(other) for line in LINES))
        said.append((talk.out.getvalue(), talk.messages))
        told.append(capsys.readouterr().err.replace(other, "beta"))
    assert said[0] == said[1]
    # Models in this process count the tokens of the answer's text, which random text may change.
    own, theirs = ([line for line in each.splitlines() if "(ended" not in line] for each in told)
    assert own == theirs
    assert f"(ended after {sampling.max_new_tokens} tokens" in told[1]


def test_its_models_are_listed_and_chosen(
    server: Running, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models, name = ServerModels(server.url), tiny_base.resolve().name
    assert models.name == "alpha"  # the first adapter, as on the page
    talk = Conversation(models, SAMPLINGS[0], io.StringIO())
    converse(
        talk, iter(["/adapter", "/adapter gama", "/adapter gamma", "Say it.", "/adapter none", "Again."])
    )
    told = capsys.readouterr().err
    assert told.startswith(f"  {name}\n  alpha  (answers now)\n  beta\n  gamma\n")
    assert f"error: {server.url.rstrip('/')}: no model 'gama'; did you mean 'gamma'?" in told
    assert f"({name} answers from here on)" in told
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    with pytest.raises(UserError, match="no model 'delta'"):
        ServerModels(server.url, name="delta")


def test_lists_that_a_pipe_asks_for_are_shown(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error: answers alone go where they are read from."""
    talk = Conversation(ServerModels(server.url), SAMPLINGS[0], io.StringIO(), interactive=False)
    converse(talk, iter(["/adapter", "/help", "/reset"]))
    told = capsys.readouterr().err
    assert "  alpha  (answers now)\n  beta\n" in told
    assert "  /undo " in told
    assert "(a new conversation)" not in told
    assert talk.out.getvalue() == ""


def test_an_answer_has_what_room_there_is(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Conversation(ServerModels(server.url), Sampling(max_new_tokens=700), io.StringIO())
    converse(talk, iter(["Say it."]))
    assert talk.messages[1]["content"]
    converse(talk, iter(["word " * 600]))
    assert "the conversation fills the server's context; /reset starts again" in capsys.readouterr().err
    assert len(talk.messages) == 2


def test_the_system_prompt_is_sent(server: Running) -> None:
    talk = Conversation(ServerModels(server.url), SAMPLINGS[0], io.StringIO())
    converse(talk, iter(["/system Be brief.", "Say it."]))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say it."}]
    body = {"model": "alpha", "messages": messages, "max_tokens": 8, "temperature": 0}
    wanted = server.ask("v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
    assert talk.messages[1]["content"] == wanted


def test_what_the_server_refuses_is_told(
    tiny_base: Path, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, mine = tmp_path / "keys", tmp_path / "mine"
    keys.write_text(f"{KEY}\n")
    mine.write_text(f"# from Ada\n{KEY}  # mine\n")
    with running(base=tiny_base, adapters=paths, api_keys=keys) as server:
        with pytest.raises(UserError, match=r"127.0.0.1:\d+: .*key"):
            ServerModels(server.url)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Say it.\n")))
        out = io.StringIO()
        with redirect_stdout(out):
            assert main(["--url", server.url, "--api-key-file", str(mine), "--adapter", "beta"]) == 0
        assert out.getvalue().strip()
        talk = Conversation(ServerModels(server.url, KEY), Sampling(temperature=3.0), io.StringIO())
        with pytest.raises(UserError, match="temperature"):
            talk.take("Say it.")
        assert talk.messages == []
    with pytest.raises(UserError, match="cannot reach a server there: Connection refused"):
        talk.take("Say it.")
    for content, message in (("# none\n", "no key"), ("kéy\n", "characters outside ASCII")):
        mine.write_text(content)
        with pytest.raises(UserError, match=message):
            read_key(mine)


class Interrupting(io.StringIO):
    """Sends this process Ctrl-C with the third piece that is written."""

    n_written = 0

    def write(self, text: str) -> int:
        self.n_written += 1
        if self.n_written == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def test_ctrl_c_ends_an_answer_and_frees_its_slot(
    tiny_base: Path,
    paths: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The twentieth step waits until the server knows that its client has gone; then there is no other."""
    steps, going_on, plain = [], threading.Event(), CpuDecode.step

    def counted(self: Any, *given: Any) -> Any:
        steps.append(1)
        if len(steps) == 20:
            going_on.wait(250)
        return plain(self, *given)

    monkeypatch.setattr(CpuDecode, "step", counted)
    monkeypatch.setattr(worker, "EVENT_SECONDS", 0.0)  # the step that waits would keep back what is due later
    sampling = Sampling(max_new_tokens=150, temperature=1.5, seed=3)
    before = signal.getsignal(signal.SIGINT)
    with running(base=tiny_base, adapters=paths) as server:
        talk = Conversation(ServerModels(server.url), sampling, Interrupting())
        talk.take("Say it.")
        until(lambda: "chat/completions" in server.log.getvalue())
        going_on.set()
        until(lambda: server.counter("lit_adapter_slots_used") == 0)
        assert len(steps) <= 20
        assert "(stopped)" in capsys.readouterr().err
        assert talk.out.getvalue() == talk.messages[1]["content"] + "\n"
        assert signal.getsignal(signal.SIGINT) is before
        talk.out, talk.sampling = io.StringIO(), SAMPLINGS[0]
        talk.take("Again.")
        assert talk.messages[-1]["content"]


def reply(body: bytes, head: bytes = b"", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\n%s\r\n\r\n%s" % (status, head or b"Content-Length: %d" % len(body), body)


LISTED = reply(b'{"data": [{"id": "m"}]}')


@contextmanager
def stand_in(*answers: bytes, then: Literal["goes", "is silent", "interrupts"] = "goes") -> Iterator[str]:
    """A server that answers each request once. After the last it goes, or is silent; Ctrl-C may come."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            for number, content in enumerate(answers, start=1):
                connection, _ = listening.accept()
                with connection, suppress(OSError):  # the client may go before it has read all
                    connection.recv(65536)
                    connection.sendall(content)
                    if number == len(answers) and then == "interrupts":
                        os.kill(os.getpid(), signal.SIGINT)
                    if number < len(answers) or then == "goes":
                        connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(30)
        assert not thread.is_alive()


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


CLOSED_AT_ITS_END = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "answer", [b"", STREAM, CLOSED_AT_ITS_END], ids=["not begun", "begun", "begun without a length"]
)
def test_ctrl_c_ends_waiting_for_a_server_that_says_nothing(
    answer: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with stand_in(LISTED, answer, then="interrupts") as url:
        talk = Conversation(ServerModels(url), SAMPLINGS[0], io.StringIO())
        talk.take("Say it.")
    assert "(stopped)" in capsys.readouterr().err
    assert talk.messages[1]["content"] == ""


def test_a_server_that_goes_in_the_middle_of_an_answer_is_told() -> None:
    event = b'data: {"choices": [{"index": 0, "delta": {"content": "one"}}]}\n\n'
    with stand_in(LISTED, STREAM + b"%x\r\n%s\r\n" % (len(event), event)) as url:
        talk = Conversation(ServerModels(url), SAMPLINGS[0], io.StringIO())
        with pytest.raises(UserError, match="the server disconnected in the middle of the answer"):
            talk.take("Say it.")
    assert talk.out.getvalue() == "one"
    assert talk.messages == []


def streamed(*events: bytes) -> bytes:
    """An answer whose events are those, after one that says "one"."""
    first = b'{"choices": [{"index": 0, "delta": {"content": "one"}}]}'
    lines = b"".join(b"data: %s\n\n" % event for event in (first, *events))
    return reply(lines, b"Content-Type: text/event-stream")


DEEP = b'{"a": ' * 100_000
MORE = b'{"choices": [{"delta": {"content": "two"}}]}'
HINT = "; is it a server with OpenAI's interface?"


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (b'{"choices": [{"del', f"it is not JSON{HINT}"),
        (b"", f"it is not JSON{HINT}"),
        (b"5", f"it is a number, expected an object{HINT}"),
        (b"\xff", f"it is not JSON{HINT}"),
        (DEEP, f"it is nested too deeply{HINT}"),
        (b'{"choices": null}', f'"choices" is null, expected a list{HINT}'),
        (b'{"choices": {"0": 1}}', f'"choices" is an object, expected a list{HINT}'),
        (b'{"choices": 5}', f'"choices" is a number, expected a list{HINT}'),
        (b'{"choices": ["two"]}', f'a member of "choices" is a text, expected an object{HINT}'),
        (b'{"choices": [{"delta": null}]}', f'"delta" is null, expected an object{HINT}'),
        (
            b'{"choices": [{"delta": {"content": 5}}]}',
            f'"content" is a number, expected a text or null{HINT}',
        ),
        (b'{"choices": [{"delta": {"content": ["two"]}}]}', '"content" is a list, expected a text or null'),
        (b'{"choices": [], "usage": []}', '"usage" is a list, expected an object or null'),
        (
            b'{"usage": {"completion_tokens": "8"}}',
            '"completion_tokens" is a text, expected a number or null',
        ),
        (b'{"choices": [], "x": "%s"}' % (b"x" * 2000), "a line has more than 1,000 bytes"),
    ],
    ids=range(15),
)
def test_an_answer_with_an_event_that_cannot_be_read_is_not_kept(
    event: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LIMIT", 1000 if event is not DEEP else 10_000_000)
    with stand_in(LISTED, streamed(event, MORE, b"[DONE]")) as url:
        talk = Conversation(ServerModels(url), SAMPLINGS[0], io.StringIO())
        with pytest.raises(UserError) as error:
            talk.take("Say it.")
    assert str(error.value).startswith(f"{url}: cannot read its answer: {reason}")
    assert talk.out.getvalue() == "one"
    assert talk.messages == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply(b'{"data": [', b"Content-Length: 99"), "it ends in the middle"),
        (reply(b'5\r\n{"dat', b"Transfer-Encoding: chunked"), "it ends in the middle"),
        (reply(b"chunk\r\n", b"Transfer-Encoding: chunked"), "it ends in the middle"),
        (reply(b"<html>"), f"it is not JSON{HINT}"),
        (reply(DEEP), f"it is nested too deeply{HINT}"),
        (reply(b"[]"), f"it is a list, expected an object{HINT}"),
        (reply(b"{}"), f'"data" is null, expected a list{HINT}'),
        (reply(b'{"data": []}'), f'"data" has no model{HINT}'),
        (reply(b'{"data": ["idx"]}'), f'a member of "data" is a text, expected an object{HINT}'),
        (reply(b'{"data": [5]}'), f'a member of "data" is a number, expected an object{HINT}'),
        (reply(b'{"data": [{"id": null}]}'), f'"id" is null, expected a text{HINT}'),
        (reply(b'{"data": [%s]}' % (b" " * 2000)), "it has more than 1,000 bytes"),
        (reply(b'{"data": [%s]}' % (b" " * 2000), b"X: y"), "it has more than 1,000 bytes"),
    ],
    ids=range(13),
)
def test_a_list_of_models_that_cannot_be_read_is_told(
    answer: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LIMIT", 1000 if DEEP not in answer else 10_000_000)
    with stand_in(answer) as url, pytest.raises(UserError) as error:
        ServerModels(url)
    assert str(error.value).startswith(f"{url}: cannot read its list of models: {reason}")


def test_a_server_that_hangs_within_a_body_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SECONDS", 0.2)
    for status in (b"200 OK", b"500 Worse"):
        half = reply(b'{"da', b"Content-Length: 99", status)
        with stand_in(half, then="is silent") as url, pytest.raises(UserError) as error:
            ServerModels(url)
        wanted = "cannot read its list of models: timed out" if status == b"200 OK" else "status 500 Worse"
        assert str(error.value) == f"{url}: {wanted}"


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"error": {"message": [1]}}', b'{"error": 5}', b"x" * 2000]
)
def test_a_refusal_that_cannot_be_read_is_told_by_its_status(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LIMIT", 1000 if body.startswith(b"x") else 10_000_000)
    with stand_in(reply(body, status=b"418 Teapot")) as url, pytest.raises(UserError) as error:
        ServerModels(url)
    assert str(error.value) == f"{url}: status 418 Teapot"


@pytest.mark.parametrize(
    "url",
    [
        "http://a..b:80",
        f"http://{'a' * 64}.org",
        "http://host/é",
        "http://a b/",
        "http://host/a b",
        "http://host:0",
        "http://:secret@host",
        "http://h\x7f",
        "http://[::1",
        "host:80",
        "http://host:port",
    ],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"--url '.*: expected an address such as http://127.0.0.1:8000"):
        ServerModels(url)


def test_an_ipv6_address_without_a_port_has_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def connect(place: tuple[str, int], *others: Any) -> Any:
        asked.append(place)
        raise OSError(111, "Refused")

    monkeypatch.setattr(socket, "create_connection", connect)
    for url in ("http://[::1]", "https://[::1]/v1", "http://[::1]:8000"):
        with pytest.raises(UserError, match="cannot reach a server there: Refused"):
            ServerModels(url)
    assert asked == [("::1", 80), ("::1", 443), ("::1", 8000)]


@pytest.mark.parametrize(
    ("usage", "cut_after"),
    [
        (b"null", None),
        (b"{}", None),
        (b'{"completion_tokens": null}', None),
        (b'{"completion_tokens": 8}', 8),
    ],
)
def test_tokens_that_a_server_does_not_count_are_not_told(
    usage: bytes, cut_after: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    last = b'{"choices": [{"delta": {}, "finish_reason": "length"}], "usage": null}'
    counted = b'{"choices": [], "usage": %s}' % usage
    with stand_in(LISTED, streamed(last, counted, b"[DONE]")) as url:
        talk = Conversation(ServerModels(url), SAMPLINGS[0], io.StringIO())
        talk.take("Say it.")
    assert talk.partner.cut_after == cut_after
    assert "after 0 tokens" not in capsys.readouterr().err
    assert talk.messages[1]["content"] == "one"


def test_half_a_character_is_shown_as_a_question_mark(tmp_path: Path) -> None:
    with stand_in(LISTED, streamed(rb'{"choices": [{"delta": {"content": "\ud83d"}}]}', b"[DONE]")) as url:
        talk = Conversation(ServerModels(url), SAMPLINGS[0], io.StringIO())
        talk.take("Say it.")
    talk.take(f"/save {tmp_path / 'chat.jsonl'}")
    saved = json.loads((tmp_path / "chat.jsonl").read_bytes())
    assert saved["messages"][1]["content"] == "one?"


@pytest.mark.slow
def test_a_person_at_a_terminal_talks_to_a_server(
    tiny_base: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    """Three processes: the server, the script in a terminal of its own, and this one."""
    ready, log = tmp_path / "ready", tmp_path / "log"
    command = [sys.executable, "scripts/serve.py", "--adapter", str(paths["alpha"]), "--port", "0"]
    command += ["--base", str(tiny_base), "--device", "cpu", "--dtype", "float32", "--ready-file", str(ready)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    try:
        until(lambda: ready.exists() and " at " in log.read_text(), seconds=200)
        url = log.read_text().split(" at ")[1].split()[0]
        own = Terminal(ROOT / "scripts/chat.py", "--url", url, "--max_new_tokens", 400, "--temperature", 1.5)
        assert "alpha at " in own.until("/adapter lists its models")
        own.until("> ")
        own.type("Hello.\n")
        own.type("/adapter\n")
        assert "(answers now)" in own.until("(answers now)")
        own.until("> ")
        own.type("/adapter none\n")
        own.until("answers from here on)")
        own.until("> ")
        own.type("\x04")
        assert own.process.wait(250) == 0
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(250) == 0
