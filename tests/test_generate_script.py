"""scripts/generate.py: its options, its batch files, and as a real process where only that shows it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from generation_fixtures import CHOICES, ROOT, process, script, standard_input

import lit_adapter
from lit_adapter.errors import UserError
from lit_adapter.generation import answering
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.settings import Sampling

TASK = ("Say it back.", "red blue")
SHORT = ("--max_new_tokens", 12)


@pytest.fixture(scope="module")
def common(tiny_base: Path, adapter: Path) -> tuple[object, ...]:
    return ("--adapter", adapter, "--base", tiny_base, *CHOICES, *SHORT)


def test_prompt_and_input(common: tuple[object, ...], model: AdaptedLlama) -> None:
    wanted = model.generate(*TASK, max_new_tokens=12) + "\n"
    assert script(*common, "--prompt", TASK[0], "--input", TASK[1]) == wanted


def test_every_sampling_option_arrives(common: tuple[object, ...], model: AdaptedLlama) -> None:
    how = {
        "temperature": 1.3,
        "top_k": 200,
        "top_p": 0.97,
        "min_p": 0.001,
        "repetition_penalty": 1.1,
        "seed": 5,
        "stop": ("zz", "0"),
        "stop_ids": (7, 8),
    }
    argv: list[object] = []
    for name, value in how.items():
        argv += [f"--{name}", *(value if isinstance(value, tuple) else [value])]
    assert script(*common, "--prompt", "x", *argv) == model.generate("x", max_new_tokens=12, **how) + "\n"
    assert model.generate("x", max_new_tokens=12, **how) != model.generate("x", max_new_tokens=12)


def test_the_adapter_names_its_base(
    tiny_base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: AdaptedLlama
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / tiny_base.name).symlink_to(tiny_base)
    monkeypatch.chdir(tmp_path)
    found = script("--adapter", adapter, *CHOICES, *SHORT, "--prompt", "x")
    assert found == model.generate("x", max_new_tokens=12) + "\n"


def test_plain_base_with_and_without_template(tiny_base: Path, common: tuple[object, ...]) -> None:
    plain = lit_adapter.load(base=tiny_base, device="cpu", dtype="float32")
    wanted = plain.generate("x", max_new_tokens=12) + "\n"
    assert script("--base", tiny_base, *CHOICES, *SHORT, "--prompt", "x") == wanted
    assert script(*common, "--no-adapter", "--prompt", "x") == wanted
    custom = lit_adapter.load(base=tiny_base, device="cpu", dtype="float32", template="Q: {instruction} A:")
    found = script(
        "--base", tiny_base, *CHOICES, *SHORT, "--prompt", "x", "--template", "Q: {instruction} A:"
    )
    assert found == custom.generate("x", max_new_tokens=12) + "\n" != wanted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def both(model: AdaptedLlama) -> tuple[str, str]:
    return model.base.generate("x", max_new_tokens=12), model.generate("x", max_new_tokens=12)


def test_compare_one_under_the_other(common: tuple[object, ...], model: AdaptedLlama) -> None:
    plain, adapted = both(model)
    wanted = f"--- plain base ---\n{plain}\n\n--- with adapter ---\n{adapted}\n"
    assert plain != adapted
    assert script(*common, "--compare", "--prompt", "x") == wanted


@pytest.mark.parametrize(("width", "columns"), [(120, 2), (70, 1)])
def test_compare_on_a_terminal(
    common: tuple[object, ...], width: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    found = script(*common, "--compare", "--prompt", "x", out=Terminal())
    together = [line for line in found.splitlines() if "plain base" in line and "with adapter" in line]
    assert bool(together) == (columns == 2)
    assert max(map(len, found.splitlines()[-1:])) <= width


def test_compare_cuts_no_long_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON without spaces is one word to a terminal."""

    class Fixed:
        def stream(self, *task: str, **sampling: object) -> Iterator[str]:
            yield '{"name":"' + "n" * 200 + '","end":1}'

        base = property(lambda self: self)

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    answering.compare(Fixed(), TASK, Sampling(), out := Terminal())  # type: ignore[arg-type]
    columns = zip(*(line.split("\u2502")[1:3] for line in out.getvalue().splitlines()[3:-1]), strict=True)
    texts = ["".join(cell.strip() for cell in column) for column in columns]
    assert texts == ['{"name":"' + "n" * 200 + '","end":1}'] * 2


