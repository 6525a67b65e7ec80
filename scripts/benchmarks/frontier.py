"""What each kind of adapter reaches at each size, every one at the best of its learning rates.

All runs are the product's own (`finetune`), as users start them. A method's rates begin as a grid of five,
and the grid grows on the side where its best rate lies until that one is no longer at the edge. The best rate
is then run with two more seeds, which alone are asked for answers. Results are appended to a file, so that a
stopped measurement goes on.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.courses import SEED, Course
from lit_adapter.errors import UserError

MIDDLE, RATIO = 2e-2, 1.5
"""Of the learning rates tried: ``optim.lr``, of which LoRA and norms take their shares."""
FIRST = (0, -1, 1, -2, 2)
"""Powers of the ratio that every method is trained with."""
MOST_RATES = 11
ANSWER_TOKENS = 64
SEEDS = (SEED, SEED + 1, SEED + 2)


@dataclass(frozen=True)
class Method:
    """An adapter of one size."""

    line: str
    """The kind of adapter: a line of the plot."""
    options: tuple[str, ...]
    """Of a run."""


@dataclass(frozen=True)
class Result:
    """One run."""

    course: str
    line: str
    options: tuple[str, ...]
    power: int
    """The learning rate is `MIDDLE` times `RATIO` to this power."""
    seed: int
    parameters: int
    loss: float
    """Held-out loss at the end, nats per target."""
    exact: float | None
    """Share of exact answers; None where answers are not either right or wrong, or were not asked for."""
    seconds: float
    plain: float | None = None
    """Loss on the course's plain text, nats per token; None where it has none, or in the search."""

    @property
    def lr(self) -> float:
        """The peak learning rate."""
        return rate(self.power)


def rate(power: int) -> float:
    """Return a learning rate to two digits."""
    return float(f"{MIDDLE * RATIO**power:.2g}")


PAPER = ("--adapter.gate=tanh", "--adapter.prefix_query=rotated", "--adapter.norms=false")
"""The form of the paper's gates and queries, as it is without settings that follow."""
TOKEN, UNROTATED = "--adapter.gate=token", "--adapter.prefix_query=unrotated"
NORMS = ("--adapter.norms=true", "--optim.lr_scale_norms=0.1")
GENTLE_NORMS = ("--adapter.norms=true", "--optim.lr_scale_norms=0.05")


def _prefix(K: int, *more: str) -> tuple[str, ...]:
    return (*PAPER, f"--adapter.prompt_length={K}", *more)


def _lora(rank: int, *on: str, K: int = 0, more: tuple[str, ...] = ()) -> tuple[str, ...]:
    return (
        *PAPER,
        f"--adapter.prompt_length={K}",
        f"--adapter.lora.rank={rank}",
        f"--adapter.lora.on=[{', '.join(on)}]",
        *more,
    )


