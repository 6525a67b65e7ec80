"""Records: every fault is refused on its line, every format gives the same records."""

import csv
import hashlib
import io
import json
import os
import pickle
import sys
import tomllib
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_adapter.config import Columns
from lit_adapter.data import strict_json
from lit_adapter.data.reading import records_of
from lit_adapter.data.record import Record
from lit_adapter.data.records import Records, overlap, read_records, split
from lit_adapter.errors import UserError

OK = '{"instruction":"a","output":"b"}'
HARD = [
    {"instruction": "Sum up.", "input": "one,\n\"two\"\t'three'", "output": "six \U0001f468‍\U0001f469 ✓"},
    {"instruction": "שלום", "input": "", "output": " kept \u2028 as\u0085 it is "},
    {"instruction": "### Response:</s>", "input": "{} {input} %s {0.__class__}", "output": "nul \0 end"},
]
DELIMITER_OF = {".csv": ",", ".semicolons.csv": ";", ".tabs.csv": "\t", ".tsv": "\t"}
TEXT_FORMATS = (".json", ".jsonl", *DELIMITER_OF)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(records: Records) -> list[dict[str, str]]:
    return [{"instruction": r.instruction, "input": r.input, "output": r.output} for r in records]


def write_format(folder: Path, suffix: str, rows: list[dict[str, str]]) -> Path:
    path = folder / f"data{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    elif suffix in DELIMITER_OF:
        stream = io.StringIO(newline="")
        delimiter = DELIMITER_OF[suffix]
        path = path.with_suffix("." + suffix.rpartition(".")[2])
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n", delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        path.write_bytes(stream.getvalue().encode())
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [*TEXT_FORMATS, ".parquet"])
def test_every_format_gives_the_same_records(tmp_path: Path, suffix: str) -> None:
    records = read_records(write_format(tmp_path, suffix, HARD))
    assert texts(records) == HARD
    contents = [
        b"".join(len(text.encode()).to_bytes(8, "little") + text.encode() for text in row.values())
        for row in HARD
    ]
    digests = b"".join(hashlib.sha256(content).digest()[:16] for content in contents)
    assert records.sha256 == hashlib.sha256(digests).hexdigest()


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_renamed_columns_and_absent_input(tmp_path: Path, suffix: str) -> None:
    path = write_format(tmp_path, suffix, [{"q": "a", "ignored": "x", "r": "b"}])
    records = read_records(path, columns=Columns(instruction="q", output="r"))
    assert texts(records) == [{"instruction": "a", "input": "", "output": "b"}]
    with pytest.raises(UserError, match="no record has the input column 'ctx'"):
        read_records(path, columns=Columns(instruction="q", input="ctx", output="r"))
    what, header = ("column", ", as the first line is the header") if suffix == ".csv" else ("key", "")
    message = (
        rf":[12]: {what} 'instruction' is missing \(found: 'q', 'ignored', 'r'{header}\); add it, or name"
    )
    with pytest.raises(
        UserError, match=f"{message} the column that holds it with --data.columns.instruction"
    ):
        read_records(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1)] * 3).filter(
            lambda row: row[0].strip() and row[2].strip()
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_text_survives_json_jsonl_and_csv(tmp_path: Path, rows: list[tuple[str, str, str]]) -> None:
    given_rows = [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in rows]
    for suffix in TEXT_FORMATS:
        assert texts(read_records(write_format(tmp_path, suffix, given_rows))) == given_rows


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40), st.integers(0, 200), st.sampled_from(TEXT_FORMATS))
def test_damage_gives_records_or_one_line(tmp_path: Path, junk: bytes, at: int, suffix: str) -> None:
    whole = write_format(tmp_path, suffix, HARD).read_bytes()
    damaged = write(
        tmp_path, f"damaged{Path(suffix).suffix or suffix}", whole[:at] + junk + whole[at + len(junk) :]
    )
    try:
        assert len(read_records(damaged)) <= len(whole)
    except UserError as error:
        message = str(error)
    else:
        return
    assert message.startswith(str(damaged))
    assert "\n" not in message


