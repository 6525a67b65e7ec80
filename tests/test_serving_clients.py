"""Other clients than OpenAI's: a test suite of its interface, lm-eval, and curl."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from serving_fixtures import Running, folder_of_adapters, running

import lit_adapter


@pytest.fixture(scope="module")
def paths(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folder_of_adapters(tiny_base, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(tiny_base: Path, paths: dict[str, Path]) -> Iterator[Running]:
    with running(base=tiny_base, adapters=paths, context=900) as found:
        yield found


@pytest.mark.slow
def test_llm_complys_cases_pass_but_for_what_is_not_offered(server: Running, tmp_path: Path) -> None:
    main = "import sys; from llm_comply.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", main, "run", "-u", server.v1, "-m", "alpha", "--json"]
    command += ["--format", "openai-chat", "-k", "none"]
    command += ["-i", "expected 'stop', got 'length'"]  # a random model does not end by itself
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=250)
    results = json.loads(done.stdout)["results"]
    failed = {result["id"]: result["errors"] for result in results if result["status"] != "passed"}
    assert set(failed) <= {"chat-tool-calling", "chat-image-input", "chat-reasoning-summary"}, failed
    assert len(results) >= 9


@pytest.mark.slow
def test_lm_evals_local_completions_gives_the_models_own_numbers(
    server: Running, tiny_base: Path, paths: dict[str, Path]
) -> None:
    api = pytest.importorskip("lm_eval.models.openai_completions")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance

    client = api.LocalCompletionsAPI(
        model="alpha",
        base_url=server.v1 + "/completions",
        tokenizer=str(tiny_base),
        tokenizer_backend="huggingface",
        max_length=200,
        num_concurrent=1,
    )
    pairs = [
        ("red green", " blue"),
        ("Say it back.", " stone cloud"),
        ("a", "b"),
        ("seven lamp river", " seven"),
    ]
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    found = client.loglikelihood(asked, disable_tqdm=True)
    model = lit_adapter.load(paths["alpha"], tiny_base, device="cpu", dtype="float32")
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        start, rest = client._encode_pair(context, continuation)
        ids = start + rest
        rows = model.logits(torch.tensor([ids]))[0].double().log_softmax(-1)[len(start) - 1 : -1]
        assert value == pytest.approx(float(rows.gather(1, torch.tensor(rest)[:, None]).sum()), abs=1e-3)
        assert is_greedy == (rows.argmax(-1).tolist() == rest)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_curl_streams_an_answer(server: Running) -> None:
    body = '{"model":"beta","stream":true,"max_tokens":4,"messages":[{"role":"user","content":"x"}]}'
    command = [
        "curl",
        "-sN",
        server.v1 + "/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=250)
    assert done.stdout.startswith("data: {")
    assert done.stdout.endswith("data: [DONE]\n\n")
