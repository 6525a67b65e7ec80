"""Faults 1 to 34, and 104: data files, what is in them, and the cache of tokens."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench import OK, Bench, Outcome, Row

from lit_adapter.data.encode import encode_records
from lit_adapter.data.records import Records, overlap, read_records
from lit_adapter.errors import UserError
from lit_adapter.files.write import write_json
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template

LINE = json.dumps(OK)
DEEP = "[" * 100_000


def refused(name: str, content: str | bytes) -> Callable[[Bench], Outcome]:
    """Fine-tune on a file of this content."""
    return lambda bench: bench.finetune(data=bench.file(name, content))


def texts(path: Path) -> list[tuple[str, str, str]]:
    return [(r.instruction, r.input, r.output) for r in read_records(path)]


def read(name: str, content: str | bytes) -> Callable[[Bench], Outcome]:
    return lambda bench: bench.call(texts, bench.file(name, content))


def encoded(bench: Bench, path: Path, max_length: int = 64, say: list[str] | None = None) -> str:
    """Encode with the tiny base's tokenizer; say what became of the records."""
    tokenizer = load_tokenizer(bench.base)
    records = read_records(path)
    found = encode_records(
        records,
        tokenizer,
        resolve_template("alpaca", tokenizer),
        max_length=max_length,
        cache=bench.folder / "cache",
        say=(say if say is not None else []).append,
    )
    answered = bool(((found.length - found.n_prompt) > 0).all())
    n_dropped = len(records) - len(found)
    return f"{len(found)} kept, {found.n_cut} cut, {n_dropped} dropped, all answered: {answered}"


def encode(records: list[dict[str, str]], max_length: int = 64) -> Callable[[Bench], Outcome]:
    return lambda bench: bench.call(encoded, bench, bench.file("data.json", records), max_length)


def cached_again(change: Callable[[Bench, Path], None]) -> Callable[[Bench], Outcome]:
    """Encode, change something about the cache, encode again."""

    def tried(bench: Bench) -> Outcome:
        path = bench.file("data.json", [OK])
        encoded(bench, path)
        change(bench, next((bench.folder / "cache").iterdir()))
        lines: list[str] = []
        outcome = bench.call(encoded, bench, path, 64, lines)
        bench.before = bench.snapshot()  # the cache is replaced, which is the point
        files = len(list((bench.folder / "cache").iterdir()))
        return Outcome(outcome.status, f"{outcome.out}; {files} files; {lines}", outcome.err)

    return tried


def flip(bench: Bench, folder: Path) -> None:
    content = bytearray((folder / "ids").read_bytes())
    content[-1] ^= 1
    (folder / "ids").write_bytes(content)


def cut_in_two(bench: Bench, folder: Path) -> None:
    (folder / "ids").write_bytes((folder / "ids").read_bytes()[:90])


def of_another_version(bench: Bench, folder: Path) -> None:
    about = json.loads((folder / "about.json").read_text())["about"] | {"version": 0}
    checksum = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    write_json(folder / "about.json", {"checksum": checksum, "about": about})


def of_another_question(bench: Bench, folder: Path) -> None:
    tokenizer = load_tokenizer(bench.base)
    encode_records(
        read_records(bench.file("other.json", [LONG])),
        tokenizer,
        resolve_template("alpaca", tokenizer),
        max_length=64,
        cache=bench.folder / "others",
    )
    shutil.rmtree(folder)
    next((bench.folder / "others").iterdir()).rename(folder)


def in_child(task: Callable[[], Outcome]) -> Outcome:
    """Run ``task`` in a child process of this one, which ends there whatever happens."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            outcome = task()
            os.write(writing, outcome.err.encode())
            status = outcome.status
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as stream:
        message = stream.read()
    return Outcome(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "", message)


def as_nobody(bench: Bench) -> Outcome:
    """Read a file without the right to; root may read every file, so the child is not root."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        path = Path(name) / "secret.json"
        path.write_text(json.dumps([OK]))
        path.chmod(0)

        def task() -> Outcome:
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                return Outcome(0, str(read_records(path)), "")
            except UserError as error:
                return Outcome(error.exit_status, "", f"error: {error}\n")

        return in_child(task)


