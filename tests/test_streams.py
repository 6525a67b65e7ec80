"""Standard output that is closed, full, or cannot show a character: one line, and no work lost."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_runs import SCRIPT, arguments

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
        timeout=120,
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
