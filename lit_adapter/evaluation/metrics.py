"""Scores of an answer against its reference, one number per record, and which of them fit which data.

Every metric is a function of two texts that gives a number, mostly from 0 to 1, or None if the record does
not count. Their means are reported. Metrics of a whole set (macro F1, confusion) are in `labels`.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from importlib.util import find_spec
from typing import Any

from lit_adapter.data.strict_json import parse_json
from lit_adapter.errors import UserError, nearest, shorten

Score = Callable[[str, str], float | None]
"""The score of an answer (first) against its reference (second)."""
FAVOURED = 0.9
"""Share of references of one kind from which metrics for this kind are chosen."""


@dataclass(frozen=True)
class Metric:
    """One number for each record."""

    name: str
    title: str
    score: Score
    fits: Callable[[str], bool] = lambda reference: True
    """Whether a reference is of the kind that the metric compares with."""
    needs: str = ""
    """What its references must be, in words."""
    hopeless: Callable[[str, str], bool] | None = None
    """Whether no continuation of an answer (first) can be right; None if that cannot be told."""
    package: str = ""
    """Module that it needs, of the extra ``eval``."""


def normalise(text: str) -> str:
    """Return a text in lower case without punctuation, articles and repeated white space, as SQuAD does.

    A text that consists of nothing else keeps them, so that "A" does not become an empty answer.
    """
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split()) or " ".join(text.lower().split())


def exact(answer: str, reference: str) -> float:
    """Whether the texts are equal, except for white space at their ends."""
    return float(answer.strip() == reference.strip())


def normalised(answer: str, reference: str) -> float:
    """Whether the texts are equal after `normalise`."""
    return float(normalise(answer) == normalise(reference))


def contains(answer: str, reference: str) -> float:
    """Whether the reference's words occur in the answer, one after another, after `normalise`."""
    return float(f" {normalise(reference)} " in f" {normalise(answer)} ")


_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def number_of(text: str) -> Decimal | None:
    """Return the number that a text ends with: the one after ``####`` if it has that, else its last one."""
    found = _NUMBER.findall(text.rpartition("####")[2])
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def is_number(reference: str) -> bool:
    """Whether a reference is a number alone, or ends in ``####`` and a number."""
    last = reference.rpartition("####")[2].strip().strip("$\u20ac\u00a3%").strip()
    return _NUMBER.fullmatch(last) is not None


def numeric(answer: str, reference: str) -> float:
    """Whether the numbers that both texts end with are equal: 1,000 is 1000.0."""
    given = number_of(answer)
    return float(given is not None and given == number_of(reference))


def json_value(text: str) -> Any:
    """Return the value of a text that is JSON, else None."""
    try:
        return parse_json(text)
    except ValueError:
        return None


def is_json(reference: str) -> bool:
    """Whether a reference is a JSON object or array."""
    return isinstance(json_value(reference), dict | list)


def json_valid(answer: str, reference: str) -> float:
    """Whether the answer is JSON of the reference's kind, and nothing else."""
    return float(type(json_value(answer)) is type(json_value(reference)))


def canonical(value: Any) -> str:
    """Return a JSON value as canonical text: 21 is neither 21.0 nor "21"."""
    return json.dumps(value, sort_keys=True)


def json_exact(answer: str, reference: str) -> float:
    """Whether both texts are the same JSON value; white space and the order of keys do not matter."""
    return float(is_json(answer) and canonical(json_value(answer)) == canonical(json_value(reference)))


def json_fields(answer: str, reference: str) -> float | None:
    """The share of the fields of both objects that are equal; None if the reference is not an object."""
    wanted = json_value(reference)
    if not isinstance(wanted, dict):
        return None
    given = json_value(answer)
    given = given if isinstance(given, dict) else {}
    same = sum(canonical(given[key]) == canonical(wanted[key]) for key in given.keys() & wanted.keys())
    names = given.keys() | wanted.keys()
    return same / len(names) if names else 1.0


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L's F measure, by rouge-score (arXiv 1803.01937 describes it)."""
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def chrf(answer: str, reference: str) -> float:
    """Return chrF of one answer, by sacrebleu, from 0 to 1."""
    return float(_chrf().sentence_score(answer, [reference]).score) / 100


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def _not_a_start(answer: str, reference: str) -> bool:
    wanted, given = reference.strip(), answer.lstrip()
    return not wanted.startswith(given[: len(wanted)]) or bool(given[len(wanted) :].strip())


