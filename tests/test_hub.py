"""Hub data sets: names, the choice of files, and a download from a stand-in server."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from lit_adapter.data import hub
from lit_adapter.data.hub import Listing, choose_files, files_of_card, hub_files, is_hub_name
from lit_adapter.errors import UserError

OK = '{"instruction":"a","output":"b"}'
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"train.jsonl": f"{OK}\n{OK}\n".encode(), "test.jsonl": b'{"instruction":"a"}\n', "README.md": b"x"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("yahma/alpaca-cleaned", True),
        ("org/name:train", True),
        ("org/name:data/a.json", True),
        ("data/train.json", False),
        ("./org/name", False),
        ("a/b/c", False),
        ("name", False),
        ("https://x/y", False),
    ],
)
def test_is_hub_name(source: str, expected: bool) -> None:
    assert is_hub_name(source) is expected


def test_a_local_path_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("org/name")


def test_choose_files_of_a_repository() -> None:
    shards = [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]
    tests = ["data/test-00000-of-00001.parquet"]
    about = ["README.md", "dataset_infos.json", ".hidden/x.json"]
    assert choose_files([*about, "alpaca.json"], None, "o/n") == ["alpaca.json"]
    assert choose_files([*shards[::-1], *tests, *about], None, "o/n") == shards
    assert choose_files([*shards, *tests], "test", "o/n") == tests
    for files, part, message in [
        (about, None, "has no .json"),
        (["a.json", "b.json"], None, r"2 data files; name one as o/n:FILE: a.json, b.json"),
        (["train.json", "train.parquet"], None, "name one as"),
        (["train.json"], "test", "no data file of split 'test'"),
        (shards[:1], None, "1 of 2 shards"),
    ]:
        with pytest.raises(UserError, match=message):
            choose_files(files, part, "o/n")


def test_files_of_a_subset_are_those_of_its_card() -> None:
    files = ["a/train.jsonl", "a/test.jsonl", "b/part-1.parquet", "b/part-2.parquet", "README.md"]
    configs = [
        {"config_name": "a", "data_files": [{"split": s, "path": f"a/{s}.jsonl"} for s in ("train", "test")]},
        {"config_name": "b", "data_files": "b/*.parquet"},
    ]
    about = Listing(files, None, configs)
    assert files_of_card(about, "a", "o/n") == ["a/train.jsonl"]
    assert files_of_card(about, "a:test", "o/n") == ["a/test.jsonl"]
    assert files_of_card(about, "b:train", "o/n") == files[2:4]
    assert files_of_card(Listing(files, None), "a", "o/n") == []
    one = Listing(files, None, configs[:1])
    assert files_of_card(one, None, "o/n") == ["a/train.jsonl"]
    assert files_of_card(one, "test", "o/n") == ["a/test.jsonl"]
    with pytest.raises(UserError, match=r"o/n: name a subset as o/n:SUBSET: a, b"):
        files_of_card(about, None, "o/n")
    with pytest.raises(UserError, match=r"o/n: no data file of split 'dev' in subset 'a'; name one as"):
        files_of_card(about, "a:dev", "o/n")


def test_what_the_disk_cannot_take_is_refused_and_many_files_can_be_streamed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = [f"data/train-{n:05}-of-00012.parquet" for n in range(12)]
    about, said = Listing(files, COMMIT, None, dict.fromkeys(files, 1000)), []
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "free_disk", lambda folder: 12_000)
    hub._check_room("o/n", files, about, said.append)
    hub._check_room("o/n", files[:3], about, said.append)
    assert said == [
        "downloading 12 files of o/n, 12,000 bytes; data.stream true would read them without keeping them"
    ]
    monkeypatch.setattr(hub, "free_disk", lambda folder: 11_999)
    with pytest.raises(
        UserError,
        match=r"o/n: 12 files of 12,000 bytes to download, but 11,999 are free in .*; data\.stream true",
    ):
        hub._check_room("o/n", files, about, said.append)


def test_without_a_card_a_subset_is_in_the_names_of_files() -> None:
    files = [
        f"{subset}/{split}-00000-of-00001.parquet" for subset in ("one", "two") for split in ("train", "test")
    ]
    assert choose_files(files, "two:test", "o/n") == [files[3]]
    with pytest.raises(UserError, match="no data file of subset 'three'"):
        choose_files(files, "three:train", "o/n")


class Hub(BaseHTTPRequestHandler):
    """Just enough of the Hub: one data set at one commit."""

    def do_GET(self) -> None:
        head, _, file = self.path.replace("/resolve/main/", f"/resolve/{COMMIT}/").partition(
            f"/resolve/{COMMIT}/"
        )
        if self.path.startswith(f"/api/datasets/org/name/tree/{COMMIT}"):
            tree = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in FILES.items()]
            self.answer(200, json.dumps(tree).encode())
        elif self.path.startswith("/api/datasets/org/name"):
            siblings = [{"rfilename": name} for name in FILES]
            self.answer(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        elif head == "/datasets/org/name" and file in FILES:
            self.answer(200, FILES[file])
        else:
            self.answer(404, b"", "EntryNotFound" if "org/name" in self.path else "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815 the base class names it

    def answer(self, status: int, body: bytes, error: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


READ = """
import sys
from lit_adapter.config import Columns
from lit_adapter.data.sources import load_records
from lit_adapter.errors import UserError
for name in sys.argv[1:]:
    try:
        records = load_records(name, Columns(), cache=None)
        print(len(records), records.source, records[0].origin)
    except UserError as error:
        print("error:", error)