FAULTS = {
    "array-trailing-comma.json": (f"[\n{OK},\n{OK},\n]", r":3:33: .*trailing comma"),
    "array-missing-comma.json": (f"[\n{OK}\n{OK}]", r":3:1: .*expected ','"),
    "array-unclosed.json": (f"[\n{OK},", r":2:34: .*truncated"),
    "array-then-text.json": (f"[{OK}]\n x", r":2:2: .*after the closing"),
    "array-bad-inside.json": (f'[\n{OK},\n{{"instruction": "a"\n "output": 1}}]', r":4:2: .*',' delimiter"),
    "array-of-numbers.json": (f"[{OK},\n5]", r":2: a record is the number 5; expected an object"),
    "single-object.json": (OK, r":1: .*an object with the keys 'instruction', 'output'; expected an array"),
    "lines.json": (f"{OK}\n{OK}\n", r":1: .*rename the file to \.jsonl"),
    "number.json": ("5", r":1: the file holds the number 5"),
    "bad-line.jsonl": (f'{OK}\n{{"instruction":\n{OK}', r":2:16: not valid JSON"),
    "two-on-a-line.jsonl": (f"{OK}\n{OK} {OK}", r":2:34: text after the object"),
    "array.jsonl": (f"[{OK}]", r":1: .*rename the file to \.json"),
    "spread.jsonl": ('{\n"instruction":"a"}', r":1:2: .*one whole JSON object"),
    "single-quotes.jsonl": (f"{OK}\n{{'instruction': 'a'}}", r":2:2: .*double quotes"),
    "python-none.json": ('[\n\n{"instruction":"a","output":None}]', r":3:29: not valid JSON"),
    "utf16.json": (f"[{OK}]".encode("utf-16"), r": not UTF-8 but UTF-16 .*byte 0"),
    "utf16-no-mark.json": (f"[{OK}]".encode("utf-16-le"), r": not UTF-8 but UTF-16"),
    "byte-ff.jsonl": (OK.encode() + b'\n{"\xff', r":2: not UTF-8: byte 0xff at offset 35"),
    "nan.json": (f'[\n{OK},\n{{"instruction":"a","output":"b","x":NaN}}]', r":3: NaN is not JSON"),
    "infinity.jsonl": (f'{OK}\n{{"x":-Infinity}}', r":2: -Infinity is not JSON"),
    "key-twice.json": (f'[{OK},\n\n{{"output":"a","output":"b"}}]', r":3: key 'output' appears twice"),
    "deep.json": ("[\n" + "[" * 100_000, r":2: nested too deeply"),
    "deep.jsonl": (f'{OK}\n{{"output":' + "[" * 100_000, r":2: nested too deeply"),
    "nearly-deep.jsonl": ('{"instruction":' + "[" * 900 + "]" * 900 + "}", r":1: "),
    "digits.jsonl": (f'{OK}\n{{"x":{"1" * 5000}}}', r":2: a number of more than 4,300 digits"),
    "no-output.jsonl": (f'{OK}\n{{"instruction":"a"}}', r":2: key 'output' is missing \(found: 'instr"),
    "near-name.jsonl": (
        '{"instructions":"a","output":"b"}',
        r":1: key 'instruction' .*did you mean 'instructions'",
    ),
    "number-field.jsonl": (
        '{"instruction":"a","output":5}',
        r":1: 'output' is the number 5; expected a string",
    ),
    "null-field.jsonl": ('{"instruction":null,"output":"b"}', r":1: 'instruction' is null; expected"),
    "list-input.jsonl": ('{"instruction":"a","input":[1],"output":"b"}', r":1: 'input' is a list"),
    "true-field.jsonl": ('{"instruction":"a","output":true}', r":1: 'output' is true/false"),
    "no-task.jsonl": (f'{OK}\n{{"instruction":" \\n","output":"b"}}', r":2: 'instruction' is empty"),
    "surrogate.jsonl": (
        f'{OK}\n{{"instruction":"a","output":"b\\ud83d"}}',
        r":2: 'output' has '\\ud83d', half",
    ),
    "all-empty.jsonl": (
        '{"instruction":"a","output":" "}',
        r": no usable record: all 1 have an empty output",
    ),
    "no-turn.jsonl": (
        '{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0}]}',
        r": no usable record: all 1 have an empty output, or no turn to learn",
    ),
    "empty.json": ("", r": the file is empty"),
    "blank.json": (" \r\n", r": the file is empty"),
    "no-records.json": ("[ \n ]", r": no usable record: it is empty"),
    "header-only.csv": ("instruction,output\n", r": no usable record: it is empty"),
    "short-row.csv": ("instruction,output\na,b\na\n", r":3: 1 fields, .* 2 columns"),
    "long-row.csv": ("instruction,output\na,b,c\n", r":2: 3 fields, .* 2 columns"),
    "open-quote.csv": ('instruction,output\na,b\na,"b\n', r":3: not valid CSV"),
    "semicolons.csv": (
        "instruction;output\na;b;c\n",
        r":2: 3 fields, .* text with semicolons or line breaks",
    ),
    "tabs.csv": ("instruction\toutput\na\n", r":2: 1 fields, .* text with tabs or line breaks"),
    "commas.tsv": (
        "instruction,output\na,b\n",
        r":2: column 'instruction' is missing \(found: 'instruction,out",
    ),
    "bars.csv": ("instruction|output\na|b\n", r":2: column 'instruction' is missing"),
    "column-twice.csv": ("instruction,output,output\na,b,c\n", r":1: column 'output' appears twice"),
    "junk.parquet": ("PAR1 not really", r": (not a readable Parquet file|Parquet needs pyarrow)"),
    "text.txt": ("a", r": unknown data format \(suffix '\.txt'\).*\.jsonl"),
    "nosuffix": ("a", r": unknown data format \(no suffix\)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_refused_where_it_is(tmp_path: Path, name: str) -> None:
    content, message = FAULTS[name]
    path = write(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as caught:
        read_records(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert "\n" not in line
    line.encode()


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "dangling.json").symlink_to("nowhere.json")
    (tmp_path / "folder.json").mkdir()
    messages = {
        "fifo.json": "not a regular file",
        "loop.json": "a loop of symbolic links",
        "dangling.json": r"file not found \(a broken link\)",
        "folder.json": "is a folder",
        "missing.json": "file not found; check",
        "nul\0.json": "embedded null byte",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            read_records(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path: Path) -> None:
    path = write(tmp_path, "data.jsonl", OK)
    path.chmod(0)
    with pytest.raises(UserError, match="cannot read: Permission denied"):
        read_records(path)


@pytest.mark.parametrize("suffix", TEXT_FORMATS)
def test_byte_order_mark_and_line_ends_change_nothing(tmp_path: Path, suffix: str) -> None:
    path = write_format(tmp_path, suffix, HARD)
    plain, content = read_records(path), path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    marked = read_records(path)
    assert marked.rows == plain.rows
    assert marked.sha256 == plain.sha256
    assert [r.line for r in marked] == [r.line for r in plain]


def test_a_separator_within_a_name_does_not_count(tmp_path: Path) -> None:
    """Quotes hide it, and where two divide the header alike it is the comma that does."""
    quoted = write(tmp_path, "quoted.csv", 'instruction;"a, b, c";output\nx,y;;z\n')
    assert [(r.instruction, r.output) for r in read_records(quoted)] == [("x,y", "z")]
    alike = write(tmp_path, "alike.csv", "\ninstruction,output;\nx;y,z\n")
    columns = Columns(output="output;")
    assert [(r.instruction, r.output) for r in read_records(alike, columns=columns)] == [("x;y", "z")]


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    array = write(tmp_path, "a.json", f'[\n {OK}, {OK},\n\n\n{{\n"instruction":"a",\n"output":"b"}},\n{OK}]')
    assert [r.line for r in read_records(array)] == [2, 2, 5, 8]
    table = write(tmp_path, "a.csv", 'instruction,output\n\na,"b\n\nc"\nc,d\n')
    assert [r.origin for r in read_records(table)] == [f"{table}:3", f"{table}:6"]


def test_counts_of_what_real_data_holds(tmp_path: Path) -> None:
    empty = '{"instruction":"x","output":" \\n"}'
    null_input = '{"instruction":"a","input":null,"output":"b"}'
    records = read_records(write(tmp_path, "a.jsonl", "\n".join([OK, empty, OK, "", null_input, empty])))
    assert (len(records), records.n_empty_output, records.n_duplicate) == (3, 2, 2)


@pytest.mark.parametrize("name", [name for name in FAULTS if name.endswith(("json", "jsonl"))])
@pytest.mark.parametrize("block", [1, 3])
def test_a_file_that_is_read_in_pieces_has_its_faults_at_the_same_places(
    tmp_path: Path, name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strict_json, "BLOCK", block)
    test_fault_is_refused_where_it_is(tmp_path, name)


@settings(max_examples=50)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9) | st.integers()), max_size=9),
    st.integers(1, 40),
    st.sampled_from([None, 0, 3]),
    st.integers(0, 400),
)
def test_an_array_read_in_pieces_is_that_read_at_once(
    rows: list[dict[str, str | int]], block: int, indent: int | None, cut: int
) -> None:
    """Where the text is cut off, the error names the same line and column."""

    def found(text: str) -> object:
        try:
            return list(strict_json.json_rows(io.StringIO(text), "x"))
        except UserError as error:
            return str(error)

    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    with pytest.MonkeyPatch.context() as patch:
        wholes = [found(text), found(text[:cut])]
        patch.setattr(strict_json, "BLOCK", block)
        assert [found(text), found(text[:cut])] == wholes
    assert [values for _, values in wholes[0]] == rows  # type: ignore[attr-defined]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    rows = [{"instruction": "word " * 100, "output": "\U0001f468" * 50}] * 10_000
    path = write_format(tmp_path, suffix, rows)
    tracemalloc.start()
    try:
        assert sum(1 for _ in records_of(path, "x", Columns())[1]) == 10_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 3