def _cannot_be_json(answer: str, reference: str) -> bool:
    from lit_adapter.evaluation.json_start import can_become

    return not can_become(answer, json_value(reference))


def label_of(text: str) -> str:
    """Return a label in the form that is compared: without case, white space at its ends or a full stop."""
    return " ".join(text.casefold().split()).strip("\"'").removesuffix(".")


def label(answer: str, reference: str) -> float:
    """Whether both texts are the same label."""
    return float(label_of(answer) == label_of(reference))


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact", "exact match", exact, hopeless=_not_a_start),
        Metric("normalised", "normalised match", normalised),
        Metric("contains", "contains the reference", contains),
        Metric("numeric", "equal number", numeric, is_number, "a number"),
        Metric("json_valid", "valid JSON", json_valid, is_json, "a JSON object or array"),
        Metric("json_exact", "same JSON", json_exact, is_json, "a JSON object or array", _cannot_be_json),
        Metric("json_fields", "equal JSON fields", json_fields, is_json, "a JSON object or array"),
        Metric("label", "label accuracy", label),
        Metric("rouge_l", "ROUGE-L", rouge_l, package="rouge_score"),
        Metric("chrf", "chrF", chrf, package="sacrebleu"),
    )
}
TEXT = ("rouge_l", "chrf", "exact", "normalised", "contains")
"""Free text is seldom repeated exactly, so that exact match alone would tell nothing."""
MOST_LABELS = 20
LONGEST_LABEL = 40
"""Characters."""


def suggest(references: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Return the metrics that fit the references, and in words what these look like."""
    kinds = set(map(label_of, references))
    if _share(is_json, references) >= FAVOURED:
        return ("json_exact", "json_valid", "json_fields"), "JSON"
    if are_labels(references):
        return ("label",), f"{len(kinds)} labels"
    if _share(is_number, references) >= FAVOURED:
        return ("numeric", "exact"), "numbers"
    here = tuple(name for name in TEXT if _is_here(METRICS[name]))
    return here, "free text" + (" (rouge_l and chrf need the extra eval)" if len(here) < len(TEXT) else "")


def are_labels(references: Sequence[str]) -> bool:
    """Whether references are few short texts, each used several times."""
    kinds = set(map(label_of, references))
    few = 2 <= len(kinds) <= min(MOST_LABELS, len(references) // 4)
    return few and all(len(reference.strip()) <= LONGEST_LABEL for reference in references)


def _share(fits: Callable[[str], bool], references: Sequence[str]) -> float:
    return sum(map(fits, references)) / len(references)


def _is_here(metric: Metric) -> bool:
    return not metric.package or find_spec(metric.package) is not None


def metrics_named(names: Sequence[str], references: Sequence[str], origins: Sequence[str]) -> list[Metric]:
    """Return metrics by name, or as ``module:function``, that fit the references.

    Raises:
        UserError: an unknown name, a package or module that is missing, or a reference of another kind;
            ``origins`` says where it is.
    """
    found = []
    for name in names:
        if ":" in name:
            from lit_adapter.evaluation.own_metric import own_metric

            found.append(own_metric(name))
            found[-1].score(references[0], references[0])  # so that its errors show before hours of answers
            continue
        metric = METRICS.get(name)
        if metric is None:
            hint = nearest(name, list(METRICS)) or f"; expected {', '.join(METRICS)} or module:function"
            raise UserError(f"--metrics: '{name}' is unknown{hint}")
        if not _is_here(metric):
            raise UserError(
                f"--metrics: {name} needs the package of {metric.package}; pip install -e '.[eval]'"
            )
        _check_fit(metric, references, origins)
        found.append(metric)
    return found


def _check_fit(metric: Metric, references: Sequence[str], origins: Sequence[str]) -> None:
    n_labels = len(set(map(label_of, references)))
    if metric.name == "label" and n_labels > MOST_LABELS:
        raise UserError(
            f"--metrics: label needs at most {MOST_LABELS} different outputs, but there are {n_labels} in "
            f"{len(references)} records; use exact"
        )
    for reference, origin in zip(references, origins, strict=True):
        if not metric.fits(reference):
            raise UserError(
                f"--metrics: {metric.name} compares with {metric.needs}, but the output of {origin} is "
                f"{shorten(reference)}; leave {metric.name} out"
            )
