"""Whole runs on conversations: what is printed, the template in the adapter, resuming, and weights."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import Stopper

import lit_adapter
from lit_adapter.config import Config
from lit_adapter.errors import UserError
from lit_adapter.training.finetune import finetune
from lit_adapter.weights.adapter_file import read_adapter


def talks(path: Path, n_records: int = 40, seed: int = 0) -> str:
    draw = random.Random(seed)
    rows = []
    for number in range(n_records):
        messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
        for turn in range(draw.randint(1, 3)):
            messages += [
                {"role": "user", "content": f"Say {number} and {turn}"},
                {"role": "assistant", "content": f"{number} {turn}"},
            ]
        rows.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(rows))
    return str(path)


def test_a_run_on_conversations(tiny: Callable[..., Config], tmp_path: Path) -> None:
    data = talks(tmp_path / "talks.jsonl")
    options = ("--data.train", data, "--data.max_length", "200", "--optim.max_steps", "4")
    lines: list[str] = []
    config = tiny(*options)
    assert finetune(config, say=lines.append) == 0
    said = "\n".join(lines)
    assert "format: messages; its records have 'messages'" in said
    start = next(n for n, line in enumerate(lines) if line.startswith("example"))
    example = lines[start + 1]
    assert example.startswith("  | [[{{<s>}}Be brief.")  # Alpaca's form: the tiny base has no chat template
    assert example.count("]]") == example.count("[[") == example.count("### Response:")
    info, _ = read_adapter(Path(config.out) / "adapter.safetensors")
    assert info.template.kind == "alpaca-chat"
    assert info.template.jinja is not None
    model = lit_adapter.load(Path(config.out) / "adapter.safetensors", config.base, device="cpu")
    assert isinstance(model.chat([{"role": "user", "content": "Say 1"}], max_new_tokens=4), str)

    other = tiny(*options, out="stopped")
    stopper = Stopper("step 2")
    assert finetune(other, say=stopper) == 143
    assert finetune(other, "last", say=lines.append) == 0
    same = [Path(one.out, "adapter.safetensors").read_bytes() for one in (config, other)]
    assert same[0] == same[1]


def test_a_weighted_run_is_resumed_exactly(tiny: Callable[..., Config], tmp_path: Path) -> None:
    paths = [talks(tmp_path / "a.jsonl", 30, 1), talks(tmp_path / "b.jsonl", 12, 2)]
    options = ("--data.train", json.dumps(paths), "--data.weights", "[1, 2]", "--data.max_length", "200")
    whole, stopped = (
        tiny(*options, "--optim.max_steps", "9"),
        tiny(*options, "--optim.max_steps", "9", out="stopped"),
    )
    assert finetune(whole, say=lambda line: None) == 0
    assert finetune(stopped, say=Stopper("step 4")) == 143
    assert finetune(stopped, "last", say=lambda line: None) == 0
    same = [Path(one.out, "adapter.safetensors").read_bytes() for one in (whole, stopped)]
    assert same[0] == same[1]


def test_another_division_into_weighted_sources_is_another_run(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """The records are the same, in the same order."""
    whole = Path(talks(tmp_path / "a.jsonl", 40, 1)).read_text().splitlines(keepends=True)
    weights = ("--data.weights", "[3, 1]", "--data.max_length", "200", "--optim.max_steps", "4")

    def run(name: str, first: int) -> Config:
        paths = [tmp_path / f"{name}-{part}.jsonl" for part in "ab"]
        paths[0].write_text("".join(whole[:first]))
        paths[1].write_text("".join(whole[first:]))
        return tiny("--data.train", json.dumps([*map(str, paths)]), *weights)

    assert finetune(run("one", 20), say=Stopper("step 2")) == 143
    with pytest.raises(UserError, match=r"data\.sources was \[20, 20\], now \[10, 30\]"):
        finetune(run("other", 10), "last", say=lambda line: None)


def test_what_is_cut_is_counted(tiny: Callable[..., Config], tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    turn = [{"role": "user", "content": "word " * 30}, {"role": "assistant", "content": "word " * 5}]
    too_long = [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "x"}]
    rows = [turn[:2]] * 20 + [turn * 6] * 3 + [too_long]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    lines: list[str] = []
    options = ("--data.max_length", "250", "--data.val_size", "0", "--optim.max_steps", "2")
    assert finetune(tiny("--data.train", str(path), *options), say=lines.append) == 0
    notes = [line.strip() for line in lines if "%)" in line]
    assert "3 (12.5%) of the training records lost their first turns to data.max_length" in notes
    assert (
        "1 (4.2%) of the training records left out: the last turns are longer than data.max_length 250"
        in notes
    )


def test_answers_learned_one_by_one_are_counted_and_shown(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    template = tmp_path / "last.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}] "
        "{% if m.role == 'assistant' and loop.last %}(thought) {% endif %}{{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    turns = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{n}"}] for n in range(3)]
    path = tmp_path / "talks.jsonl"
    rows = [turns[0]] * 20 + [[message for turn in turns for message in turn]] * 4
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in reversed(rows)))
    options = ("--data.template", str(template), "--data.val_size", "0", "--optim.max_steps", "2")
    whole, stopped = (tiny("--data.train", str(path), *options, out=out) for out in ("whole", "stopped"))
    lines: list[str] = []
    assert finetune(whole, say=lines.append) == 0
    said = "\n".join(lines)
    assert "24 training records" in said
    assert (
        "4 (16.7%) of the training records are learned one answer at a time, 32 examples in all: the "
        "template writes earlier answers differently from the last one" in said
    )
    example = next(line for line in lines if line.startswith("  | "))
    shown = [part.split("]]")[1].split("\n")[0] for part in example.split("\n  |---\n")]
    assert shown == ["(thought) a0", "(thought) a1", "(thought) a2"]
    assert finetune(stopped, say=Stopper("step 1/")) == 143
    assert finetune(stopped, "last", say=lambda line: None) == 0
    same = [Path(one.out, "adapter.safetensors").read_bytes() for one in (whole, stopped)]
    assert same[0] == same[1]


def test_what_the_template_does_not_show_is_named(tiny: Callable[..., Config], tmp_path: Path) -> None:
    path = tmp_path / "tools.jsonl"
    answer = {"role": "assistant", "content": "Hello", "reasoning_content": "hm", "name": "Ann"}
    row = {"messages": [{"role": "user", "content": "Hi"}, answer], "tools": [{"name": "f"}]}
    path.write_text(f"{json.dumps(row)}\n" * 20)
    lines: list[str] = []
    assert finetune(tiny("--data.train", str(path), "--optim.max_steps", "1"), say=lines.append) == 0
    (warning,) = [line.strip() for line in lines if "does not show" in line]
    assert (
        warning
        == "warning: the template does not show what conversations hold as 'reasoning_content', 'tools'"
    )