def link_loop(bench: Bench) -> Outcome:
    path = bench.folder / "loop.json"
    path.symlink_to("loop.json")
    return bench.finetune(data=path)


def fifo(bench: Bench) -> Outcome:
    path = bench.folder / "pipe.json"
    os.mkfifo(path)
    return bench.finetune(data=path)


def folder(bench: Bench) -> Outcome:
    path = bench.folder / "folder.json"
    path.mkdir()
    return bench.finetune(data=path)


def huge_record(bench: Bench) -> Outcome:
    """Three megabytes of one record, encoded by a process whose peak is looked at."""
    path = bench.file("huge.json", [{"instruction": "word " * 600_000, "output": "b"}])
    code = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/faults']\n"
        "from data_rows import encoded; from types import SimpleNamespace; from pathlib import Path\n"
        "bench = SimpleNamespace(base=Path(sys.argv[2]), folder=Path(sys.argv[3]))\n"
        "def peak():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM:'))\n"
        "before = peak()  # torch alone takes a different amount in each build\n"
        "print(encoded(bench, Path(sys.argv[4])))\n"
        "grown = peak() - before\n"
        "print('within 700 MB' if grown < 700_000 else f'{grown} kB')\n"
    )
    tests = str(Path(__file__).parents[1])
    arguments = [sys.executable, "-c", code, tests, bench.base, bench.folder, path]
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, timeout=300)
    return Outcome(done.returncode, done.stdout.replace("\n", "; "), done.stderr)


def two_preparers(bench: Bench) -> Outcome:
    """Two processes encode the same records into the same cache, and a third reads what is there."""
    path = bench.file("data.json", [{"instruction": f"task {n}", "output": "b"} for n in range(1500)])
    children = [os.fork()]
    if children[0]:
        children.append(os.fork())
    if 0 in children:
        status = 99
        try:
            status = 0 if "1500 kept" in encoded(bench, path) else 1
        finally:
            os._exit(status)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    lines: list[str] = []
    outcome = bench.call(encoded, bench, path, 64, lines)
    files = len(list((bench.folder / "cache").iterdir()))
    return Outcome(outcome.status, f"{statuses} {files} file {lines} {outcome.out}", outcome.err)


def data_changed_before_resume(bench: Bench) -> Outcome:
    records = json.loads(bench.records.read_text())
    records[0]["output"] += " changed"
    bench.copy_finished_run()
    options = ["--resume", "last", "--optim.max_steps", "9", "--trainer.save_every", "2"]
    return bench.finetune(*options, data=bench.file("changed.json", records))


def counted(bench: Bench) -> str:
    twice = read_records(bench.file("twice.json", [OK, OK, {"instruction": "c", "output": "d"}]))
    held_out = Records(twice.rows[:1], "held out")
    return f"{twice.n_duplicate} repeated, {overlap(held_out, twice).sum()} in both"


HARD = "\U0001f468‍\U0001f469 שלום </s> ### Response: {input} {0} %s \0 end"


def hard_text_survives(bench: Bench) -> str:
    """Every character comes back, none of it as a control token."""
    tokenizer = load_tokenizer(bench.base)
    ids, n_prompt = resolve_template("alpaca", tokenizer).encode_example(tokenizer, HARD, HARD, HARD)
    control = set(tokenizer.control_tokens.values())
    found = [token for token in ids if token in control]
    same = tokenizer.decode(ids[n_prompt:]) == HARD and tokenizer.decode(ids).count(HARD) == 3
    return f"same: {same}, control tokens: {found}"


LONG = {"instruction": "word " * 300, "output": "b"}
FAR = {"instruction": "a", "output": "word " * 300}