def test_ten_megabyte_record(tmp_path: Path) -> None:
    text = "word " * 2_000_000 + "end"
    rows = [{"instruction": "a", "input": "", "output": text}]
    limit = csv.field_size_limit()
    for suffix in (".json", ".jsonl", ".csv"):
        assert read_records(write_format(tmp_path, suffix, rows))[0].output == text
    assert csv.field_size_limit() == limit


def test_missing_pyarrow_is_named_with_the_version_that_the_project_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    (wanted,) = project["optional-dependencies"]["parquet"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=f"run: pip install '{wanted}'$"):
        read_records(write(tmp_path, "a.parquet", "PAR1"))


def test_a_parquet_column_that_appears_twice_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    columns = [pyarrow.array([text]) for text in "abc"]
    table = pyarrow.Table.from_arrays(columns, names=["instruction", "output", "output"])
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: column 'output' appears twice"):
        read_records(str(tmp_path / "a.parquet"))


def test_parquet_faults_name_the_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"instruction": ["a", None], "output": ["b", "c"]}), path)
    with pytest.raises(UserError, match=r"a\.parquet:2: 'instruction' is null"):
        read_records(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read_records(path)


def test_records_pickle_and_columns_differ(tmp_path: Path) -> None:
    records = read_records(write(tmp_path, "a.jsonl", OK))
    assert pickle.loads(pickle.dumps(records)) == records
    with pytest.raises(UserError, match="three different names"):
        Columns(instruction="text", output="text")


def numbered(count: int) -> Records:
    return Records(tuple(Record(str(i), "", "x") for i in range(count)), "numbered")


@given(st.integers(2, 60), st.integers(), st.data())
def test_split_parts_are_the_whole_in_order(total: int, seed: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, total - 1))
    train, val = split(numbered(total), val_size=size, seed=seed)
    assert len(val) == size
    assert sorted((r.instruction for r in (*train, *val)), key=int) == [str(i) for i in range(total)]
    for side in (train, val):
        assert [int(r.instruction) for r in side] == sorted(int(r.instruction) for r in side)
    again = split(numbered(total), val_size=size, seed=seed)
    assert [*map(list, again)] == [*map(list, (train, val))]


