"""scripts/benchmark.py on a tiny model: what it writes, and that its methods compute the same thing."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import benchmark
import measure_learning
import measure_peers
import measure_scaling
import measure_size
import torch
from benchmarks import courses, frontier
from benchmarks.arithmetic import Work, step_operations
from benchmarks.run import prompt_ids
from benchmarks.workload import alpaca_like
from hypothesis import given
from hypothesis import strategies as st
from paper import paper
from tiny_models import open_adapter, random_ids, random_llama
from torch.utils.flop_counter import FlopCounterMode

import lit_adapter
from lit_adapter.data.records import read_records
from lit_adapter.errors import UserError
from lit_adapter.model.attention import CausalView
from lit_adapter.model.loss import target_loss

TRAIN = ("--batch", "6", "--steps", "2", "--repeats", "2", "--row-tokens", "700", "--peft-batch", "2", "3")
DECODE = ("--batches", "1", "3", "--new-tokens", "5", "--prompt-tokens", "9", "--repeats", "2")


def rows_of(work: str, base: Path, folder: Path, *options: str) -> dict[str, dict[str, Any]]:
    out = folder / "rows.json"
    fixed = ["--model", str(base), "--json", str(out), "--base-precision", "float32", "--device", "cpu"]
    status = benchmark.main([work, *fixed, "--markdown", str(folder / "rows.md"), *options])
    assert status == 0
    rows = json.loads(out.read_text())
    table = (folder / "rows.md").read_text()
    assert all("error" not in row for row in rows), [row.get("error") for row in rows]
    # A rate after the first token is a difference of two times, which noise may turn on a tiny model.
    rates = [row.get("call_tokens_per_s") or row["useful_tokens_per_s"] for row in rows]
    assert all(f"| {row['name']} |" in table for row in rows)
    assert min(rates) > 0
    assert all(row["machine"]["matmul_flops_per_s"] > 0 for row in rows)
    return {row["name"]: row for row in rows}


@pytest.mark.slow
def test_all_methods_train_the_same_model_on_the_same_records(tiny_base: Path, tmp_path: Path) -> None:
    rows = rows_of("train", tiny_base, tmp_path, *TRAIN)
    assert {name.split(",")[0] for name in rows} == {"ours", "PEFT AdaptionPrompt", "PEFT LoRA"}
    before = [row["loss_before"] for row in rows.values()]
    assert before == pytest.approx([before[0]] * len(rows), rel=1e-5)
    packed, padded = rows["ours, rows of 700"], rows["ours, padded, no saving"]
    assert padded["losses"] == pytest.approx(packed["losses"], rel=1e-4)
    assert padded["loss_after"] == pytest.approx(packed["loss_after"], rel=1e-4)
    assert len(packed["losses"]) == 4
    for row in rows.values():
        assert row["loss_after"] != row["loss_before"]
        assert row["compilations_while_timed"] == 0
    # Half of them with micro-batches of two records, less with three: whichever was faster.
    assert packed["operations_per_record"] < 0.6 * padded["operations_per_record"]


@pytest.mark.slow
def test_real_records_are_read(tiny_base: Path, tiny_records: Path, tmp_path: Path) -> None:
    options = (*TRAIN, "--data", str(tiny_records), "--methods", "ours-700")
    (row,) = rows_of("train", tiny_base, tmp_path, *options).values()
    assert row["machine"]["workload"]["records"] == 48


@pytest.mark.slow
def test_decoding_is_compared(tiny_base: Path, tmp_path: Path) -> None:
    rows = rows_of("generate", tiny_base, tmp_path, *DECODE)
    assert len(rows) == 2 * 4 + 2
    assert {row["batch"] for row in rows.values() if "batch" in row} == {1, 3}


@pytest.mark.slow
def test_prompts_are_the_texts_of_a_file(tiny_base: Path, tiny_records: Path, tmp_path: Path) -> None:
    rows = rows_of("generate", tiny_base, tmp_path, *DECODE, "--data", str(tiny_records), "--methods", "ours")
    assert all(row["useful_tokens_per_s"] for row in rows.values())
    options = argparse.Namespace(data=str(tiny_records), tokenizer=None, model=str(tiny_base))
    model = lit_adapter.load(base=tiny_base)
    ids = prompt_ids(options, model.model.config.vocab_size, 3, 200)
    assert ids.shape == (3, 200)
    record = read_records(tiny_records)[0]
    wanted, _ = model.template.encode_example(
        model.tokenizer, record.instruction, record.input, record.output
    )
    assert ids.flatten()[: len(wanted)].tolist() == wanted


@pytest.mark.slow
def test_a_method_that_fails_has_a_row_that_says_so(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr("benchmarks.rivals.adapted", fail)
    out = tmp_path / "rows.json"
    methods = ("--methods", "ours-700", "lora")
    options = ["train", "--model", str(tiny_base), "--json", str(out), *TRAIN, *methods]
    assert benchmark.main([*options, "--base-precision", "float32"]) == 0
    ours, lora = json.loads(out.read_text())
    assert ours["useful_tokens_per_s"] > 0
    assert (lora["useful_tokens_per_s"], lora["error"]) == (None, "RuntimeError: no such kernel")


def test_built_in_lengths_are_like_alpacas() -> None:
    data = alpaca_like(20_000, 32_000, seed=0)
    assert 100 < data.length.mean() < 106
    assert 34 < (data.length - data.n_prompt).mean() < 38
    assert data.length.max() <= 512


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_counted_operations_are_those_that_torch_does(layers: int) -> None:
    """Attention's own products (`pairs`) aside: torch has no fixed count for its fused kernels."""
    model = open_adapter(random_llama(dtype=torch.float32), paper(prompt_length=5, layers=layers))
    ids, rows = random_ids(1, 40), torch.arange(3, 40, 4)
    view = CausalView(model.rotation(torch.arange(40)[None]))
    with FlopCounterMode(display=False) as counter:
        hidden = model(ids, view, rows)[0]
        target_loss(hidden, model.lm_head.weight, random_ids(len(rows))).backward()
    products = {"mm", "addmm", "bmm"}
    done = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if op.__name__.split(".")[0] in products
    )
    work = Work(tokens=40, pairs=0, last_tokens=len(rows), last_pairs=0)
    assert step_operations(model.config, work, layers, prompt_length=5) == pytest.approx(done, rel=0.02)


