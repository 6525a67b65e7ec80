"""The container's file and the proxy for several servers say what the server does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from generation_fixtures import ROOT
from serving_fixtures import folder_of_adapters, running
from test_serving import SAY, until

from lit_adapter.cli import serve as command

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
KEY = "key-of-a-client-0123456789"


def instruction(name: str) -> list[str]:
    """The arguments of a line of the Dockerfile, which are JSON."""
    (found,) = re.findall(rf"^{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)
    words: list[str] = json.loads(found)
    return words


def servers() -> dict[str, Any]:
    return {name: service for name, service in COMPOSE["services"].items() if name != "proxy"}


@pytest.mark.parametrize("name", list(servers()))
def test_a_container_is_given_a_command_that_the_server_takes(name: str, tmp_path: Path) -> None:
    given = [word.replace("${BASE:?the name of a base}", "NAME") for word in servers()[name]["command"]]
    entry = instruction("ENTRYPOINT")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert (entry[0] in scripts, entry[1]) == (True, "serve")
    options = command._options(command._parse([*entry[2:], *given], None))
    options.check()  # with keys, so that other machines may ask
    assert options.grace < int(servers()[name]["stop_grace_period"].removesuffix("s"))
    mounted = [volume.split(":")[1] for volume in servers()[name]["volumes"]]
    assert mounted == ["/checkpoints", "/adapters", "/keys.txt"]
    assert [str(options.base), str(options.folder), str(options.api_keys)] == [
        "/checkpoints/NAME",
        *mounted[1:],
    ]
    assert int(instruction_line("EXPOSE")) == options.port


def instruction_line(name: str) -> str:
    (found,) = re.findall(rf"^{name} (.*)$", DOCKERFILE, re.MULTILINE)
    return str(found)


def test_the_image_has_the_package_and_nothing_of_a_users() -> None:
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [
        word for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]
    ]
    assert kept[0] == "*"
    assert {f"!{name}" for name in copied} <= set(kept)
    assert all((ROOT / name).exists() for name in copied)
    assert instruction_line("USER") not in ("root", "0")


def test_the_health_check_tells_a_server_that_answers(tiny_base: Path) -> None:
    check = instruction("    CMD")
    with running(base=tiny_base) as server:
        script = check[2].replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        assert script != check[2]
        assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode != 0


def test_the_proxy_knows_the_servers() -> None:
    named = re.findall(r"server (\w+):(\d+) ", (DEPLOY / "nginx.conf").read_text())
    assert named == [(name, instruction_line("EXPOSE")) for name in servers()]


@pytest.mark.slow
def test_two_processes_answer_behind_one_port(tiny_base: Path, tmp_path: Path) -> None:
    """As docs/serving.md starts them; while one of them stops, the other one answers."""
    if shutil.which("nginx") is None:
        pytest.skip("needs nginx")
    folder_of_adapters(tiny_base, tmp_path)
    (tmp_path / "keys").write_text(KEY + "\n")
    logs, ready = [tmp_path / f"log-{n}" for n in (0, 1)], [tmp_path / f"ready-{n}" for n in (0, 1)]
    processes = [start(tiny_base, tmp_path, *files) for files in zip(logs, ready, strict=True)]
    proxy = None
    try:
        until(lambda: all(file.exists() for file in ready), seconds=250)
        until(lambda: all(" at " in log.read_text() for log in logs))
        ports = [re.findall(r" at http://127.0.0.1:(\d+)/", log.read_text())[0] for log in logs]
        config, port = (DEPLOY / "nginx.conf").read_text(), free_port()
        for name, own in zip(servers(), ports, strict=True):
            config = config.replace(f"{name}:8000", f"127.0.0.1:{own}")
        config = config.replace("listen 8000", f"listen 127.0.0.1:{port}")
        head = f"pid {tmp_path}/pid; error_log {tmp_path}/errors; daemon off;\n"
        paths = "".join(
            f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi")
        )
        paths += f"uwsgi_temp_path {tmp_path}/uwsgi; scgi_temp_path {tmp_path}/scgi; access_log off;"
        (tmp_path / "nginx.conf").write_text(head + config.replace("http {", "http {" + paths))
        proxy = subprocess.Popen(["nginx", "-e", f"{tmp_path}/errors", "-c", f"{tmp_path}/nginx.conf"])
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=250
        )
        until(lambda: answers(client), seconds=60)
        texts = {answer(client) for _ in range(8)}
        assert len(texts) == 1
        assert all("chat/completions" in log.read_text() for log in logs)
        processes[0].send_signal(signal.SIGTERM)
        assert {answer(client) for _ in range(8)} == texts
        assert processes[0].wait(250) == 0
        assert not ready[0].exists()
        assert {answer(client) for _ in range(4)} == texts
    finally:
        for process in processes if proxy is None else [proxy, *processes]:
            process.terminate()
            process.wait(250)


def start(base: Path, folder: Path, log: Path, ready: Path) -> subprocess.Popen[bytes]:
    words = ["--base", base, "--adapters", folder, "--api-keys", folder / "keys", "--port", 0]
    words += ["--ready-file", ready, "--device", "cpu", "--dtype", "float32"]
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "scripts/serve.py", *map(str, words)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=out,
        )


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def answers(client: openai.OpenAI) -> bool:
    try:
        return bool(client.models.list().data)
    except openai.OpenAIError:
        return False


def answer(client: openai.OpenAI) -> str:
    """A streamed answer, whole."""
    given: Any = {"model": "alpha", "messages": SAY, "max_tokens": 8, "temperature": 0, "stream": True}
    return "".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**given))