def test_split_depends_on_the_seed_and_takes_a_fraction() -> None:
    sides = {tuple(r.instruction for r in split(numbered(50), val_size=0.1, seed=s)[1]) for s in range(20)}
    assert len(sides) == 20
    assert {len(side) for side in sides} == {5}
    drawn = {name for side in sides for name in side}
    assert len(drawn) > 30


@pytest.mark.parametrize("size", [0, 10, 11, -1, 1.5, 0.01, 0.99, float("nan"), float("inf")])
def test_split_that_leaves_nothing_is_refused(size: float) -> None:
    with pytest.raises(UserError, match="val_size"):
        split(numbered(10), val_size=size, seed=0)


def test_one_record_cannot_be_split_and_the_message_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"the only record .*; add records, or set data\.val_size 0"):
        split(numbered(1), val_size=0.1, seed=0)


def test_overlap_counts_validation_records_in_training() -> None:
    train, val = numbered(5), Records((*numbered(3), *numbered(8)), "val")
    assert overlap(val, train).tolist() == [True] * 3 + [True] * 5 + [False] * 3
    assert overlap(train, val).all()


def test_real_data_is_read_whole() -> None:
    path = os.environ.get("LIT_ADAPTER_TEST_DATA")
    if not path:
        pytest.skip("LIT_ADAPTER_TEST_DATA names no JSON file of real records")
    expected = [row for row in json.loads(Path(path).read_text("utf-8")) if row["output"].strip()]
    records = read_records(path)
    assert texts(records) == expected
    lines = Path(path).read_text("utf-8").split("\n")
    assert all("{" in lines[r.line - 1] for r in records)
