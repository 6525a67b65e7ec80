"""Metrics against other implementations, what fits which references, and answers that cannot become right."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_adapter.errors import UserError
from lit_adapter.evaluation import metrics, statistics
from lit_adapter.evaluation.json_start import can_become
from lit_adapter.evaluation.labels import coded, confusion, macro_f1
from lit_adapter.evaluation.metrics import METRICS, json_exact, json_value, metrics_named, suggest
from lit_adapter.evaluation.scores import warnings

EXPECTED = '{"action":"set_temperature","room":"top office","degrees":21}'


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (EXPECTED, True),
        (f"\n {EXPECTED}\n", True),
        ('{"degrees": 21, "room": "top office", "action": "set_temperature"}', True),
        (EXPECTED + "\nDone.", False),
        ("```json\n" + EXPECTED + "\n```", False),
        (EXPECTED[:-1], False),
        (EXPECTED.replace("21", "22"), False),
        (EXPECTED.replace("21", "21.0"), False),
        (EXPECTED.replace("21", '"21"'), False),
        (EXPECTED.replace("21", "NaN"), False),
        (EXPECTED.replace("21", "1" * 5000), False),
        (EXPECTED.replace("top", "Top"), False),
        (EXPECTED.replace('"room"', '"place"'), False),
        (EXPECTED.replace("}", ',"extra":null}'), False),
        (EXPECTED.replace("}", ',"degrees":21}'), False),
        (f"[{EXPECTED}]", False),
        (EXPECTED.replace('"', "'"), False),
        ("", False),
        ("null", False),
        ("[" * 100_000, False),
        ("__import__('os').abort()", False),
    ],
)
def test_json_exact(text: str, same: bool) -> None:
    assert json_exact(text, EXPECTED) == same
    assert not same or can_become(text, json_value(EXPECTED))


def test_true_is_not_one() -> None:
    assert not json_exact('{"a":true}', '{"a":1}')


@given(st.text())
def test_no_text_breaks_the_score(text: str) -> None:
    assert not json_exact(text, EXPECTED)
    assert json_exact(json.dumps({"a": text}, indent=3), json.dumps({"a": text}, ensure_ascii=False))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.sampled_from([None, 1, "\t"]), st.booleans(), st.randoms(use_true_random=False))
def test_every_start_of_the_same_json_can_become_right(
    value: Any, indent: int | str | None, ascii_only: bool, draw: random.Random
) -> None:
    if isinstance(value, dict):
        items = list(value.items())
        draw.shuffle(items)
        value = dict(items)
    text = " " + json.dumps(value, indent=indent, ensure_ascii=ascii_only) + "\n"
    assert all(can_become(text[:end], value) for end in range(len(text) + 1))


@given(JSON, JSON)
def test_other_json_cannot_become_right(value: Any, other: Any) -> None:
    text = json.dumps(other) + " "
    if metrics.canonical(value) != metrics.canonical(other):
        assert not can_become(text, value)


@pytest.mark.parametrize(
    "start",
    [
        "I",
        "```json",
        '{"act',
        '{"action":"set_t',
        '{"action":"set_temperature","room":"top office","degrees":2',
    ],
)
def test_starts_of_answers(start: str) -> None:
    assert can_become(start, json_value(EXPECTED)) is (start[0] == "{")
    assert not can_become(start + "x", json_value(EXPECTED))


def test_macro_f1_and_confusion_are_scikit_learns() -> None:
    from sklearn.metrics import confusion_matrix, f1_score

    draw = random.Random(0)
    names = ["red", "green", "Blue.", "none"]
    references = [draw.choice(names[:3]) for _ in range(200)]
    answers = [draw.choice([*names, r, r.upper(), f" {r}"]) for r in references]
    clean = [[metrics.label_of(text) for text in side] for side in (references, answers)]
    labels = ["red", "green", "blue"]
    _, codes = coded(answers, references)
    assert macro_f1(codes) == pytest.approx(f1_score(*clean, labels=labels, average="macro"))
    found = confusion(answers, references)
    order = [metrics.label_of(label) for label in found.labels] + ["none"]
    assert found.counts.tolist() == confusion_matrix(*clean, labels=order)[:3].tolist()


def test_intervals_are_scipys() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(1).gamma(2.0, size=80)
    found = statistics.estimate(values)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=2000, rng=0).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    assert statistics.estimate(np.ones(20)).low == pytest.approx(0.8389, abs=1e-4)  # Wilson's


@pytest.mark.parametrize("n_records", [9, 60])
def test_p_values_are_those_of_mcnemar_and_of_scipys_permutations(n_records: int) -> None:
    from scipy.stats import binomtest, permutation_test

    generator = np.random.default_rng(n_records)
    a, b = (generator.random((2, n_records)) < [[0.7], [0.4]]).astype(float)
    better, worse = int((a > b).sum()), int((a < b).sum())
    exact = binomtest(better, better + worse).pvalue  # McNemar's exact test
    assert statistics.compare(a, b).p_value == pytest.approx(exact, abs=0.01)
    x, y = generator.normal(0.3, 1, n_records), generator.normal(0, 1, n_records)
    theirs = permutation_test(
        (x, y), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=10_000, rng=0
    )
    assert statistics.compare(x, y).p_value == pytest.approx(theirs.pvalue, abs=0.02)


def test_chance_is_told_from_a_difference() -> None:
    """Of comparisons without a difference, about one in twenty is taken for one; a large one is found."""
    generator = np.random.default_rng(0)
    same = [statistics.compare(*generator.normal(size=(2, 40))) for _ in range(80)]
    assert sum(not one.is_noise for one in same) <= 10
    least = float(np.mean([one.detectable for one in same]))
    found = [statistics.compare(generator.normal(least, 1, 40), generator.normal(size=40)) for _ in range(80)]
    assert 0.68 < np.mean([not one.is_noise for one in found]) < 0.92


@pytest.mark.parametrize("n_records", range(1, 10))
def test_too_few_records_show_no_difference(n_records: int) -> None:
    """Not even if one model is right each time and the other one never."""
    best, none = np.ones(n_records), np.zeros(n_records)
    found, alike = statistics.compare(best, none), statistics.compare(none, none)
    assert found.is_noise == (n_records < 6)
    assert (found.detectable is None) == (alike.detectable is None) == found.is_noise
    if alike.detectable is not None:
        shown = np.arange(n_records) < round(alike.detectable * n_records)
        assert not statistics.compare(none + shown, none).is_noise


@pytest.mark.parametrize(
    ("name", "answer", "reference", "score"),
    [
        ("exact", " Paris\n", "Paris", 1),
        ("exact", "paris", "Paris", 0),
        ("normalised", "The Paris!", "paris", 1),
        ("contains", "It is, of course, New York.", "new york", 1),
        ("contains", "It is Newark.", "new", 0),
        ("numeric", "So 1,000 + 1 = 1001.", "1001.0", 1),
        ("numeric", "2 + 2 = 4, not 5", "4", 0),
        ("numeric", "so\n#### 42", "6 * 7 = 42\n#### 42", 1),
        ("numeric", "none", "1", 0),
        ("json_valid", "[1]", "{}", 0),
        ("json_valid", '{"b": 1}', '{"a": 2}', 1),
        ("json_fields", '{"a": 1, "b": 2, "c": 3}', '{"a": 1, "b": "2"}', 1 / 3),
        ("json_fields", "no", '{"a": 1}', 0),
        ("label", '"Spam."', "spam", 1),
        ("label", "-", "+", 0),
        ("rouge_l", "the cat sat", "the cat sat down", 6 / 7),
        ("chrf", "abc", "abc", 1),
    ],
)
def test_scores(name: str, answer: str, reference: str, score: float) -> None:
    assert METRICS[name].score(answer, reference) == pytest.approx(score)


@given(st.text(max_size=30), st.text(max_size=30))
def test_an_answer_called_hopeless_is_not_right_however_it_goes_on(start: str, reference: str) -> None:
    hopeless = METRICS["exact"].hopeless
    assert hopeless is not None
    if hopeless(start, reference):
        assert not any(
            metrics.exact(start + rest, reference) for rest in ("", reference, reference[len(start) :], " ")
        )


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (['{"a": 1}'] * 5, ("json_exact", "json_valid", "json_fields")),
        (["yes", "no"] * 5, ("label",)),
        (["0", "1"] * 5, ("label",)),
        ([f"the sum is\n#### {n}" for n in range(9)], ("numeric", "exact")),
        ([f"$ {n}" for n in range(9)], ("numeric", "exact")),
        (
            [f"a text about {n} things" for n in range(9)],
            ("rouge_l", "chrf", "exact", "normalised", "contains"),
        ),
    ],
)
def test_metrics_fit_what_the_references_look_like(references: list[str], expected: tuple[str, ...]) -> None:
    assert suggest(references)[0] == expected
    metrics_named(expected, references, references)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_metric", raising=False)
    return lambda text: print(text, file=(tmp_path / "my_metric.py").open("w"), flush=True)


def test_a_metric_of_ones_own(module: Callable[[str], None]) -> None:
    module("def same_length(answer, reference): return len(answer) == len(reference)")
    (metric,) = metrics_named(["my_metric:same_length"], ["a"], ["f:1"])
    assert (metric.score("x", "y"), metric.score("xx", "y")) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(a, b): return 1 / 0", r"my_metric:f\('y', 'y'\) raised ZeroDivisionError: division by zero"),
        ("def f(a, b): return float('nan')", "returned nan; expected a finite number or a bool"),
        ("def f(a, b): return 'good'", "returned 'good'; expected a finite number"),
        ("f = 3", "my_metric has no function 'f'"),
        ("import nowhere", "cannot import my_metric: ModuleNotFoundError"),
    ],
)
def test_what_is_wrong_with_it_is_said(module: Callable[[str], None], text: str, message: str) -> None:
    module(text)
    with pytest.raises(UserError, match=message):
        metrics_named(["my_metric:f"], ["y"], ["f:1"])[0].score("x", "y")


def test_a_reference_of_nothing_but_an_article_is_no_empty_answer() -> None:
    (normalised, contains) = metrics_named(["normalised", "contains"], ["A"], ["f:1"])
    assert [normalised.score(answer, "A") for answer in ("", "a", "A.", "B")] == [0.0, 1.0, 0.0, 0.0]
    assert [contains.score(answer, "?") for answer in ("", "?")] == [0.0, 1.0]


def test_the_interval_of_equal_scores_is_open_to_both_sides() -> None:
    right, wrong = np.ones(20), np.zeros(20)
    same = statistics.compare(right, right)
    assert (same.difference, same.p_value) == (0.0, 1.0)
    assert -same.low == same.high == pytest.approx(1.96**2 / (20 + 1.96**2))
    worse, better = statistics.compare(wrong, right), statistics.compare(right, wrong)
    assert (worse.low, worse.high) == (-better.high, -better.low) == (-1.0, -better.low)
    assert 0.8 < better.low < better.high


def test_one_record_is_too_few_to_show_a_difference() -> None:
    row = {"model": "one", "against": "base", "metric": "exact", "noise": True, "difference": 0.0}
    one = row | {"p_value": 1.0, "records": 1, "detectable": None}
    found = {"metrics": {"exact": "exact"}, "comparisons": [one, one | {"records": 2}]}
    assert [line.partition("): ")[2] for line in warnings(found)] == [
        "1 record is too few to show one",
        "2 records are too few to show one",
    ]
