"""`chat.py` at a server: the terminal's conversation is the same, and the server's models answer."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
        assert main(["--url", server.url, "--api-key-file", str(mine), "--adapter", "beta"], out=out) == 0
        assert out.getvalue().strip()
        talk = Conversation(ServerModels(server.url, KEY), Sampling(temperature=3.0), io.StringIO())
        with pytest.raises(UserError, match="temperature"):
            talk.take("Say it.")
        assert talk.messages == []
    with pytest.raises(UserError, match="cannot reach a server there: Connection refused"):
        talk.take("Say it.")
    for content, message in (("# none\n", "no key"), ("kéy\n", "other characters")):
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


@contextmanager
def stand_in(answer: bytes, *, stays: bool) -> Iterator[str]:
    """A server that lists one model and begins an answer. Then it is silent and Ctrl-C comes, or it goes."""
    listed = b'{"data": [{"id": "m"}]}'
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(listed)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            for content in (head + listed, answer):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(content)
                    if content is answer and stays:
                        os.kill(os.getpid(), signal.SIGINT)
                        connection.recv(1)  # until the client goes

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(30)
        assert not thread.is_alive()


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("answer", [b"", STREAM], ids=["not begun", "begun"])
def test_ctrl_c_ends_waiting_for_a_server_that_says_nothing(
    answer: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with stand_in(answer, stays=True) as url:
        talk = Conversation(ServerModels(url), SAMPLINGS[0], io.StringIO())
        talk.take("Say it.")
    assert "(stopped)" in capsys.readouterr().err
    assert talk.messages[1]["content"] == ""


def test_a_server_that_goes_in_the_middle_of_an_answer_is_told() -> None:
    event = b'data: {"choices": [{"index": 0, "delta": {"content": "one"}}]}\n\n'
    with stand_in(STREAM + b"%x\r\n%s\r\n" % (len(event), event), stays=False) as url:
        talk = Conversation(ServerModels(url), SAMPLINGS[0], io.StringIO())
        with pytest.raises(UserError, match="the server has gone in the middle of the answer"):
            talk.take("Say it.")
    assert talk.out.getvalue() == "one"
    assert talk.messages == []


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