ROWS = [
    Row(1, "trailing comma", refused("d.json", f"[\n{LINE},\n]"), r"d\.json:2:36: .*trailing comma; remove"),
    Row(2, "one bad line", refused("d.jsonl", f"{LINE}\n{{\n{LINE}\n"), r"d\.jsonl:2:2: .*one whole JSON"),
    Row(3, "two objects", refused("d.jsonl", f"{LINE}\n{LINE}{LINE}\n"), r"d\.jsonl:2:36: text after"),
    Row(4, "single quotes", refused("d.jsonl", "{'instruction': 'a'}"), r"d\.jsonl:1:2: .*double quotes"),
    Row(4, "python literal", refused("d.json", '[{"output": None}]'), r"d\.json:1:13: not valid JSON"),
    Row(5, "byte order mark", read("d.json", f"\ufeff[{LINE}]"), r"^\[\('a', '', 'b'\)\]$", 0),
    Row(6, "utf-16", refused("d.json", f"[{LINE}]".encode("utf-16")), r"d\.json: not UTF-8 .*save it as"),
    Row(6, "byte ff", refused("d.json", b'[{"\xff'), r"d\.json:1: not UTF-8: byte 0xff at offset 3"),
    Row(
        7,
        "windows line ends",
        read("d.jsonl", f"{LINE}\r\n{LINE}\r\n"),
        r"^\[\('a', '', 'b'\), .*'b'\)\]$",
        0,
    ),
    Row(
        8,
        "unicode line ends",
        read("d.jsonl", '{"instruction": "a\u2028\u0085c", "output": "b"}'),
        r"^\[\('a\\u2028\\x85c', '', 'b'\)\]$",
        0,
    ),
    Row(9, "NaN", refused("d.json", '[{"instruction": NaN}]'), r"d\.json:1: NaN is not JSON; write a string"),
    Row(9, "infinity", refused("d.jsonl", '{"x": -Infinity}'), r"d\.jsonl:1: -Infinity is not JSON"),
    Row(10, "key twice", refused("d.json", '[{"a": 1,\n"a": 2}]'), r"d\.json:1: key 'a' appears twice"),
    Row(11, "nesting", refused("d.json", f"[{DEEP}"), r"d\.json:1: nested too deeply"),
    Row(
        12, "long number", refused("d.json", f'[{{"a": {"1" * 5000}}}]'), r"d\.json:1: a number of more than"
    ),
    Row(
        13, "no output", refused("d.jsonl", f'{LINE}\n{{"instruction": "a"}}'), r":2: key 'output' is missing"
    ),
    Row(
        13,
        "no instruction",
        refused("d.json", '[{"question": "a"}]'),
        r":1: key 'instruction' is missing .*'question'",
    ),
    Row(
        14,
        "number",
        refused("d.json", '[{"instruction": 5}]'),
        r":1: 'instruction' is the number 5; expected",
    ),
    Row(14, "null", refused("d.json", '[{"instruction": "a", "output": null}]'), r":1: 'output' is null"),
    Row(14, "list", refused("d.json", '[{"instruction": ["a"]}]'), r":1: 'instruction' is a list"),
    Row(
        15,
        "one empty output",
        lambda bench: bench.call(
            lambda path: read_records(path).n_empty_output,
            bench.file("d.json", [OK, {"instruction": "a", "output": " \n"}]),
        ),
        r"^1$",
        0,
    ),
    Row(
        15, "only empty outputs", refused("d.json", '[{"instruction": "a", "output": ""}]'), r"all 1 have an"
    ),
    Row(
        16, "empty instruction", refused("d.json", '[{"instruction": " ", "output": "b"}]'), r":1: .*is empty"
    ),
    Row(
        17, "three megabytes", huge_record, r"^1 kept, 1 cut, 0 dropped, .*within 700 MB", 0, True, slow=True
    ),
    Row(
        18,
        "longer than the context",
        encode([LONG, OK], 256),
        r"^2 kept, 1 cut, 0 .* answered: True",
        0,
        True,
    ),
    Row(19, "one answer too long", encode([FAR, OK], 256), r"^1 kept, 0 cut, 1 dropped", 0, True),
    Row(
        19,
        "all answers too long",
        lambda bench: bench.finetune(
            "--data.val_size", 0, "--data.max_length", 64, data=bench.file("d.json", [FAR, FAR])
        ),
        r"d\.json: every answer is longer than data.max_length 64; raise it",
    ),
    Row(
        20,
        "other keys",
        read("d.json", '[{"id": 5, "instruction": "a", "output": "b", "x": {"y": null}}]'),
        r"^\[\('a', '', 'b'\)\]$",
        0,
    ),
    Row(21, "empty file", refused("d.json", ""), r"d\.json: the file is empty"),
    Row(21, "no record", refused("d.json", "[]"), r"d\.json: no usable record: it is empty"),
    Row(21, "folder", folder, r"folder\.json: is a folder without a data file"),
    Row(21, "missing", lambda b: b.finetune(data=b.folder / "no.json"), r"no\.json: file not found; check"),
    Row(
        22,
        "fewer records than a batch",
        lambda bench: bench.finetune("--data.val_size", 0, data=bench.file("d.json", [OK] * 5)),
        r"optim.batch_size is 8, but there are only 5 training records; lower it to 5",
    ),
    Row(
        23, "too large a split", lambda b: b.finetune("--data.val_size", 48), r"val_size 48 of the 48 records"
    ),
    Row(
        23, "negative split", lambda b: b.finetune("--data.val_size=-1"), r"data.val_size is -1.*; expected 0"
    ),
    Row(
        23, "empty split", lambda b: b.finetune("--data.val_size", 0.001), r"val_size 0.001 \(0 records\) of"
    ),
    Row(24, "duplicates", lambda bench: bench.call(counted, bench), r"^1 repeated, 1 in both$", 0, True),
    Row(25, "every script", lambda b: b.call(hard_text_survives, b), r"^same: True", 0),
    Row(
        26,
        "lone surrogate",
        refused("d.json", '[{"instruction": "\\ud83d"}]'),
        r":1: .*lone surrogate.*write",
    ),
    Row(27, "null byte", read("d.json", '[{"instruction": "a\\u0000", "output": "b"}]'), r"a\\x00", 0),
    Row(
        28, "control tokens in text", lambda b: b.call(hard_text_survives, b), r"control tokens: \[0, 1\]$", 0
    ),
    Row(29, "braces in text", lambda b: b.call(hard_text_survives, b), r"^same: True", 0),
    Row(30, "no permission", as_nobody, r"secret\.json: cannot read: Permission denied; choose"),
    Row(30, "loop of links", link_loop, r"loop\.json: a loop of symbolic links"),
    Row(30, "pipe", fifo, r"pipe\.json: not a regular file"),
    Row(31, "two preparers of a cache", two_preparers, r"^\[0, 0\] 1 file \[\] 1500 kept", 0, writes=True),
    Row(
        32, "cache of something else", cached_again(of_another_question), r"1 kept.* 1 files; \['.*damaged", 0
    ),
    Row(
        32,
        "other length",
        lambda bench: bench.call(
            lambda path: [encoded(bench, path), encoded(bench, path, 300)], bench.file("data.json", [LONG])
        ),
        r"^\['1 kept, 1 cut.*', '1 kept, 1 cut",
        0,
        writes=True,
    ),
    Row(
        33, "flipped cache", cached_again(flip), r"1 kept.* 1 files; \['.*tokens-.*damaged cache of tokens", 0
    ),
    Row(
        33,
        "truncated cache",
        cached_again(cut_in_two),
        r"1 kept.* 1 files; \['.*damaged cache of tokens, or of another version; it is made again'\]",
        0,
    ),
    Row(
        33, "cache of another version", cached_again(of_another_version), r"1 kept.* 1 files; \['.*damaged", 0
    ),
    Row(
        34,
        "data changed before a resume",
        data_changed_before_resume,
        r"another run: data\.train \S+changed\.json: its records have changed \(48 records then, 48 now\)$",
    ),
    *(
        Row(104, what, read(name, f"instruction{mark}output\na, b{mark}c\n"), r"^\[\('a, b', '', 'c'\)\]$", 0)
        for what, name, mark in (
            ("semicolons", "data.csv", ";"),
            ("tabs", "data.csv", "\t"),
            ("tabs in a .tsv", "data.tsv", "\t"),
        )
    ),
    Row(
        104,
        "a semicolon too many",
        refused("data.csv", "instruction;output\na;b;c\n"),
        r"data\.csv:2: 3 fields, .* 2 columns; put text with semicolons or line breaks in \"double quotes\"",
    ),
]
