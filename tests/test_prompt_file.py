"""Files of prompts: answered in order, resumed after a kill to the same bytes, refused with file and line."""

from __future__ import annotations

import csv
import datetime
import io
import json
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from generation_fixtures import CHOICES, json_lines, script, standard_input
from warm_runs import Run, signal_after_answers

import lit_adapter
from lit_adapter import device
from lit_adapter.config import Columns
from lit_adapter.errors import UserError
from lit_adapter.files.locks import one_at_a_time
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.prompt_file import STANDARD_INPUT, read_prompts

SHORT = ("--max_new_tokens", 40, "--batch_size", 2, "--temperature", 1.0)


@pytest.fixture(scope="module")
def common(tiny_base: Path, adapter: Path) -> tuple[object, ...]:
    return ("--adapter", adapter, "--base", tiny_base, *CHOICES, *SHORT)


@pytest.fixture(scope="module")
def prompts(tiny_records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    records = json.loads(tiny_records.read_text(encoding="utf-8"))[:21]
    lines = [
        {"instruction": r["instruction"], **({"input": r["input"]} if r["input"] else {})} for r in records
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(common: tuple[object, ...], prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The output of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert script(*common, "--prompts", prompts, "--output", out) == f"wrote {out} (21 answers)\n"
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]
    return out.read_bytes()


@pytest.fixture(scope="module")
def killed(
    common: tuple[object, ...], prompts: Path, whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    """What a process that was killed in the middle left behind."""
    out = tmp_path_factory.mktemp("killed") / "out.jsonl"
    command = [str(word) for word in (*common, "--prompts", prompts, "--output", out)]
    kill = partial(signal_after_answers, 1, signal.SIGKILL)
    running = Run(command, tmp_path_factory.mktemp("log") / "log", {}, kill, script="generate.py")
    assert running.wait() == -signal.SIGKILL, running.output
    assert not out.exists()
    left = out.with_name(".out.jsonl.partial").read_bytes()
    assert 9 <= left.count(b"\n") < 22
    return left


def test_answers_stand_in_the_order_of_the_file(
    whole: bytes, prompts: Path, adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    model = lit_adapter.load(adapter, tiny_base, device="cpu", dtype="float32")
    (tmp_path / "whole.jsonl").write_bytes(whole)
    found = json_lines(tmp_path / "whole.jsonl")
    for record, task in zip(found, json_lines(prompts), strict=True):
        output = model.generate(**task, max_new_tokens=40, temperature=1.0)
        assert record == {**task, "output": output}
        assert list(record) == [*task, "output"]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(
    common: tuple[object, ...], prompts: Path, whole: bytes, killed: bytes, tmp_path: Path
) -> None:
    header = killed.index(b"\n") + 1
    everything = killed[:header] + whole  # killed after the last answer, before the rename
    for number, left in enumerate(
        [killed, killed[:-1], killed[: header + 1], killed[: header - 3], b"", everything]
    ):
        out = tmp_path / f"out{number}.jsonl"
        (tmp_path / f".{out.name}.partial").write_bytes(left)
        script(*common, "--prompts", prompts, "--output", out)
        assert out.read_bytes() == whole
    assert not list(tmp_path.glob(".*"))


def test_finished_answers_are_not_computed_again(
    common: tuple[object, ...], prompts: Path, whole: bytes, killed: bytes, tmp_path: Path
) -> None:
    """A mark in an answer that the killed run had finished is still there at the end."""
    header, first, rest = killed.split(b"\n", 2)
    marked = json.dumps({**json.loads(first), "output": "MARK"}, ensure_ascii=False).encode()
    (tmp_path / ".out.jsonl.partial").write_bytes(b"\n".join([header, marked, rest]))
    script(*common, "--prompts", prompts, "--output", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b"\n".join([marked, whole.split(b"\n", 1)[1]])


def test_another_batch_size_may_go_on(
    common: tuple[object, ...], prompts: Path, whole: bytes, killed: bytes, tmp_path: Path
) -> None:
    """Someone who ran out of memory needs just that."""
    (tmp_path / ".out.jsonl.partial").write_bytes(killed)
    script(*common, "--batch_size", 1, "--prompts", prompts, "--output", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_precision_chosen_by_a_timing_is_kept(
    tiny_base: Path, adapter: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor multiplies bf16 faster by a hair: in the first run, and no longer in the second."""

    def answers(self: AdaptedLlama, tasks: Sequence[object], **options: object) -> list[str]:
        dtypes.append(self.model.embed_tokens.weight.dtype)
        if len(dtypes) == 2:
            raise KeyboardInterrupt
        return ["x"] * len(tasks)

    dtypes: list[torch.dtype] = []
    monkeypatch.setattr(AdaptedLlama, "continue_batch", answers)
    out = tmp_path / "out.jsonl"
    run = ("--adapter", adapter, "--base", tiny_base, "--device", "cpu", *SHORT, "--prompts", prompts)
    monkeypatch.setattr(device, "_bf16_pays", lambda device: True)
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted: 8 of 21 answers are kept; the same command"):
        script(*run, "--output", out)
    monkeypatch.setattr(device, "_bf16_pays", lambda device: False)
    with pytest.raises(UserError, match="an unfinished run with other settings"):
        script(*run, "--output", out, "--dtype", "float32")
    script(*run, "--output", out, "--dtype", "auto")
    assert dtypes == [torch.bfloat16] * 4
    script(*run, "--output", tmp_path / "new.jsonl")
    assert dtypes[4] == torch.float32


@pytest.mark.parametrize(
    ("argv", "change", "message"),
    [
        (("--seed", 1), b"", "an unfinished run with other settings"),
        pytest.param(
            *(("--no-adapter",), b"", "an unfinished run with other settings"), marks=pytest.mark.slow
        ),
        ((), b'{"instruction": "one more"}\n', "an unfinished run with other prompts"),
    ],
)
def test_an_unfinished_run_of_something_else_is_refused_and_kept(
    common: tuple[object, ...],
    prompts: Path,
    killed: bytes,
    tmp_path: Path,
    argv: tuple[object, ...],
    change: bytes,
    message: str,
) -> None:
    partial, asked = tmp_path / ".out.jsonl.partial", tmp_path / "prompts.jsonl"
    partial.write_bytes(killed)
    asked.write_bytes(prompts.read_bytes() + change)
    run = (*common, *argv, "--prompts", asked, "--output", tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=message):
        script(*run)
    assert partial.read_bytes() == killed
    script(*run, "--overwrite")
    assert len(json_lines(tmp_path / "out.jsonl")) == 21 + bool(change)
    assert not partial.exists()


def test_a_damaged_unfinished_run_is_refused(
    common: tuple[object, ...], prompts: Path, killed: bytes, tmp_path: Path
) -> None:
    header, first, second, rest = killed.split(b"\n", 3)
    for damaged in (b"\n".join([header, second, first, rest]), b"\n".join([header, b"{", second, rest])):
        (tmp_path / ".out.jsonl.partial").write_bytes(damaged)
        with pytest.raises(UserError, match=r"partial:2: not the answer to .*prompts.jsonl:1"):
            script(*common, "--prompts", prompts, "--output", tmp_path / "out.jsonl")


def test_an_unfinished_run_of_brackets_is_refused(
    common: tuple[object, ...], prompts: Path, killed: bytes, tmp_path: Path
) -> None:
    """JSON nested deeper than Python's reader goes, in the first line and in an answer."""
    brackets = b"[" * 100_000 + b"\n"
    header = killed[: killed.index(b"\n") + 1]
    for content, message in ((brackets, "with a damaged first line"), (header + brackets, ":2: not the ans")):
        (tmp_path / ".out.jsonl.partial").write_bytes(content)
        with pytest.raises(UserError, match=message):
            script(*common, "--prompts", prompts, "--output", tmp_path / "out.jsonl")


def test_a_dash_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--output is -; answers go to a file, so name one"):
        script("--base", "b", "--prompts", "p.jsonl", "--output", "-")


def test_two_runs_do_not_write_one_output(
    common: tuple[object, ...], prompts: Path, killed: bytes, tmp_path: Path
) -> None:
    out, partial = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.partial"
    partial.write_bytes(killed)
    with (
        one_at_a_time(out),
        pytest.raises(UserError, match=r"out\.jsonl: in use by process \d+; wait"),
    ):
        script(*common, "--prompts", prompts, "--output", out)
    assert partial.read_bytes() == killed
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]


def test_an_output_in_the_way(
    common: tuple[object, ...], prompts: Path, whole: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    with pytest.raises(UserError, match=r"out\.jsonl: already there"):
        script(*common, "--prompts", prompts, "--output", out)
    assert out.read_text() == "mine\n"
    script(*common, "--prompts", prompts, "--output", out, "--overwrite")
    assert out.read_bytes() == whole
    with pytest.raises(UserError, match="is a folder"):
        script(*common, "--prompts", prompts, "--output", tmp_path, "--overwrite")
    for suffix in (".csv", ".JSON", ".txt", ".parquet"):
        with pytest.raises(
            UserError, match=rf"x\{suffix}: answers are written as JSON Lines; name .* \.jsonl$"
        ):
            script(*common, "--prompts", prompts, "--output", tmp_path / f"x{suffix}")
    with pytest.raises(UserError, match="is the file of --prompts"):
        script(*common, "--prompts", prompts, "--output", prompts, "--overwrite")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"instuction": "x"}',
            r":2: key 'instruction' is missing \(found: 'instuction'\); add it, .* --columns.instruction",
        ),
        ('{"instruction": 3}', ":2: 'instruction' is the number 3; expected a string"),
        ('{"instruction": "x", "input": []}', ":2: 'input' is a list; expected a string"),
        ('{"instruction": " "}', ":2: 'instruction' is empty"),
        ('{"instruction": "\\ud800"}', ":2: 'instruction' has .* half of a character"),
        ('{"instruction": "x"', ":2:20: not valid JSON"),
        ('["x"]', ":2: a record is a list"),
        (
            '{"instruction": "' + "red " * 2000 + '"}',
            r":2: the prompt has \d+ tokens, but the base's context is 1024",
        ),
    ],
)
def test_a_malformed_prompt_names_its_line(
    common: tuple[object, ...], tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"instruction": "fine", "input": null, "output": 3}\n' + line + "\n")
    with pytest.raises(UserError, match=r"prompts\.jsonl" + message):
        script(*common, "--prompts", path, "--output", tmp_path / "out.jsonl")
    assert [found.name for found in tmp_path.iterdir()] == ["prompts.jsonl"]


TABLE = [
    {"id": "7", "question": "Say; it", "context": "red, blue", "answer": "old"},
    {"id": "8", "question": "Say\tit", "context": "", "answer": "older"},
]
RENAMED = Columns(instruction="question", input="context", output="answer")


def write_table(path: Path) -> Path:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(TABLE), path)
    elif path.suffix == ".csv":
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, list(TABLE[0]))
        writer.writeheader()
        writer.writerows(TABLE)
        path.write_bytes(stream.getvalue().encode())
    else:
        lines = [json.dumps(row) for row in TABLE]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_format_of_training_is_read_with_its_columns(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"table{suffix}")
    prompts = read_prompts(path, RENAMED, ("answer",))
    assert [(prompt.instruction, prompt.input) for prompt in prompts] == [
        ("Say; it", "red, blue"),
        ("Say\tit", ""),
    ]
    found = [json.loads(prompt.line({"answer": "new"})) for prompt in prompts]
    assert found == [{**row, "answer": "new"} for row in TABLE]
    assert [list(row) for row in found] == [["id", "question", "context", "answer"]] * 2
    with pytest.raises(UserError, match="no record has the input column 'text'; correct its name"):
        read_prompts(path, Columns(instruction="question", input="text"))


def test_other_columns_are_kept_and_the_answer_gets_its_own(
    tiny_base: Path, adapter: Path, common: tuple[object, ...], tmp_path: Path
) -> None:
    """The column of right answers stays beside the new one."""
    names = ("--columns.instruction", "question", "--columns.input", "context", "--columns.output", "ours")
    path, out = write_table(tmp_path / "table.csv"), tmp_path / "out.jsonl"
    script(*common, *names, "--max_new_tokens", 5, "--prompts", path, "--output", out)
    model = lit_adapter.load(adapter, tiny_base, device="cpu", dtype="float32")
    answers = [
        model.generate(row["question"], row["context"], max_new_tokens=5, temperature=1.0) for row in TABLE
    ]
    assert json_lines(out) == [{**row, "ours": text} for row, text in zip(TABLE, answers, strict=True)]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"\xef\xbb\xbfone\r\n\n  \n two {\n", [1, 4]),
        (b'\n{"instruction": "one"}\n{"instruction": " two {"}', [2, 3]),
        (b'[{"instruction": "one"},\n{"instruction": " two {"}]', [1, 2]),
        (b'instruction\none\n" two {"\n', [2, 3]),
        (b'id;"instruction"\r\n7;one\r\n8; two {\r\n', [2, 3]),
    ],
)
def test_standard_input_is_text_json_lines_an_array_or_csv(
    content: bytes, lines: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    standard_input(monkeypatch, content)
    prompts = read_prompts(STANDARD_INPUT)
    assert [prompt.instruction for prompt in prompts] == ["one", " two {"]
    assert [prompt.origin for prompt in prompts] == [f"standard input:{line}" for line in lines]


def test_a_text_file_has_an_instruction_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("one\u2028still one\r\n\n[two]\n".encode())
    assert [(p.instruction, p.input) for p in read_prompts(path)] == [
        ("one\u2028still one", ""),
        ("[two]", ""),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "standard input is empty; expected prompts"),
        (b'{"instruction": "a"}\n{"instruction"', r"standard input:2:\d+: not valid JSON"),
        (b"a\nb\xff", r"standard input:2: not UTF-8: byte 0xff"),
        (b"text,label\na,b\n", r"standard input:1: 'text,label' looks like .* a CSV .*--columns.instruction"),
        (b"instruction,label\na,b,c\n", r"standard input:2: 3 fields, but the header names 2 columns"),
    ],
)
def test_broken_standard_input_names_its_line(
    content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    standard_input(monkeypatch, content)
    with pytest.raises(UserError, match=message):
        read_prompts(STANDARD_INPUT)


def test_plain_text_has_no_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Say it, twice.\n")
    for columns, field in ((Columns("question"), "instruction"), (Columns(input="context"), "input")):
        message = rf"was read as plain text, .*; leave out --columns\.{field}, or give JSON Lines"
        standard_input(monkeypatch, path.read_bytes())
        with pytest.raises(UserError, match=f"^standard input {message}"):
            read_prompts(STANDARD_INPUT, columns)
        with pytest.raises(UserError, match=rf"prompts\.txt {message}"):
            read_prompts(path, columns)
    (prompt,) = read_prompts(path, Columns(output="answer"), ("answer",))
    assert prompt.instruction == "Say it, twice."


def test_standard_input_is_answered_and_goes_on(
    common: tuple[object, ...], prompts: Path, whole: bytes, killed: bytes, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / ".out.jsonl.partial").write_bytes(killed)
    standard_input(monkeypatch, prompts.read_bytes())
    script(*common, "--prompts", "-", "--output", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_values_that_json_lacks_become_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "table.parquet"
    columns = {
        "instruction": ["a"],
        "day": [datetime.date(2026, 1, 2)],
        "x": [float("nan")],
        "raw": [b"\xff"],
    }
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns | {"n": [[1, None]]}), path)
    (prompt,) = read_prompts(path)
    assert json.loads(prompt.line({})) == {
        "instruction": "a",
        "day": "2026-01-02",
        "x": "NaN",
        "raw": "b'\\xff'",
        "n": [1, None],
    }


