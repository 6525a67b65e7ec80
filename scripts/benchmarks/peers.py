"""The comparison of scripts/measure_peers.py: its data, its runs, its table."""

from __future__ import annotations

import gc
import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.families import Batch, Ours, Peft, Run, all_methods
from lit_adapter.config import OptimConfig
from lit_adapter.data.encode import encode_records
from lit_adapter.data.mixing import EpochOrder
from lit_adapter.data.packing import Packer, TrainingSteps, shared_preambles
from lit_adapter.data.records import read_records, split
from lit_adapter.device import DTYPES, choose_device
from lit_adapter.errors import UserError, nearest
from lit_adapter.files.write import write_json
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import resolve_template
from lit_adapter.training.schedule import learning_rate, total_steps

MAX_LENGTH = 512
SAME_BASE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference in held-out loss between untrained implementations, by precision of the base."""
MARGINS = {"peft-adaption-prompt": 0.0, "peft-lora": 0.03}
"""By how much our default's held-out loss may end above each."""

Family = Ours | Peft


@dataclass
class Course:
    """The data of the comparison."""

    steps: TrainingSteps
    held_out: Packer
    n_steps: int
    """Optimizer steps of a run."""

    def batches(self, family: Family) -> tuple[list[Batch], list[Batch]]:
        """Return a family's training steps and held-out batches."""
        train = [family.prepare(self.steps.packer, self.steps.records(step)) for step in range(self.n_steps)]
        order, size = np.arange(len(self.held_out.encoded)), self.steps.batch_size
        held_out = [order[first : first + size] for first in range(0, len(order), size)]
        return train, [family.prepare(self.held_out, records) for records in held_out]


def read_course(options: Any, device: torch.device) -> Course:
    """Read, split and encode the records.

    Raises:
        UserError: unusable data or sizes.
    """
    tokenizer = load_tokenizer(Path(options.base))
    template = resolve_template("alpaca", tokenizer)
    sides = split(read_records(options.data), val_size=options.held_out, seed=options.seed)
    train, held_out = (encode_records(side, tokenizer, template, max_length=MAX_LENGTH) for side in sides)
    preambles, row_tokens = shared_preambles(train), 8192 if device.type == "cuda" else 2048
    packers = [Packer(side, preambles, mask_prompt=True, row_tokens=row_tokens) for side in (train, held_out)]
    order = EpochOrder(len(train), options.seed)
    steps = TrainingSteps(packers[0], batch_size=options.batch, order=order)
    plan = OptimConfig(batch_size=options.batch, epochs=options.epochs, max_steps=options.max_steps)
    return Course(steps, packers[1], total_steps(plan, steps.steps_per_epoch))


def train(family: Family, parameters: list[nn.Parameter], optim: OptimConfig, batches: list[Batch]) -> None:
    """Train one adapter, without waiting for the device."""
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.peak_lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    bound = optim.clip if optim.clip is not None else math.inf
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, len(batches))
        for part in batch.parts:
            (family.loss(part) / batch.n_targets).backward()
        nn.utils.clip_grad_norm_(parameters, bound)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(family: Family, batches: list[Batch]) -> float:
    """Return the loss per answer token."""
    sums = torch.stack([family.loss(part) for batch in batches for part in batch.parts])
    return float(sums.double().sum()) / sum(batch.n_targets for batch in batches)


@dataclass
class Start:
    """A family's state before training; the same in all families if the comparison is fair."""

    family: str
    held_out_loss: float
    train_targets: int
    held_out_targets: int


@dataclass
class Row:
    """One line of the table."""

    method: str
    lr: float
    trained: int
    held_out_loss: float | None
    """None if the run diverged."""
    seconds: float
    """Training and one evaluation, without loading and packing the data."""


