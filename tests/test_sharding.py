"""A base sharded over processes: the same results, and no more of it in memory than each one's share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from convert_sources import random_llama, write_hf
from warm_runs import Run

from lit_adapter.weights.convert import convert

WIDE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
SCRIPT, DROPOUT = (Path(__file__).parent / name for name in ("sharded_process.py", "sharded_dropout.py"))


def layouts(
    base: Path, dtype: str, store: Path, several: list[tuple[int, ...]], **adapter: Any
) -> list[list[dict[str, Any]]]:
    """What each process of each layout found."""
    adapter.setdefault("layers", 2)
    arguments = [str(base), dtype, str(store), json.dumps(several), json.dumps(adapter)]
    found = zip(*printed(SCRIPT, arguments, store, max(n for n, *_ in several)), strict=True)
    return [list(of_layout[:n]) for (n, *_), of_layout in zip(several, found, strict=True)]


def printed(script: Path, arguments: list[str], store: Path, n: int) -> list[Any]:
    """What each of n processes of a script prints."""
    runs = [
        Run(
            arguments,
            store.with_suffix(f".{rank}.log"),
            {"RANK": str(rank)},
            script=script,
            errors=store.with_suffix(f".{rank}.err"),
        )
        for rank in range(n)
    ]
    try:
        assert not any(run.wait(600) for run in runs), [run.errors.read_text() for run in runs]
    finally:
        for run in runs:
            run.process.kill()
    return [json.loads(run.output) for run in runs]


def converted(folder: Path, **sizes: Any) -> tuple[Path, int, int]:
    """A random base, and how many numbers the matrices of its layers have, and those around them."""
    model = random_llama(**sizes)
    base = convert(write_hf(model, folder / "source"), folder / "base")
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    return base, layers, sum(p.numel() for p in model.parameters() if p.ndim == 2) - layers


def processes(
    base: Path, dtype: str, store: Path, n: int = 2, *layout: int, **adapter: Any
) -> list[dict[str, Any]]:
    (found,) = layouts(base, dtype, store, [(n, *(layout or (1,)))], **adapter)
    return found


@pytest.mark.parametrize(("whole", "n_gathered"), [((), 1 + 4 + 2), ((1, 3), 1 + 2 + 1)])
def test_a_sharded_base_computes_what_the_whole_one_does(
    tmp_path: Path, whole: tuple[int, ...], n_gathered: int
) -> None:
    """With tied embeddings and a vocabulary that two processes cannot share evenly; also with whole layers.

    Gathered are embeddings and output layer in one, the sharded layers, and the adapted ones of them again.
    """
    model = random_llama(tie_word_embeddings=True, intermediate_size=95, num_hidden_layers=4)
    base = convert(write_hf(model, tmp_path / "source"), tmp_path / "base")
    for found in processes(base, "float32", tmp_path / "store", 2, 1, len(whole)):
        assert {int(name.split(".")[1]) for name in found["whole_matrices"]} == {*whole}
        assert len(found["whole_matrices"]) == 7 * len(whole)
        assert found["gatherings"] == n_gathered
        assert found["same_tokens"]
        assert found["loss"] < 1e-6
        assert found["gradient"] < 1e-6


@pytest.mark.parametrize(
    ("n", "adapter", "sizes"),
    [
        (
            2,
            {"gate": "token", "prefix_query": "unrotated", "norms": True},
            {**WIDE, "attention_bias": True, "mlp_bias": True},
        ),
        pytest.param(
            *(4, {"gate": "channel", "version": "v2"}, {"tie_word_embeddings": True, "mlp_bias": True}),
            marks=pytest.mark.slow,
        ),
        pytest.param(2, {"lora": {"rank": 3}}, WIDE, marks=pytest.mark.slow),
    ],
    ids=["one-group", "two-groups", "lora"],
)
def test_two_processes_share_the_heads_of_a_row(
    tmp_path: Path, n: int, adapter: dict[str, Any], sizes: dict[str, Any]
) -> None:
    """Each has half of every matrix of a layer; with two groups of two processes, a quarter."""
    base, layers, around = converted(tmp_path, **sizes)
    for found in processes(base, "float32", tmp_path / "store", n, 2, **adapter):
        assert found["numbers"] == pytest.approx((layers / 2 + around) / (n // 2), rel=0.01)
        assert found["same_tokens"]
        assert found["loss"] < 1e-6
        assert found["gradient"] < 1e-6
        for part, tolerance in (("activations", 0.06), ("weights", 0.01)):
            if part in found:  # of one group
                held, estimated = found[part]
                assert estimated == pytest.approx(held, rel=tolerance), part


def test_processes_that_share_the_heads_drop_each_for_its_own(tmp_path: Path) -> None:
    """They learn what the whole base learns that drops the same, from one copy of the hidden states."""
    base, *_ = converted(tmp_path, **WIDE)
    for found in printed(DROPOUT, [str(base), str(tmp_path / "store")], tmp_path / "dropout", 2):
        assert found["learned"]
        assert found["apart"] == 0
        assert found["same_draws"] == 0
        assert found["loss"] < 1e-6
        assert found["gradient"] < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_up_to_eight_processes_share_a_base_and_its_heads(tmp_path: Path) -> None:
    """Also odd numbers; none divides the vocabulary, and five not the width of the MLP either."""
    layout = [(8, 1), (8, 4), (8, 8), (5, 1), (3, 1), (6, 3), (8, 1, 1), (5, 1, 3), (6, 3, 2)]
    sizes = {"hidden_size": 96, "num_attention_heads": 48, "num_key_value_heads": 24, "head_dim": 4}
    base, layers, around = converted(tmp_path, **sizes, intermediate_size=72, num_hidden_layers=3)
    found = layouts(base, "float32", tmp_path / "store", layout, gate="token", norms=True)
    for (n, tensor_parallel, *whole), ranks in zip(layout, found, strict=True):
        assert len(ranks) == n
        of_whole = layers * sum(whole) / 3
        held = ((layers - of_whole) / tensor_parallel + around) * tensor_parallel / n
        held += of_whole / tensor_parallel
        assert sum(rank["numbers"] for rank in ranks) == pytest.approx(n * held, rel=1e-6)
        for rank in ranks:
            assert rank["same_tokens"], (n, tensor_parallel)
            assert rank["loss"] < 1e-6, (n, tensor_parallel)
            assert rank["gradient"] < 1e-6, (n, tensor_parallel)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_no_process_ever_holds_the_whole_base(tmp_path: Path, tensor_parallel: int) -> None:
    """Cast to bf16, so that nothing stays memory-mapped: half of it, and a layer or two at work."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10}
    model = random_llama(**sizes, num_attention_heads=8, num_key_value_heads=8)
    base = convert(write_hf(model, tmp_path / "source"), tmp_path / "base")
    size = sum(parameter.numel() for parameter in model.parameters()) * 2
    for found in processes(base, "bfloat16", tmp_path / "store", 2, tensor_parallel):
        assert 0.45 * size < found["held"] < 0.55 * size
        assert found["peak"] < 0.6 * size
        if tensor_parallel == 1:
            assert 1 <= found["whole_layers"] <= 2
            assert found["whole_matrices"] == []
        assert found["same_tokens"]
        assert found["gradient"] < 5e-3  # as bf16 rounds
