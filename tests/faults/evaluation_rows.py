"""Faults 133 to 138 and 225: what an evaluation is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable

from bench import OK, Bench, Outcome, Row
from local_tasks import write_tasks

WITHOUT_DATA = "task: far\ndataset_path: nobody/far-away\noutput_type: loglikelihood\ntest_split: test\n"


def on_words(*options: object) -> Callable[[Bench], Outcome]:
    """Evaluate on two records whose outputs are words."""

    def tried(bench: Bench) -> Outcome:
        records = [OK, {"instruction": "Which city?", "output": "Paris"}]
        return bench.evaluate("--data", bench.file("words.json", records), "--max_new_tokens", 3, *options)

    return tried


def by(text: str) -> Callable[[Bench], Outcome]:
    """Evaluate by a metric of one's own."""

    def tried(bench: Bench) -> Outcome:
        bench.file("fault_metric.py", text)
        bench.monkeypatch.chdir(bench.folder)
        bench.monkeypatch.setattr(sys, "path", list(sys.path))
        bench.monkeypatch.setattr(sys, "dont_write_bytecode", True)
        sys.modules.pop("fault_metric", None)
        return on_words("--metrics", "fault_metric:f")(bench)

    return tried


def after_another(bench: Bench) -> Outcome:
    assert on_words()(bench).status == 0
    return on_words("--max_new_tokens", 4)(bench)


def two_files_of_one_task(bench: Bench) -> Outcome:
    one, other = (write_tasks(bench.file(f"{name}/.kept", "").parent)["choice"] for name in ("one", "other"))
    return bench.evaluate("--tasks", f"{one},{other}")


def far_away(bench: Bench) -> Outcome:
    task = bench.file("far.yaml", WITHOUT_DATA)
    options = ("--base", bench.base, "--tasks", task, "--out", bench.folder / "evaluation", "--device", "cpu")
    return bench.process("evaluate.py", *options, HF_HUB_OFFLINE="1")


ROWS = [
    Row(
        133,
        "numbers asked of words",
        on_words("--metrics", "exact,numeric"),
        r"numeric compares with a number, but the output of .*words\.json:1 is 'b'; leave numeric out",
    ),
    Row(
        133,
        "JSON asked of words",
        on_words("--metrics", "json_fields"),
        r"json_fields compares with a JSON obj",
    ),
    Row(
        133,
        "an unknown metric",
        on_words("--metrics", "exakt"),
        r"'exakt' is unknown; did you mean 'exact'\?",
    ),
    Row(
        133,
        "a metric twice",
        on_words("--metrics", "exact,contains,exact"),
        r"--metrics: exact is given twice; leave one out",
    ),
    Row(
        133,
        "early stops with a metric of whole answers",
        on_words("--stop_early", "--metrics", "contains"),
        r"--stop_early: contains needs whole answers; leave it or --stop_early out",
    ),
    Row(
        134,
        "answers of another run",
        after_another,
        r"answers\.jsonl: answers of another run \(other max_new_tokens\); choose another --out",
    ),
    Row(
        134,
        "a report into the base",
        lambda b: on_words("--out", b.base)(b),
        r"tiny: holds a converted base; choose another --out, such as a new folder",
    ),
    Row(
        134,
        "a report into another program's model",
        lambda b: on_words("--out", b.file("model/config.json", "{}").parent)(b),
        r"model: holds a model; choose another --out, such as a new folder",
    ),
    Row(
        134,
        "a report into checkpoints",
        lambda b: on_words("--out", b.file("checkpoints/step-0000001.ckpt", "").parent)(b),
        r"checkpoints: holds a run's checkpoints; choose another --out, such as a new folder",
    ),
    Row(
        134,
        "a report into a file",
        lambda b: on_words("--out", b.file("report.html", ""))(b),
        r"report\.html: is a file; --out names a folder",
    ),
    Row(
        135,
        "a task file that does not exist",
        lambda b: b.evaluate("--tasks", "nowhere.yaml"),
        r"--tasks: nowhere\.yaml: file not found",
    ),
    Row(
        135,
        "a task twice",
        lambda b: b.evaluate("--tasks", "arc_easy,arc_easy"),
        r"--tasks: arc_easy is given twice; leave one out",
    ),
    Row(
        135,
        "two files of one task",
        two_files_of_one_task,
        r"--tasks: choice is given twice; leave one out",
    ),
    Row(
        135,
        "an unknown task",
        lambda b: b.evaluate("--tasks", "arc_eazy"),
        r"--tasks: 'arc_eazy' is unknown; did you mean 'arc_easy'\?",
        slow=True,
    ),
    Row(
        136,
        "data of the network without a network",
        far_away,
        r"--tasks: .*far\.yaml: the network cannot be reached, and its data is not in the cache",
        slow=True,
    ),
    Row(
        137,
        "an empty held-out file",
        lambda b: b.evaluate("--data", b.file("none.json", "[]")),
        r"none\.json: no usable record: it is empty",
    ),
    Row(
        137,
        "held-out records without outputs",
        lambda b: b.evaluate("--data", b.file("q.json", '[{"instruction": "a", "answer": "b"}]')),
        r"q\.json:1: key 'output' is missing .*holds it with --columns\.output",
    ),
    Row(
        137,
        "an empty plain text",
        lambda b: b.evaluate("--plain", b.file("none.txt", "\n")),
        r"none\.txt: the file is empty; expected a text to measure perplexity on",
    ),
    Row(
        225,
        "an adapter with an empty name, as an unset variable gives it",
        on_words("--adapter", ""),
        r"the adapter's name is empty; give a run's folder",
    ),
    Row(
        225,
        "an empty name to generate with",
        lambda b: b.generate("--adapter", ""),
        r"the adapter's name is empty; give a run's folder",
    ),
    Row(118, "nothing to evaluate on", lambda b: b.evaluate(), r"nothing to evaluate on: give --data FILE"),
    Row(
        138,
        "a metric that raises",
        by("def f(answer, reference): return {}[answer]"),
        r"--metrics: fault_metric:f\('b', 'b'\) raised KeyError: 'b'",
    ),
    Row(
        138,
        "a metric that is not there",
        by("def g(answer, reference): return 1"),
        r"--metrics: fault_metric:f: fault_metric has no function 'f'",
    ),
]
