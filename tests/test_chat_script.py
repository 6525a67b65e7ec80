"""Talking to a model in a terminal and through a pipe."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from generation_fixtures import ROOT, save_random_adapter

import lit_adapter
from lit_adapter.cli.chat import main
from lit_adapter.data.records import read_records
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.loaded_models import LoadedModels
from lit_adapter.generation.settings import Sampling
from lit_adapter.generation.terminal import Conversation, converse
from lit_adapter.weights.adapter_search import find_adapter

HOW = {"max_new_tokens": 8}


@pytest.fixture
def talk(model: AdaptedLlama) -> Conversation:
    return Conversation(LoadedModels(model, "ours"), Sampling(**HOW), io.StringIO())


def user(*texts: str) -> list[dict[str, Any]]:
    """The user's messages with the model's answers left out."""
    return [{"role": "user", "content": text} for text in texts]


def said(talk: Conversation) -> str:
    return talk.out.getvalue()


def test_every_answer_sees_what_was_said_before(talk: Conversation, model: AdaptedLlama) -> None:
    converse(talk, iter(["Say it.", "", "Again."]))
    first = model.chat(user("Say it."), **HOW)
    history = [*user("Say it."), {"role": "assistant", "content": first}, *user("Again.")]
    second = model.chat(history, **HOW)
    assert said(talk) == f"{first}\n{second}\n"
    assert talk.messages == [*history, {"role": "assistant", "content": second}]


def test_undo_reset_and_system(talk: Conversation, model: AdaptedLlama) -> None:
    converse(talk, iter(["Say it.", "Again.", "/undo"]))
    assert [message["content"] for message in talk.messages[::2]] == ["Say it."]
    converse(talk, iter(["/system Be brief.", "Hello."]))
    system = {"role": "system", "content": "Be brief."}
    assert talk.messages[1]["content"] == model.chat([system, *user("Hello.")], **HOW)
    converse(talk, iter(["/reset"]))
    assert (talk.messages, talk.system) == ([], "Be brief.")
    converse(talk, iter(["/system", "Hello."]))
    assert talk.messages[1]["content"] == model.chat(user("Hello."), **HOW)


def test_what_is_saved_can_be_trained_on(talk: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    converse(talk, iter(["/system Be \u00e4.", "Say it.", f"/save {path}", "/save", f"/save {path}"]))
    (record,) = read_records(path)
    assert [(m.role, m.content) for m in record.messages] == [
        ("system", "Be \u00e4."),
        *((message["role"], message["content"]) for message in talk.messages),
    ]


def test_another_adapter_goes_on_with_the_conversation(
    talk: Conversation,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "other").mkdir(parents=True)
    path = save_random_adapter(tiny_base, tmp_path / "out/other/adapter.safetensors", seed=8)
    assert find_adapter("other") == find_adapter("out/other") == Path("out/other/adapter.safetensors")
    first_model = talk.partner.model
    converse(talk, iter(["Say it.", "/adapter other", "Again."]))
    other = lit_adapter.load(path, tiny_base, device="cpu", dtype="float32")
    assert talk.messages[-1]["content"] == other.chat(talk.messages[:-1], **HOW)
    converse(talk, iter(["/adapter none", "And now?"]))
    assert talk.messages[-1]["content"] == first_model.base.chat(talk.messages[:-1], **HOW)
    converse(talk, iter(["/adapter ours"]))
    assert talk.partner.model is first_model
    capsys.readouterr()
    converse(talk, iter(["/adapter"]))
    assert capsys.readouterr().err == "  none\n  ours  (answers now)\n  other\n"


def test_the_past_is_not_computed_again(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    from lit_adapter.generation.lane import Lane

    whole = Lane._choose

    def noted(self: Lane, logits: Any, slots: Any) -> None:
        read.extend(self.slots[slot].computed for slot in slots if not self.slots[slot].answer)
        whole(self, logits, slots)

    talk.partner.model.forget()
    monkeypatch.setattr(Lane, "_choose", noted)
    converse(talk, iter(["Say it.", "Again.", "And again."]))
    assert len(read) == 3
    assert read[0] > max(read[1:])
    words = len(talk.partner.model.tokenizer.encode("### Instruction:\nAnd again.\n\n### Response:"))
    assert read[2] <= words + 20  # also the answer's end, and what its text is encoded as


def test_ctrl_c_ends_an_answer_and_keeps_what_there_is(
    talk: Conversation,
    model: AdaptedLlama,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def pieces(self: Any, messages: Any, **settings: Any) -> Iterator[str]:
        for number in range(100):
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield f"{number} "

    monkeypatch.setattr(AdaptedLlama, "stream_chat", pieces)
    before = signal.getsignal(signal.SIGINT)
    converse(talk, iter(["Count."]))
    assert talk.messages[-1]["content"] == "0 1 2 3 "
    assert "(stopped)" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def piped(monkeypatch: pytest.MonkeyPatch, text: str, *argv: object) -> str:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    out = io.StringIO()
    fixed = ("--device", "cpu", "--dtype", "float32", "--max_new_tokens", 8)
    with contextlib.redirect_stdout(out):
        assert main([*map(str, (*fixed, *argv))]) == 0
    return out.getvalue()


def test_lines_of_a_pipe_are_answered(
    tiny_base: Path,
    model: AdaptedLlama,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = piped(monkeypatch, "Say it.\n/reset\nSay it.\n", "--adapter", model._source, "--base", tiny_base)
    answer = model.chat(user("Say it."), **HOW)
    assert found == f"{answer}\n" * 2
    assert capsys.readouterr().err == ""
    plain = piped(monkeypatch, "Say it.", "--base", tiny_base, "--system", "Be brief.")
    system = {"role": "system", "content": "Be brief."}
    assert plain == model.base.chat([system, *user("Say it.")], **HOW) + "\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--adapter", "x", "--template", "chatml"],
        ["--base", "x", "--api-key-file", "x"],
        ["--url", "http://127.0.0.1:1", "--base", "x"],
        ["--url", "http://127.0.0.1:1", "--stop_ids", "3"],
        ["--url", ""],
        ["--url", "127.0.0.1:8000"],
        ["--url", "file:///etc/passwd"],
        ["--url", "http://127.0.0.1:99999"],
    ],
)
def test_options_that_make_no_sense(argv: list[str]) -> None:
    with pytest.raises(lit_adapter.UserError):
        main(argv)


class Terminal:
    """A script at a terminal of its own."""

    def __init__(self, *argv: object) -> None:
        self.side, other = pty.openpty()
        # `setsid -c` makes the terminal its own, so that Ctrl-C reaches it.
        command = ["setsid", "-c", sys.executable, *map(str, argv)]
        # Of a test that runs in the background, a script would inherit that Ctrl-C is ignored.
        default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        self.process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, preexec_fn=default)
        os.close(other)
        self.shown = ""

    def until(self, mark: str, *, again: str = "", seconds: float = 250) -> str:
        """What it shows until ``mark``, and that; ``again`` is typed while it shows nothing."""
        end = time.monotonic() + seconds
        while mark not in self.shown:
            assert time.monotonic() < end, self.shown
            if not self.reads():
                self.type(again)
        before, _, self.shown = self.shown.partition(mark)
        return before + mark

    def until_anything(self, seconds: float = 250) -> None:
        """Wait until it shows more than it has shown: not white space, not what moves the cursor."""
        end = time.monotonic() + seconds
        while not re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", self.shown).strip():
            assert time.monotonic() < end, self.shown
            self.reads()

    def reads(self, seconds: float = 0.5) -> bool:
        """Whether it shows something in this time."""
        if not select.select([self.side], [], [], seconds)[0]:
            return False
        self.shown += os.read(self.side, 4096).decode(errors="replace")
        return True

    def type(self, text: str) -> None:
        os.write(self.side, text.encode())


@pytest.mark.slow
def test_a_person_at_a_terminal(tiny_base: Path, model: AdaptedLlama) -> None:
    fixed = ("--device", "cpu", "--dtype", "float32")
    own = Terminal(
        ROOT / "scripts/chat.py", "--adapter", model._source, "--base", tiny_base, *fixed,
        "--max_new_tokens", 400, "--temperature", 1.5,
    )  # fmt: skip
    assert "Ctrl-C stops an answer, Ctrl-D leaves" in own.until("> ")
    own.type("/help\n")
    assert "/adapter NAME" in own.until("/exit")
    own.until("> ")
    own.type("Hello.\n")
    own.until("Hello.")
    own.until_anything()
    own.type("\x03")
    own.until("> ")
    own.type("/undo\n")
    assert "(taken back; 0 messages before it)" in own.until("before it)")
    own.until("> ")
    os.write(own.side, b"caf\xff\n")
    assert "error: not UTF-8 text; set the terminal to UTF-8" in own.until("again")
    own.until("> ")
    own.type("half a line")
    own.until("half a line")
    own.until("(Ctrl-D leaves)", again="\x03")  # readline misses one while it shows what was typed
    own.type("/rest\n")
    assert "did you mean '/reset'" in own.until("'/reset'")
    own.until("> ")
    own.type("\x04")
    assert own.process.wait(250) == 0


def test_saved_lines_are_json(talk: Conversation, tmp_path: Path) -> None:
    converse(talk, iter(["Say <|im_end|> it.", f"/save {tmp_path}/x.jsonl"]))
    saved = json.loads((tmp_path / "x.jsonl").read_text())
    assert saved["messages"] == talk.messages
