"""Requests of all kinds, made from the server's own OpenAPI page: none may make it fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving_fixtures import folder_of_adapters, running

N_CASES = int(os.environ.get("LIT_ADAPTER_CASES", "60"))
"""Of each address."""


@pytest.mark.slow
def test_no_request_makes_the_server_fail(tiny_base: Path, tmp_path: Path) -> None:
    """A status of 500 or more, or an answer that is no error object, fails this test."""
    with running(base=tiny_base, adapters=folder_of_adapters(tiny_base, tmp_path)) as server:
        page = server.ask("openapi.json")[1]
        for name in ("ChatRequest", "CompletionRequest"):  # most of them get behind the first check
            page["components"]["schemas"][name]["properties"]["model"]["enum"] = ["tiny", "alpha", "beta"]
        (tmp_path / "page.json").write_text(json.dumps(page))
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(tmp_path / "page.json")]
        command += ["--url", server.url, "--checks", "not_a_server_error,response_schema_conformance"]
        command += ["--max-examples", str(N_CASES), "--phases", "examples,coverage,fuzzing"]
        command += ["--generation-database", "none", "--seed", "1", "--no-color", "--request-timeout", "60"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=3000
        )
        print(done.stdout[-1500:])
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert server.ask("health")[0] == 200
        assert server.counter("lit_adapter_slots_used") == 0
        assert server.counter("lit_adapter_queue_length") == 0
        assert "Traceback" not in server.log.getvalue()