@pytest.mark.slow
def test_adapters_are_compared_from_one_untrained_loss(
    tiny_base: Path, tiny_records: Path, tmp_path: Path
) -> None:
    out = tmp_path / "learning.json"
    given = ["--data", tiny_records, "--base", tiny_base, "--held-out", 8, "--batch", 8, "--max-steps", 1]
    options = [*given, "--subset", "quick", "--device", "cpu", "--json", out]
    assert measure_peers.main([*map(str, options)]) == 0
    found = json.loads(out.read_text())
    starts = [start["held_out_loss"] for start in found["starts"]]
    assert len(starts) == 3
    assert max(starts) - min(starts) < 1e-4
    assert all(row["held_out_loss"] != pytest.approx(starts[0], abs=1e-6) for row in found["rows"])


def result(power: int, seed: int, loss: float) -> frontier.Result:
    return frontier.Result("text", "a line", ("--x=1",), power, seed, 100, loss, None, 1.0)


@given(best=st.integers(-4, 4), noise=st.lists(st.floats(0, 0.2), min_size=20, max_size=20))
def test_the_search_of_a_frontier_ends_within_its_rates(best: int, noise: list[float]) -> None:
    """On a valley with its floor anywhere near the grid: no run twice, the best inside, three seeds there."""
    done: list[frontier.Result] = []
    while runs := frontier.next_runs(done):
        done += [result(power, seed, abs(power - best) + noise[power] * 0.5) for power, seed in runs]
    assert len({(r.power, r.seed) for r in done}) == len(done)
    searched = [r.power for r in done if r.seed == frontier.SEEDS[0]]
    assert min(searched) < best < max(searched)
    assert {r.seed for r in done if r.power == best} == set(frontier.SEEDS)
    assert len(done) == len(searched) + 2


def test_a_search_whose_loss_falls_for_ever_ends_too() -> None:
    done: list[frontier.Result] = []
    while runs := frontier.next_runs(done):
        done += [result(power, seed, -float(power)) for power, seed in runs]
    assert len(done) == frontier.MOST_RATES + 2


def test_runs_that_do_not_depend_on_each_other_are_taken_at_once() -> None:
    course = courses.Course("text", (), Path("held_out.json"))
    method = frontier.Method("a line", ("--x=1",))

    def tasks(done: list[frontier.Result], running: set[frontier.Task]) -> list[frontier.Task]:
        return list(frontier._tasks("base", [course], [method], done, running))

    first = tasks([], set())
    assert [task.power for task in first] == list(frontier.FIRST)
    assert tasks([], set(first[1:])) == first[:1]
    done = [result(power, frontier.SEEDS[0], abs(power)) for power in frontier.FIRST]
    seeds = tasks(done, set())
    assert [(task.power, task.seed) for task in seeds] == [(0, seed) for seed in frontier.SEEDS[1:]]
    assert tasks(done, set(seeds)) == []