"""


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


STREAM = """
import sys
from lit_adapter.config import Columns
from lit_adapter.data.sources import sources_of
from lit_adapter.data.streaming import Place, Stream
files = sources_of(sys.argv[1], stream=True)
print(files[0].address)
place, buffer = next(Stream(files, Columns(), 0).buffers(Place()))
print(*(record.origin for record in buffer), buffer[0].texts)
"""


def read_in_process(folder: Path, endpoint: str, *names: str, code: str = READ, **more: str) -> list[str]:
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder), "NO_PROXY": "*", "no_proxy": "*"}
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        env={**os.environ, **own, **more},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout.splitlines()


def test_read_hub_from_a_stand_in(tmp_path: Path, endpoint: str) -> None:
    names = ["org/name", "org/name:train", "org/name:test", "org/name:dev", "org/name:x.json", "org/other"]
    whole, train, test, dev, missing, other = read_in_process(tmp_path, endpoint, *names)
    assert whole == train == "2 org/name:train.jsonl org/name:train.jsonl:1"
    assert test.startswith("error: org/name:test.jsonl:1: key 'output' is missing")
    assert dev.startswith("error: org/name: no data file of split 'dev'")
    assert missing.startswith("error: org/name:x.json: no such file on the Hub")
    assert other.startswith("error: org/other: not found on the Hub, and not a local file; check")


def test_a_stream_reads_one_commit_and_keeps_nothing(tmp_path: Path, endpoint: str) -> None:
    address, records = read_in_process(tmp_path, endpoint, "org/name:train", code=STREAM)
    assert address == f"hf://datasets/org/name@{COMMIT}/train.jsonl"
    assert sorted(records.split()[:2]) == ["org/name:train.jsonl:1", "org/name:train.jsonl:2"]
    assert records.endswith("('a', '', 'b')")
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and OK in path.read_text("utf-8", "replace")
    ]


def test_a_downloaded_file_is_read_without_a_network(tmp_path: Path, endpoint: str) -> None:
    first = read_in_process(tmp_path, endpoint, "org/name:train.jsonl")
    assert first == ["2 org/name:train.jsonl org/name:train.jsonl:1"]
    names = ["org/name:train.jsonl", "org/name:test.jsonl", "org/name"]
    again, absent, listed = read_in_process(tmp_path, endpoint, *names, HF_HUB_OFFLINE="1")
    assert [again] == first
    assert absent.startswith("error: org/name:test.jsonl: not downloaded yet")
    assert listed.startswith("error: org/name: the Hub cannot be reached")


def test_an_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    (line,) = read_in_process(tmp_path, "http://127.0.0.1:9", "org/name")
    assert line.startswith("error: org/name: the Hub cannot be reached")


def test_read_hub_refuses_what_is_no_name() -> None:
    with pytest.raises(UserError, match="is not a Hub data set"):
        hub_files("../x")