@dataclass
class Report:
    """What has been measured so far."""

    about: dict[str, Any]
    starts: list[Start] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def add(self, result: Start | Row, n_runs: int, path: str | None) -> None:
        """Add a result, print it on standard error, and write all results to ``path``."""
        if isinstance(result, Start):
            self.starts.append(result)
            line = f"{result.family}, before training"
        else:
            self.rows.append(result)
            line = f"[{len(self.rows)}/{n_runs}] {result.method}, lr {result.lr:g}, {result.seconds:.1f} s"
        print(f"{line}: held-out loss {_shown(result.held_out_loss)}", file=sys.stderr, flush=True)
        if path is not None:
            write_json(Path(path), asdict(self))

    def table(self) -> str:
        """Return the results as Markdown, best first."""
        lines = ["| method | learning rate | trained parameters | held-out loss | seconds |"]
        lines.append("|---|---:|---:|---:|---:|")
        for row in sorted(self.rows, key=lambda row: _or_infinity(row.held_out_loss)):
            loss = _shown(row.held_out_loss)
            lines.append(f"| {row.method} | {row.lr:g} | {row.trained:,} | {loss} | {row.seconds:.1f} |")
        lines.append(f"| base, nothing trained | | 0 | {_shown(self.starts[0].held_out_loss)} | |")
        return "\n".join(lines)

    def verdicts(self) -> list[str]:
        """Compare our default with PEFT's adapters, each at its best learning rate."""
        best: dict[str, float] = {}
        for row in self.rows:
            best[row.method] = min(_or_infinity(row.held_out_loss), best.get(row.method, math.inf))
        lines = []
        for name, margin in MARGINS.items():
            if "ours" in best and name in best:
                above = best["ours"] - best[name]
                verdict = "ok" if above < margin else "not reached"
                lines.append(f"ours minus {name}: {above:+.4f} (wanted: below {margin:g}): {verdict}")
        return lines

    def fairness(self, tolerance: float) -> tuple[str, bool]:
        """Return whether all families start from the same loss on the same targets: a line, the verdict."""
        losses = [start.held_out_loss for start in self.starts]
        seen = ", ".join(f"{start.family} {start.held_out_loss:.6f}" for start in self.starts)
        if len(losses) == 1:
            return f"before training: {seen}; one family alone, nothing to compare", True
        counts = sorted({(start.train_targets, start.held_out_targets) for start in self.starts})
        spread = max(losses) - min(losses)
        fair = spread <= tolerance and len(counts) == 1
        targets = " and ".join(f"{n:,} training, {m:,} held-out targets" for n, m in counts)
        verdict = "ok" if fair else "FAILED, the runs cannot be compared"
        return (
            f"before training: {seen}; spread {spread:.1e} (at most {tolerance:g}); {targets}: {verdict}",
            fair,
        )


def _shown(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


def _or_infinity(loss: float | None) -> float:
    return math.inf if loss is None else loss


def measure(family: Family, runs: list[Run], course: Course, options: Any, add: Any) -> None:
    """Report a family's state before training, then the result of each of its runs."""
    batches, held_out = course.batches(family)
    family.start(runs[0][0], options.seed)
    targets = [sum(batch.n_targets for batch in side) for side in (batches, held_out)]
    add(Start(runs[0][0].family, evaluate(family, held_out), *targets))
    for method, rate in runs:
        begin = time.perf_counter()
        parameters = family.start(method, options.seed)
        train(family, parameters, replace(method.optim, lr=rate, batch_size=options.batch), batches)
        loss = evaluate(family, held_out)
        seconds = round(time.perf_counter() - begin, 2)
        trained = sum(parameter.numel() for parameter in parameters)
        add(Row(method.name, rate, trained, loss if math.isfinite(loss) else None, seconds))


def chosen_runs(names: list[str] | None, subset: str) -> list[Run]:
    """Return the runs that were asked for.

    Raises:
        UserError: a name that no method has, or nothing to run.
    """
    methods = all_methods()
    for name in names or []:
        if name not in methods:
            hint = nearest(name, list(methods)) or f"; expected {', '.join(methods)}"
            raise UserError(f"--methods: no method '{name}'{hint}")
    wanted = [methods[name] for name in names or methods]
    if subset == "all":
        return [(method, rate) for method in wanted for rate in method.rates]
    runs = [(method, method.quick) for method in wanted if method.quick is not None]
    if not runs:
        raise UserError("--methods names no method of the quick subset; leave out --subset quick")
    return runs


def compare(options: Any) -> int:
    """Run the comparison; the status is 1 if it was not fair."""
    runs = chosen_runs(options.methods, options.subset)
    device, dtype, base = choose_device(options.device), DTYPES[options.dtype], Path(options.base)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    course = read_course(options, device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    about = {name: options[name] for name in ("held_out", "batch", "seed", "dtype")}
    about |= {"data": Path(options.data).name, "base": base.name, "steps": course.n_steps}
    report = Report(about | {"device": where, "torch": torch.__version__})
    for name in dict.fromkeys(method.family for method, _ in runs):
        family = (
            Ours(base, device, dtype) if name == "ours" else Peft(name, base, device, dtype, options.seed)
        )
        mine = [(method, rate) for method, rate in runs if method.family == name]
        measure(family, mine, course, options, lambda result: report.add(result, len(runs), options.json))
        del family
        gc.collect()  # frees the device for the next family's base
    check, fair = report.fairness(SAME_BASE[options.dtype])
    print(report.table(), "", *report.verdicts(), check, sep="\n")
    return 0 if fair else 1
