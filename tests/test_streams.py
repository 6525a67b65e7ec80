"""Standard output that is closed, full, or cannot show a character; and what a terminal is not sent."""

from __future__ import annotations

import ast
import io
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_runs import SCRIPT, arguments

from lit_adapter.errors import UserError, visible
from lit_adapter.streams import Shown, say, write_answer

RESULT = "import sys; from lit_adapter.cli.command import run; run(lambda argv: print('Öl ' * 40_000) or 0)"
"""A script whose output is its result, longer than a pipe holds."""
FILES = """
from pathlib import Path
from lit_adapter.cli.command import run
from lit_adapter.streams import output_is_no_result

def main(argv):
    output_is_no_result()
    for number in range(4):
        print('Öl ' * 20_000, flush=True)
    assert not __import__('sys').stdout.isatty()
    Path(argv[0]).write_text('done')
    return 0

run(main)
"""
FULL = "standard output: cannot write: No space left on device\n"


def shell(redirection: str, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command under a redirection; the status is Python's, also in a pipe."""
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirection}; exit ${{PIPESTATUS[0]}}', "bash", sys.executable]
        + [str(word) for word in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        (">&-", 0, ""),
        ("<&- >&-", 0, ""),
        (">&- 2>&-", 0, ""),
        (">/dev/full", 2, f"error: {FULL}"),
        (">/dev/full 2>&-", 2, ""),
        ("2>/dev/full >/dev/full", 2, ""),
        ("| head -c 2", 141, ""),
    ],
)
def test_output_that_is_the_result(redirection: str, status: int, said: str) -> None:
    done = shell(redirection, "-c", RESULT)
    assert (done.returncode, done.stderr) == (status, said)


@pytest.mark.parametrize(
    ("redirection", "said"),
    [
        (">&-", ""),
        (">/dev/full", f"warning: {FULL.strip()}; the work goes on without it\n"),
        (
            "| head -c 2",
            "warning: standard output: cannot write: Broken pipe; the work goes on without it\n",
        ),
    ],
)
def test_output_beside_files(tmp_path: Path, redirection: str, said: str) -> None:
    done = shell(redirection, "-c", FILES, tmp_path / "file")
    assert (done.returncode, done.stderr) == (0, said)
    assert (tmp_path / "file").read_text() == "done"


@pytest.mark.parametrize("option", ["--help", pytest.param("--print_config", marks=pytest.mark.slow)])
def test_help_for_a_reader_that_has_gone(option: str) -> None:
    done = shell("| true; sleep 0.5", SCRIPT, option)
    assert "Traceback" not in done.stderr
    assert shell(">/dev/full", SCRIPT, option).stderr == f"error: {FULL}"


def test_a_terminal_without_the_character() -> None:
    done = shell("", "-c", RESULT, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout[:3]) == (0, "?l ")


@pytest.mark.slow
def test_a_run_without_output(tiny_base: Path, tiny_records: Path, tmp_path: Path) -> None:
    """Its log is on a full disk, and its folder has a name that the terminal cannot show."""
    command = arguments(tiny_base, tiny_records, tmp_path / "Öl", "--optim.max_steps", "2")
    done = shell(">/dev/full", SCRIPT, *command, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, f"warning: {FULL.strip()}; the work goes on without it\n")
    assert (tmp_path / "Öl" / "adapter.safetensors").is_file()
    again = shell("", SCRIPT, *command, "--resume", "last", PYTHONIOENCODING="ascii")
    assert again.returncode == 0
    assert "?l: already complete, 2 steps; nothing to do" in again.stdout


def test_an_unbuffered_script_is_heard_as_it_speaks() -> None:
    """As under PYTHONUNBUFFERED, which logs of long runs ask for."""
    code = (
        "import sys; from lit_adapter.cli.command import run; "
        "run(lambda argv: print('first') or sys.stdin.read() and 0 or 0)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-u", "-c", code], **pipes) as process:
        heard, _, _ = select.select([process.stdout], [], [], 30)  # it waits for its input meanwhile
        process.communicate("x")
    assert heard


RANGES = (range(32), range(0x7F, 0xA0), range(0x202A, 0x202F), range(0x2066, 0x206A))
CONTROLS = [chr(code) for codes in RANGES for code in codes]


def test_a_line_is_written_whole() -> None:
    """Processes that share an unbuffered standard error would mix their lines otherwise."""
    written: list[str] = []

    class Unbuffered(io.StringIO):
        def write(self, text: str) -> int:
            if text:
                written.append(text)
            return len(text)

    say("error: no such file", Unbuffered())
    assert written == ["error: no such file\n"]


def test_what_a_terminal_obeys_is_written_out() -> None:
    """All controls but tab and line feed, whatever is printed through; letters of every script stay."""
    for control in CONTROLS:
        shown = visible(f"a{control}b")
        assert shown == ("a" + control + "b" if control in "\t\n" else ascii(f"a{control}b")[1:-1])
    kept = "\u00d6l \u05e9\u05dc\u05d5\u05dd \U0001f468\u200d\U0001f469 \u200f \ufeff \u4e00"
    assert visible(kept) == kept
    assert str(UserError("a\x1b[2J\r\nb\u202e")) == r"a\x1b[2J b\u202e"


def test_answers_are_unchanged_in_a_pipe_and_harmless_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    text, pipe, terminal = "one\n\ttwo\x1b[2J\r\x07", io.StringIO(), Terminal()
    for out in (pipe, terminal):
        for letter in text:  # as it is streamed
            write_answer(letter, out)
    assert pipe.getvalue() == text
    assert terminal.getvalue() == "one\n\ttwo\\x1b[2J\\r\\x07"


def test_lines_are_harmless_in_a_pipe_too(capsys: pytest.CaptureFixture[str]) -> None:
    """They may be read on a terminal later."""
    say("wrote a\x1b[2J")
    say(Shown("\x1b[2mdim\x1b[0m"))
    assert capsys.readouterr().out == "wrote a\\x1b[2J\n\x1b[2mdim\x1b[0m\n"


def test_only_say_prints() -> None:
    """What prints past it could carry a stranger's control characters to the terminal."""
    for path in sorted((SCRIPT.parents[1] / "lit_adapter").rglob("*.py")):
        calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
        printing = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert printing == [] or path.name == "streams.py", f"{path}:{printing}"
