"""A base cut over two processes: the same numbers, and never more than its share in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from convert_sources import random_llama, write_hf

from lit_adapter.weights.convert import convert

SCRIPT = Path(__file__).parent / "sharded_process.py"


def two_processes(base: Path, dtype: str, store: Path) -> list[dict[str, Any]]:
    started = []
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, str(SCRIPT), str(base), dtype, str(store)]
        started.append(
            subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    try:
        outputs = [process.communicate(timeout=250) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], outputs
    return [json.loads(output) for output, _ in outputs]


def test_a_cut_base_computes_as_the_whole_one(tmp_path: Path) -> None:
    """With tied embeddings, of a vocabulary that two processes cannot share evenly."""
    model = random_llama(tie_word_embeddings=True, intermediate_size=95)
    base = convert(write_hf(model, tmp_path / "source"), tmp_path / "base")
    for found in two_processes(base, "float32", tmp_path / "store"):
        assert found["whole_matrices"] == []
        assert found["same_tokens"]
        assert found["loss"] < 1e-5
        assert found["gradient"] < 1e-6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
def test_no_process_ever_holds_the_whole_base(tmp_path: Path) -> None:
    """Cast to bf16, so that nothing stays in the memory map: a half, and a layer or two while computing."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10}
    model = random_llama(**sizes, num_attention_heads=8, num_key_value_heads=8)
    base = convert(write_hf(model, tmp_path / "source"), tmp_path / "base")
    size = sum(parameter.numel() for parameter in model.parameters()) * 2
    for found in two_processes(base, "bfloat16", tmp_path / "store"):
        assert 0.45 * size < found["held"] < 0.55 * size
        assert found["peak"] < 0.6 * size
        assert 1 <= found["whole_layers"] <= 2
        assert found["whole_matrices"] == []
        assert found["same_tokens"]
        assert found["gradient"] < 1e-3