def methods() -> list[Method]:
    """Return every method at the sizes that it can have on SmolLM2-135M, the smallest first."""
    lines: dict[str, list[tuple[str, ...]]] = {
        "prefix, tanh gates": [_prefix(K) for K in (3, 10, 17, 35, 139)],
        "prefix, tanh gates, norms": [_prefix(8, *GENTLE_NORMS)],
        "prefix, gates by token": [_prefix(K, TOKEN) for K in (3, 10, 17, 34, 137)],
        "prefix, gates by token, norms": [_prefix(K, TOKEN, *NORMS) for K in (1, 8, 15, 32, 135)],
        "prefix, gates by token, norms, upper layers": [
            _prefix(K, TOKEN, *NORMS, f"--adapter.layers={L}") for L, K in ((24, 10), (20, 13), (16, 16))
        ],
        "prefix, gates by token, norms at 0.05": [_prefix(8, TOKEN, *GENTLE_NORMS)],
        "prefix, gates by token, unrotated": [_prefix(10, TOKEN, UNROTATED)],
        "prefix, gates by token, unrotated, norms": [_prefix(8, TOKEN, UNROTATED, *NORMS)],
        "prefix, gates by token, unrotated, norms at 0.05": [_prefix(8, TOKEN, UNROTATED, *GENTLE_NORMS)],
        "LoRA on q, v": [_lora(rank, "q_proj", "v_proj") for rank in (1, 3, 5, 10, 42)],
        "LoRA on attention": [_lora(rank, "attention") for rank in (1, 2, 5, 21)],
        "LoRA on the MLP": [_lora(rank, "mlp") for rank in (1, 3, 13)],
        "LoRA on all": [_lora(rank, "all") for rank in (1, 2, 8)],
        "LoRA on attention, norms": [_lora(rank, "attention", more=GENTLE_NORMS) for rank in (1, 2, 5)],
        "LoRA on the MLP, norms": [_lora(rank, "mlp", more=GENTLE_NORMS) for rank in (1, 3)],
        "LoRA on all, norms": [_lora(rank, "all", more=GENTLE_NORMS) for rank in (1, 2)],
        "prefix, norms and LoRA on attention": [
            _lora(rank, "attention", K=K, more=(TOKEN, *GENTLE_NORMS)) for rank, K in ((1, 1), (2, 2), (4, 6))
        ],
        "prefix, norms and LoRA on v, o": [
            _lora(1, "v_proj", "o_proj", K=4, more=(TOKEN, UNROTATED, *GENTLE_NORMS))
        ],
        "prefix and LoRA on down": [_lora(1, "down_proj", K=6, more=(TOKEN, UNROTATED))],
        "prefix and LoRA on the MLP": [
            _lora(rank, "mlp", K=K, more=(TOKEN, UNROTATED)) for rank, K in ((1, 6), (3, 2), (12, 10))
        ],
        "prefix and LoRA on all": [_lora(1, "all", K=17, more=(TOKEN, UNROTATED))],
        "prefix and LoRA on v, o and the MLP": [
            _lora(rank, "v_proj", "o_proj", "mlp", K=K, more=(TOKEN,)) for rank, K in ((1, 3), (2, 6))
        ],
        "prefix and LoRA on all but k": [
            _lora(rank, "q_proj", "v_proj", "o_proj", "mlp", K=rank, more=(TOKEN,)) for rank in (1, 2)
        ],
    }  # fmt: skip
    return [Method(line, options) for line, sizes in lines.items() for options in sizes]


def next_runs(done: Sequence[Result]) -> list[tuple[int, int]]:
    """Return the powers and seeds of a method's next runs on a course, which do not depend on each other.

    Args:
        done: the method's results on that course.
    """
    searched = {result.power: result.loss for result in done if result.seed == SEEDS[0]}
    missing = [(power, SEEDS[0]) for power in FIRST if power not in searched]
    if missing:
        return missing
    best = min(searched, key=searched.__getitem__)
    if len(searched) < MOST_RATES and best in (min(searched), max(searched)):
        return [(best + (1 if best == max(searched) else -1), SEEDS[0])]
    seen = {result.seed for result in done if result.power == best}
    return [(best, seed) for seed in SEEDS if seed not in seen]


@dataclass(frozen=True)
class Task:
    """A run to take."""

    base: str
    course: Course
    method: Method
    power: int
    seed: int


def take(task: Task) -> Result:
    """Train and score an adapter, in a process of the pool."""
    import lit_adapter
    from lit_adapter.cli.finetune import parse_finetune
    from lit_adapter.training.finetune import finetune

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):
        out = Path(scratch) / "run"
        quiet = ("--trainer.val_every=9999999", "--trainer.save_every=9999999", "--trainer.samples=0")
        own = (f"--base={task.base}", f"--out={out}", f"--optim.lr={rate(task.power)}")
        argv = [*own, "--trainer.progress=none", *quiet, *task.course.options, *task.method.options]
        finetune(parse_finetune([*argv, f"--seed={task.seed}"]).config, say=lambda line: None)
        record = json.loads((out / "run.json").read_text())
        model = lit_adapter.load(adapter=out / "adapter.safetensors", base=task.base)
        searched = task.seed == SEEDS[0]
        exact = None if searched else share_of_exact_answers(model, task.course)
        plain = None if searched else loss_on_plain_text(model, task.course)
    return Result(
        course=task.course.name,
        line=task.method.line,
        options=task.method.options,
        power=task.power,
        seed=task.seed,
        parameters=record["adapter"]["parameters"],
        loss=record["loss"]["held_out"][-1]["loss"] or float("inf"),
        exact=exact,
        plain=plain,
        seconds=round(time.perf_counter() - start, 1),
    )