def test_standard_input_is_one_instruction(
    common: tuple[object, ...], model: AdaptedLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    standard_input(monkeypatch, "Say it\n twice: \u00d6l\n".encode())
    assert script(*common) == model.generate("Say it\n twice: \u00d6l", max_new_tokens=12) + "\n"


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "standard input is empty"), (b"ab\xff", r"not UTF-8 text \(byte 2\)")]
)
def test_standard_input_that_is_no_text(
    common: tuple[object, ...], content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    standard_input(monkeypatch, content)
    with pytest.raises(UserError, match=message):
        script(*common)


def test_nothing_to_answer(common: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(UserError, match="give --prompt TEXT, --prompts FILE, or text on standard input"):
        script(*common)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--prompt x", "give --adapter FILE, or --base FOLDER"),
        ("--base b --prompt x --prompts y --output z", "--prompt together with --prompts"),
        ("--base b --input x --prompts y --output z", "--input together with --prompts"),
        ("--adapter a --compare --prompts y --output z", "--compare together with --prompts"),
        ("--base b --prompts y", "--prompts needs --output FILE"),
        (
            "--base b --prompt x --output z",
            "--output without --prompts has no meaning; add --prompts FILE, or leave --output out",
        ),
        ("--base b --prompt x --batch_size 2", "--batch_size without --prompts"),
        ("--base b --prompt x --overwrite", "--overwrite without --prompts"),
        ("--base b --prompt x --columns.input y", "--columns.input without --prompts"),
        ("--base b --prompts - --output z --columns.input output", "expected three different names"),
        ("--base b --prompts y --output z --batch_size 0", "--batch-size is 0; expected 1 or more"),
        (
            "--base b --prompt x --no-adapter",
            "--no-adapter without --adapter has no meaning; add --adapter FILE",
        ),
        ("--base b --prompt x --compare", "--compare without --adapter"),
        (
            "--adapter a --prompt x --template chat",
            "--template together with --adapter, which brings its template, has no meaning",
        ),
        ("--adapter a --prompt x --compare --no-adapter", "--compare together with --no-adapter"),
        ("--base b --prompt= ", "--prompt is empty"),
        ("--base b --prompt x --temperature -1", "temperature is -1.0; expected"),
        ("--base b --prompt x --temprature 1", "unknown option '--temprature'; did you mean '--temperature'"),
        ("--base b --prompt x --top_k x", "top_k"),
        ("--adapter nowhere.safetensors --prompt x", "nowhere.safetensors: no such adapter file"),
        ("--base nowhere --prompt x", "nowhere"),
        ("--base b --prompt x --device abacus", "device is 'abacus'; expected auto, cpu or cuda"),
        *(
            [("--base b --prompt x --device gpu", "no CUDA device; expected cpu, or cuda where one is")]
            if not torch.cuda.is_available()
            else []
        ),
        ("--base b --prompt x --device cuda:1", "to use another GPU set CUDA_VISIBLE_DEVICES"),
        ("--base b --prompts nowhere.jsonl --output z", "nowhere.jsonl: file not found"),
    ],
)
def test_mistakes_are_told_in_one_line(argv: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        script(*argv.split())
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base_is_refused(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    described = json.loads((other / "fingerprint.json").read_text())
    described["weights"] = "0" * 64
    (other / "fingerprint.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"trained on base 'tiny' .* not on 'other' \(000000000000\)"):
        script("--adapter", adapter, "--base", other, *CHOICES, "--prompt", "x")


class Closing(io.StringIO):
    """A reader that goes away after two pieces."""

    n_written = 0

    def write(self, text: str) -> int:
        self.n_written += 1
        if self.n_written > 2:
            raise BrokenPipeError
        return super().write(text)


def test_generation_stops_when_the_reader_goes_away(common: tuple[object, ...]) -> None:
    out = Closing()
    with pytest.raises(BrokenPipeError):
        script(*common, "--prompt", "x", out=out)
    assert out.n_written == 3


@pytest.mark.slow
def test_as_a_process_a_closed_pipe_ends_quietly(common: tuple[object, ...]) -> None:
    running = process(*common, "--prompt", "x", "--max_new_tokens", 800)
    assert running.stdout.read(1)
    running.stdout.close()
    assert running.stderr.read() == b""
    assert running.wait(250) == 141


def test_as_a_process_a_mistake_is_one_line_and_status_2() -> None:
    running = process("--base", "b", "--prompt", "x", "--top_p", "7")
    out, err = running.communicate(timeout=250)
    assert (running.returncode, out) == (2, b"")
    assert err == b"error: top_p is 7.0; expected a number above 0, up to 1 (off)\n"


@pytest.mark.slow
def test_help_needs_no_torch_and_prompting_no_lightning(common: tuple[object, ...]) -> None:
    code = """
import sys, time
from lit_adapter.cli.generate import main as generate_main
start = time.process_time()
try:
    generate_main(["--help"])
except SystemExit as end:
    assert not end.code
assert time.process_time() - start < 5
assert "torch" not in sys.modules
assert generate_main(sys.argv[1:]) == 0
assert not {"lightning", "pytorch_lightning", "transformers", "peft"} & set(sys.modules)
"""
    argv = [sys.executable, "-c", code, *map(str, common), "--prompt", "x"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "Sample among the k most likely tokens; 0: all. (type: int, default: 0)" in " ".join(
        done.stdout.split()
    )


def test_what_is_read_is_not_replaced(
    tiny_base: Path, adapter: Path, common: tuple[object, ...], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"instruction": "x"}\n')
    for taken in (adapter, tiny_base / "model.safetensors"):
        before = taken.read_bytes()
        with pytest.raises(UserError, match=f"{taken.name}: --output is also an input"):
            script(*common, "--prompts", prompts, "--output", taken, "--overwrite")
        assert taken.read_bytes() == before
