"""Chat templates and regular expressions in a process with limits."""

from __future__ import annotations

import json
import shutil
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