@pytest.mark.slow
def test_a_frontier_goes_on_where_it_was(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(courses, "N_HELD_OUT_TEXT", 8)
    monkeypatch.setattr(frontier, "FIRST", (0,))
    monkeypatch.setattr(frontier, "MOST_RATES", 1)
    monkeypatch.setattr(frontier, "SEEDS", frontier.SEEDS[:2])
    out = tmp_path / "frontier.jsonl"
    fixed = ("--text", tiny_records, "--base", tiny_base, "--json", out, "--courses", "text")
    only = (
        "--methods",
        "LoRA on q, v",
        "--parameters",
        1,
        measure_learning.n_parameters(str(tiny_base), frontier.methods()[20]),
    )
    options = [*map(str, (*fixed, *only))]
    assert measure_learning.main(options) == 0
    found = frontier.read_results(out)
    assert sorted((r.line, r.power, r.seed) for r in found) == [
        ("LoRA on q, v", 0, seed) for seed in frontier.SEEDS for _ in range(len(found) // 2)
    ]
    assert all(0 < r.loss < 20 and r.exact is None for r in found)
    table = capsys.readouterr().out
    assert f"| LoRA on q, v | {found[0].parameters:,} | 0.02 |" in table
    before = out.read_bytes()
    assert measure_learning.main(options) == 0
    assert out.read_bytes() == before
    assert capsys.readouterr().out == table


LEARNING = ("--data", "x.json")
FRONTIER = ("--json", "x.jsonl")
TIMES = ("train", "--model", "7b", "--json", "x.json")


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (benchmark, ("train",), "^the following arguments are required: model, json; see --help"),
        (benchmark, (), "^the following arguments are required: work, model, json"),
        (benchmark, (*TIMES, "--repeats", "0"), "--repeats is 0; expected 1 or more"),
        (benchmark, (*TIMES, "--row-tokens", "9", "0"), "--row-tokens is 0; expected 1 or more"),
        (
            benchmark,
            (*TIMES, "--new-tokens", "9"),
            "--new-tokens is for generate and serve; leave",
        ),
        (benchmark, ("generate", *TIMES[1:], "--steps", "9"), "--steps is for train; leave it out of"),
        (benchmark, (*TIMES, "--seed", str(2**64)), "--seed is 18446744073709551616; expected less than"),
        (measure_peers, (), "required: data; see"),
        (measure_peers, (*LEARNING, "--batch", "0"), "--batch is 0; expected 1 or more"),
        (measure_peers, (*LEARNING, "--seed=-1"), "--seed is -1; expected 0 or more"),
        (measure_learning, (), "required: json; see"),
        (measure_learning, (*FRONTIER, "--processes", "0"), "--processes is 0; expected 1 or more"),
        (
            measure_learning,
            (*FRONTIER, "--methods", "LoRA on q"),
            "no method 'LoRA on q'; did you mean 'LoRA on q, v'",
        ),
        (measure_learning, (*FRONTIER, "--courses", "text"), "the courses text, few and epochs need --text"),
        (measure_scaling, (), "required: tokenizer, data; see"),
        (measure_scaling, ("--layouts", "ddp:1", "ddp:0"), "--layouts ddp:0: expected ddp:DEVICES or fsdp2"),
        (measure_scaling, ("--layouts", "fsdp2:x"), "--layouts fsdp2:x: expected ddp:DEVICES or fsdp2"),
        (measure_scaling, ("--layouts", "ddp:9999"), r"trainer\.devices is 9999, but this machine has \d+ "),
        (measure_scaling, ("--steps", "1"), "--steps is 1; expected 3 or more"),
        (measure_scaling, ("--records", "0"), "--records is 0; expected 1 or more"),
        (measure_scaling, ("--", "--optim.lrr", "1"), "unknown option '--optim.lrr'; did you mean"),
    ],
)
def test_mistakes_on_the_command_line(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, script: Any, options: tuple[str, ...], message: str
) -> None:
    if script is measure_scaling and options:
        out = tmp_path / "scaling"
        options = ("--tokenizer", str(tiny_base), "--data", str(tiny_records), "--out", str(out), *options)
    with pytest.raises(UserError, match=message):
        script.main(options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sizes_are_measured_with_and_without_a_cache(
    tiny_base: Path, tiny_records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_ADAPTER_CACHE", "restored after the test")
    out = tmp_path / "size.json"
    measure_size.main(
        ["--base", str(tiny_base), "--data", str(tiny_records), "--sizes", "700", "--json", str(out)]
    )
    first, second = json.loads(out.read_text())
    assert (first["records"], first["cache"], second["cache"]) == (700, "none", "full")
    assert second["processor_seconds"] < first["processor_seconds"]
    assert 20 < first["own_mb"] < first["with_files_mb"] < 2000
