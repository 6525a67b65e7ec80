"""Answers that repeat themselves end there, in comparisons with the plain base."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lit_adapter import quickstart
from lit_adapter.generation.answering import compare
from lit_adapter.generation.repeats import until_repeats
from lit_adapter.generation.settings import Sampling

NOTE = " … repeats"


def cut(text: str) -> str:
    return "".join(until_repeats(text))


@given(st.text("ab c\n", max_size=80), st.text("de\n", min_size=1, max_size=70))
def test_a_repeated_end_is_cut_after_three_copies_or_sixty_characters(start: str, unit: str) -> None:
    found = cut(start + unit * 100)
    assert found.endswith(NOTE)
    kept = found.removesuffix(NOTE)
    assert (start + unit * 100).startswith(kept)
    assert len(kept) <= len(start) + max(3 * len(unit), 60) + 2 * len(unit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Wow!!!",
        "red, red, red, red, red",
        "a line of some length\n" * 2,
        "-" * 59,
        " ".join(map(str, range(99))),
    ],
)
def test_other_answers_stay_whole(text: str) -> None:
    assert cut(text) == text


class Looping:
    """A model whose plain base never ends; the adapted one answers, and repeats itself on purpose."""

    def __init__(self, text: str, n_pieces: int) -> None:
        self.text, self.n_pieces, self.n_taken = text, n_pieces, 0

    @property
    def base(self) -> Looping:
        return self.plain

    def stream(self, *task: str, **sampling: Any) -> Iterator[str]:
        for _ in range(self.n_pieces):
            self.n_taken += 1
            yield self.text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_comparison_cuts_the_base_alone_and_asks_for_no_more(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "400")
    model = Looping("yes and no, ", 20)
    model.plain = Looping("I am a model. ", 1000)
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    compare(model, ("x", ""), Sampling(), out)
    assert model.plain.n_taken == 5  # of 14 characters each
    assert model.n_taken == 20
    assert out.getvalue().count("repeats") == 1


def test_the_quickstart_says_where_the_base_is_cut() -> None:
    console = Console(file=io.StringIO(), width=300)
    before, after = ({"input": "y", "reference": "{}", "answer": a} for a in ("I am.\n" * 100, "long " * 50))
    quickstart._show_example(console, before, after)
    lines = console.file.getvalue().splitlines()
    assert lines[2].endswith("I am. /  … repeats")
    assert lines[3].startswith("adapted   long long")
    assert lines[3].endswith(" …")
