"""Clients that come, go, cancel, send rubbish and load adapters, for as long as one likes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving_fixtures import NAMES, folder_of_adapters

import lit_adapter

ROOT = Path(__file__).parents[1]
SECONDS = float(os.environ.get("LIT_ADAPTER_SOAK_SECONDS", "25"))
ADMIN = "key-of-an-admin-0123456789"
PROMPTS = ("Say it back.", "red river " * 6, "a stone", "seven clouds and a lamp " * 3)
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.1, "seed": 5},
    {"temperature": 0.8, "top_p": 0.9, "seed": 6},
    {"temperature": 0, "presence_penalty": 1.0},
]
RUBBISH: list[bytes] = [b"", b"{", b"[]", b'{"model": 1}', b"\xff" * 100, b'{"model":"x","messages":[]}']


@contextmanager
def served(base: Path, folder: Path, keys: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "scripts/serve.py", "--base", str(base), "--adapters", str(folder)]
    command += ["--port", "0", "--slots", "6", "--context", "250", "--device", "cpu", "--dtype", "float32"]
    command += ["--api-keys", str(keys)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = (keys.parent / "log.txt").open("w")
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
    ) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+/", process.stdout.readline())
        assert found
        try:
            yield process, found[0]
        finally:
            process.terminate()
            process.wait(250)
            log.close()


Wanted = dict[tuple[str, int, int], str]
"""Answers by model, prompt and setting."""


class Soak:
    """What the clients do, and what went wrong."""

    def __init__(
        self, client: httpx2.AsyncClient, wanted: dict[tuple[str, int, int], str], end: float
    ) -> None:
        self.client, self.wanted, self.end = client, wanted, end
        self.wrong: list[str] = []
        self.done = dict.fromkeys(("answers", "streams", "cancelled", "rubbish", "loads"), 0)
        self.random = random.Random(1)

    def body(self, case: tuple[str, int, int], **more: Any) -> dict[str, Any]:
        name, prompt, setting = case
        messages = [{"role": "user", "content": PROMPTS[prompt]}]
        return {"model": name, "messages": messages, "max_tokens": 24, **SETTINGS[setting], **more}

    async def check(self, case: tuple[str, int, int], status: int, text: str) -> None:
        if status == 429:  # the answer of a full server
            await asyncio.sleep(0.1)
        elif status != 200 or text != self.wanted[case]:
            self.wrong.append(f"{case}: {status} {text!r}")

    async def one(self) -> None:
        case = self.random.choice(list(self.wanted))
        kind = self.random.random()
        if kind < 0.4:
            reply = await self.client.post("v1/chat/completions", json=self.body(case))
            text = reply.json()["choices"][0]["message"]["content"] if reply.status_code == 200 else ""
            await self.check(case, reply.status_code, text)
            self.done["answers"] += 1
        elif kind < 0.9:
            await self.stream(case, leaves=kind > 0.65)
        elif kind < 0.95:
            content = self.random.choice(RUBBISH)
            headers = {"Content-Type": "application/json"}
            reply = await self.client.post("v1/chat/completions", content=content, headers=headers)
            if not 400 <= reply.status_code < 500:
                self.wrong.append(f"rubbish: {reply.status_code}")
            self.done["rubbish"] += 1
        else:
            reply = await self.client.post("v1/adapters", json={"name": self.random.choice(NAMES)})
            if reply.status_code != 201:
                self.wrong.append(f"load: {reply.status_code} {reply.text}")
            self.done["loads"] += 1

    async def stream(self, case: tuple[str, int, int], *, leaves: bool) -> None:
        text, limit = "", self.random.randrange(1, 8)
        body = self.body(case, stream=True)
        async with self.client.stream("POST", "v1/chat/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {") and reply.status_code == 200:
                    choice = json.loads(line[6:])["choices"][0]
                    text += choice["delta"].get("content") or ""
                    limit -= 1
                    if leaves and limit <= 0:
                        self.done["cancelled"] += 1
                        return
        await self.check(case, reply.status_code, text)
        self.done["streams"] += 1

    async def run(self) -> None:
        while time.monotonic() < self.end or not all(self.done.values()):
            await self.one()


async def gauges(client: httpx2.AsyncClient) -> dict[str, float]:
    lines = (await client.get("metrics")).text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


async def soak(url: str, wanted: Wanted) -> tuple[Soak, list[float]]:
    memory: list[float] = []
    headers = {"Authorization": f"Bearer {ADMIN}"}
    async with httpx2.AsyncClient(base_url=url, timeout=300, headers=headers) as client:
        found = Soak(client, wanted, time.monotonic() + SECONDS)

        async def watch() -> None:
            while time.monotonic() < found.end:
                await asyncio.sleep(SECONDS / 20)
                memory.append((await gauges(client))["process_resident_memory_bytes"])

        await asyncio.gather(watch(), *(found.run() for _ in range(14)))
        end = time.monotonic() + 60
        while (after := await gauges(client))["lit_adapter_slots_used"] + after["lit_adapter_queue_length"]:
            assert time.monotonic() < end, after
            await asyncio.sleep(0.1)
    return found, memory


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 280)
def test_nothing_is_wrong_lost_or_grows(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    paths = folder_of_adapters(tiny_base, folder)
    keys = tmp_path / "keys"
    keys.write_text(f"admin {ADMIN}\n")
    base = lit_adapter.load(base=tiny_base, device="cpu", dtype="float32")
    models = {"tiny": base} | {name: base.with_adapter(path) for name, path in paths.items()}
    wanted = {
        (name, prompt, setting): model.generate(text, max_new_tokens=24, **how)
        for name, model in models.items()
        for prompt, text in enumerate(PROMPTS)
        for setting, how in enumerate(SETTINGS)
    }
    with served(tiny_base, folder, keys) as (process, url):
        found, memory = asyncio.run(soak(url, wanted))
        assert process.poll() is None
    assert process.returncode == 0
    first, last = (sum(part) / len(part) for part in (memory[5:10], memory[-5:]))
    print(found.done, f"memory {first / 2**20:.1f} to {last / 2**20:.1f} MB ({last / first - 1:+.1%})")
    assert not found.wrong, found.wrong[:5]
    assert min(found.done.values()) > 0
    assert last <= 1.03 * first
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
    shutil.rmtree(folder)