def share_of_exact_answers(model: Any, course: Course) -> float | None:
    """Answer a course's held-out records greedily; return None where answers cannot be right or wrong."""
    if course.is_right is None:
        return None
    records = json.loads(course.held_out.read_text())
    prompts = [(record["instruction"], record.get("input", "")) for record in records]
    answers = model.generate_batch(prompts, batch_size=50, max_new_tokens=ANSWER_TOKENS)
    outputs = [record["output"] for record in records]
    return sum(map(course.is_right, answers, outputs)) / len(records)


def loss_on_plain_text(model: Any, course: Course) -> float | None:
    """Return the loss on a course's plain text, nats per token; None where it has none."""
    from lit_adapter.evaluation.windows import plain_text

    return None if course.plain is None else math.log(plain_text(model, course.plain, "").perplexity)


def _own_device(devices: Any) -> None:
    """Give a process of the pool its device, before it imports torch."""
    os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()


def read_results(path: Path) -> list[Result]:
    """Return the results of a file; none if it does not exist yet.

    Raises:
        UserError: a line that is no result.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            values = json.loads(line)
            found.append(Result(**values | {"options": tuple(values["options"])}))
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}:{number}: not a result of this script; remove the line") from None
    return found


def measure(
    base: str,
    courses: Sequence[Course],
    chosen: Sequence[Method],
    path: Path,
    devices: Sequence[str],
    stop_at: float,
) -> list[Result]:
    """Take every run that the file of results lacks, several at once, until a time.

    Args:
        base: folder of the converted base.
        courses: what is learned.
        chosen: what learns it.
        path: JSON lines, one a run; appended to.
        devices: for each process its ``CUDA_VISIBLE_DEVICES``.
        stop_at: on `time.monotonic`; no run is begun after it.
    """
    results, context = read_results(path), get_context("spawn")
    queue = context.Queue()
    for device in devices:
        queue.put(device)
    with ProcessPoolExecutor(len(devices), context, _own_device, (queue,)) as pool, path.open("a") as lines:
        running: dict[Future[Result], Task] = {}
        while True:
            for task in _tasks(base, courses, chosen, results, set(running.values())):
                if len(running) == len(devices) or time.monotonic() > stop_at:
                    break
                running[pool.submit(take, task)] = task
            if not running:
                return results
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                results.append(future.result())
                print(json.dumps(asdict(results[-1])), file=lines, flush=True)
                print(_said(results[-1]), file=sys.stderr, flush=True)


def _tasks(
    base: str,
    courses: Sequence[Course],
    chosen: Sequence[Method],
    results: Sequence[Result],
    running: set[Task],
) -> Iterator[Task]:
    """Yield the next runs of every method on every course, but for those that are running."""
    for method in chosen:
        for course in courses:
            runs = next_runs(of_method(results, course.name, method))
            tasks = (Task(base, course, method, *run) for run in runs)
            yield from (task for task in tasks if task not in running)


def of_method(results: Sequence[Result], course: str, method: Method) -> list[Result]:
    """Return the results of a method on a course."""
    return [r for r in results if (r.course, r.line, r.options) == (course, method.line, method.options)]


def _said(result: Result) -> str:
    exact = "" if result.exact is None else f", {result.exact:.1%} exact"
    run = f"{result.parameters:,} parameters, lr {result.lr:g}, seed {result.seed}"
    return f"{result.course}, {result.line}, {run}: {result.loss:.4f}{exact} ({result.seconds:.0f} s)"
