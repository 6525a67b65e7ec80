"""Chat templates and regular expressions in a process with limits."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from lit_adapter.errors import UserError
from lit_adapter.text import huggingface
from lit_adapter.text.huggingface import LLAMA3_PATTERN
from lit_adapter.text.limited import LimitedError, ask
from lit_adapter.text.load import load_tokenizer

RENDERING, TRIAL = "lit_adapter.text.chat_rendering", "lit_adapter.text.pattern_trial"


def request(template: str) -> dict[str, Any]:
    return {"template": template, "conversations": [{"a": "x"}, {"a": "\ud800"}], "common": {"b": "y"}}


def test_a_rendering_comes_back_unchanged() -> None:
    assert ask(RENDERING, request("\u00d6{{ a }}\u2028{{ b }}")) == ["\u00d6x\u2028y", "\u00d6\ud800\u2028y"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'x' * 10**10 }}", "needs more than 400 MB of memory"),
        ("{{ 'x' | center(10**10) }}", "needs more than 400 MB of memory"),
        ("{{ '{:>9999999999}'.format('x') }}", "needs more than 400 MB of memory"),
        ("{% for i in range(90000) %}{{ 'x' * 100 }}{% endfor %}", "gives more than 4,194,304 characters"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "maximum recursion depth exceeded"),
        pytest.param("{{ 3 ** (10 ** 9) }}", "takes more than 1 s", marks=pytest.mark.slow),
        pytest.param("{{ lipsum(100000) }}", "takes more than 1 s", marks=pytest.mark.slow),
    ],
)
def test_a_template_beyond_a_limit(template: str, message: str) -> None:
    with pytest.raises(LimitedError, match=message):
        ask(RENDERING, request(template))


def test_a_process_that_dies_is_an_error_also_where_its_status_is_lost() -> None:
    """As in a program that ignores SIGCHLD: Python then takes the status for 0."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert ask(RENDERING, request("{{ a }}")) == ["x", "\ud800"]
        with pytest.raises(LimitedError, match=r"^ends its process without an answer$"):
            ask("lit_adapter.no_such_module", None)
    finally:
        signal.signal(signal.SIGCHLD, before)


OTHERS = [
    LLAMA3_PATTERN,
    LLAMA3_PATTERN.replace("{1,3}", ""),  # Qwen 2
    r" ?[^(\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+",  # BLOOM
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # o200k
]


def test_patterns_of_well_known_tokenizers_pass_the_trial() -> None:
    ask(TRIAL, OTHERS)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r"(a|a)*$",
        r"(\s+)*x",
        r"([a-zA-Z]+)*\d",
        r"(x+x+)+y",
        r"(ab|ab)*c",
        r"(.*)*(.*)*x",
        r"s*s*s*s*$",
    ],
)
def test_patterns_that_backtrack_for_ever_do_not(pattern: str) -> None:
    with pytest.raises(LimitedError, match=r"retry-limit-in-match over|takes more than"):
        ask(TRIAL, [pattern])


def test_a_pattern_that_passes_the_trial_is_one_line_where_it_fails(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's panic is no Exception; in a worker process it must be an error like any other."""
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    raw = json.loads((folder / "tokenizer.json").read_text())
    first = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [first, raw["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    monkeypatch.setattr(huggingface, "_try_patterns", lambda raw, source: None)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("Say it back.")
    with pytest.raises(
        UserError, match=r"tokenizer\.json: the tokenizer gives up on a text of 41 characters"
    ):
        tokenizer.encode("a" * 40 + "!")


def replace(given: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": given}, "content": content}


def with_steps(base: Path, folder: Path, **steps: Any) -> Path:
    """A base whose tokenizer has other steps before its model."""
    shutil.copytree(base, folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | steps))
    return folder


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GROWING: list[dict[str, Any]] = [
    {"normalizer": {"type": "Sequence", "normalizers": [replace("a", "a" * 1000)] * 4}},
    {"normalizer": {"type": "Sequence", "normalizers": [replace("q", "x" * 50), replace("x", "y" * 50)]}},
    {"normalizer": {"type": "Prepend", "prepend": "a" * 10_000}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 40}},
    {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [replace("a", "x") | {"pattern": {"Regex": ""}}] * 40,
        }
    },
]


@pytest.mark.parametrize(
    "steps", GROWING, ids=["explosion", "two steps", "prefix", "bytes of bytes", "nothing"]
)
def test_steps_that_let_a_text_fill_the_memory_are_refused(
    tiny_base: Path, tmp_path: Path, steps: dict[str, Any]
) -> None:
    folder = with_steps(tiny_base, tmp_path / "base", **steps)
    with pytest.raises(UserError, match=r"json: its normalizer or pre_tokenizer fails on a short text: "):
        load_tokenizer(folder)


def test_ordinary_replacements_are_not_tried(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of sentencepiece tokenizers put one character in place of one."""
    asked: list[str] = []
    monkeypatch.setattr(huggingface, "ask", lambda module, request: asked.append(module))
    llama2 = [{"type": "Prepend", "prepend": "\u2581"}, replace(" ", "\u2581")]
    steps = {"normalizer": {"type": "Sequence", "normalizers": llama2}}
    load_tokenizer(with_steps(tiny_base, tmp_path / "one", **steps))
    assert asked == []
    load_tokenizer(with_steps(tiny_base, tmp_path / "two", normalizer=replace("...", " ... ")))
    assert asked == ["lit_adapter.text.growth_trial"]


def test_a_replacement_that_grows_a_little_is_taken(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(with_steps(tiny_base, tmp_path / "base", normalizer=replace("&", " and ")))
    assert tokenizer.encode("a&b") == tokenizer.encode("a and b")
