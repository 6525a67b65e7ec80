"""Processes that share the heads of a row compute it with the fused executor, in Triton's interpreter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from convert_sources import VOCAB, write_hf
from finetune_runs import launch
from tiny_models import randomise

from lit_adapter.weights.convert import convert

SCRIPT = Path(__file__).parent / "fused_heads_process.py"
SIZES = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 4}
SIZES |= {"intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB}
LLAMA = {"attention_bias": True, "mlp_bias": True}
QWEN3 = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
TANH = {"gate": "tanh", "prefix_query": "unrotated", "norms": False}
DEFAULT: dict[str, Any] = {"prompt_length": 3, "layers": 1}


def converted(kind: str, folder: Path) -> Path:
    options = {"llama": LLAMA, "qwen3": QWEN3}[kind]
    config = transformers.AutoConfig.for_model(kind, **SIZES, **options, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    randomise(model, 1)
    return convert(write_hf(model, folder / "source"), folder / "base")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "n", "shared", "adapters"),
    [
        ("llama", 2, 2, [DEFAULT, {"prompt_length": 3, "version": "v2"}]),
        ("qwen3", 2, 2, [{"prompt_length": 5, "lora": {"rank": 3, "on": ["all"]}}]),
        ("llama", 4, 2, [{"prompt_length": 5, **TANH, "lora": {"rank": 3, "on": ["attention"]}}]),
        ("llama", 4, 4, [{"prompt_length": 4, "gate": "layer", "norms": True}]),
    ],
    ids=["two", "norms-of-heads", "two-groups", "four"],
)
def test_fused_blocks_with_shared_heads_learn_what_the_whole_base_learns(
    tmp_path: Path, kind: str, n: int, shared: int, adapters: list[dict[str, Any]]
) -> None:
    """All processes of a run have the same gradients, to the bit; one group of two has a row without tokens.

    A layer takes two sums over the group forward and two backward, of which a layer that learns nothing has
    only the former; recomputed, it takes that of attention's output again.
    """
    pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA")
    base, store = converted(kind, tmp_path), tmp_path / "store"
    command = [sys.executable, str(SCRIPT), str(base), str(store), str(n), str(shared), json.dumps(adapters)]
    logs = [tmp_path / f"{rank}.log" for rank in range(n)]
    # Not forked: Triton reads the variable when it is imported.
    runs = [
        launch(command, {"RANK": str(rank), "TRITON_INTERPRET": "1"}, log) for rank, log in enumerate(logs)
    ]
    try:
        assert not any(run.wait(600) for run in runs), [log.read_text() for log in logs]
    finally:
        for run in runs:
            run.kill()
    for log in logs:
        cases = json.loads(next(line for line in log.read_text().splitlines() if line.startswith("[{")))
        assert len(cases) == 3 * len(adapters)
        for case in cases:
            assert case["executors"] == ["fused", "modules"]
            assert case["loss"] < 1e-6, case
            assert case["gradient"] < 1e-5, case
            assert case["alike"]
            learning = case["adapter"].get("layers", 2)
            assert case["sums"] == 2 * 2 + (3 if case["recompute"] else 2) * learning