def test_half_a_character_in_another_column_stays_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"instruction": "\u00e4", "id": "\\ud83d\u00e4"}')
    (line,) = (prompt.line({"output": "b"}) for prompt in read_prompts(path))
    assert json.loads(line.decode())["id"] == "\ud83d\u00e4"


def test_an_unfinished_run_of_other_values_is_refused(
    common: tuple[object, ...], prompts: Path, killed: bytes, tmp_path: Path
) -> None:
    """They belong to the answers' rows, and so does the name of the answer's column."""
    (tmp_path / ".out.jsonl.partial").write_bytes(killed)
    asked, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    asked.write_bytes(prompts.read_bytes().replace(b"}", b', "id": 1}', 1))
    with pytest.raises(UserError, match="an unfinished run with other prompts"):
        script(*common, "--prompts", asked, "--output", out)
    with pytest.raises(UserError, match="an unfinished run with other settings"):
        script(*common, "--prompts", prompts, "--output", out, "--columns.output", "answer")


TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say it."}]
GOING_ON = [*TURNS, {"role": "assistant", "content": "It."}, {"role": "user", "content": "Again."}]


def test_conversations_are_answered(
    common: tuple[object, ...], adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """As `chat` answers them; an answer at the end of a record takes no part."""
    answered = [*TURNS, {"role": "assistant", "content": "It."}]
    rows: list[dict[str, object]] = [
        {"id": 1, "messages": GOING_ON},
        {"id": 2, "messages": answered, "output": "old"},
    ]
    file, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script(*common, "--prompts", file, "--output", out)
    model = lit_adapter.load(adapter, tiny_base, device="cpu", dtype="float32")
    wanted = model.chat_batch([GOING_ON, TURNS], max_new_tokens=40, temperature=1.0)
    given = [{"id": 1, "messages": GOING_ON}, {"id": 2, "messages": answered}]
    assert json_lines(out) == [row | {"output": text} for row, text in zip(given, wanted, strict=True)]


def test_conversations_in_sharegpts_form_are_answered(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    said = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It."}]
    file.write_text(json.dumps({"conversations": said}) + "\n")
    (prompt,) = read_prompts(file)
    assert [(message.role, message.content) for message in prompt.messages] == [("user", "Say it.")]


@pytest.mark.parametrize(
    ("row", "more", "message"),
    [
        ({"messages": TURNS[1]}, (), r"asked.jsonl:2: 'messages' is an object; expected a list of messages"),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            (),
            r"2: 'messages' has no message to answer",
        ),
        ({"instruction": "Say it."}, (), r"asked.jsonl:2: 'messages' is null; expected a list of messages"),
        ({"messages": TURNS}, ("--choices", "a,b"), r"asked.jsonl:1: --choices answers tasks"),
    ],
    ids=["no list", "no question", "a task", "choices"],
)
def test_conversations_that_cannot_be_answered_are_refused(
    row: dict[str, object],
    more: tuple[str, ...],
    message: str,
    adapter: Path,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    file, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    file.write_text(json.dumps({"messages": TURNS}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        script("--adapter", adapter, "--base", tiny_base, *CHOICES, "--prompts", file, "--output", out, *more)
    assert not out.exists()
