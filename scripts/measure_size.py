"""What data of a given size costs before the first step and per step: time, processor time and memory.

    python scripts/measure_size.py --base checkpoints/smollm2-135m --data alpaca_libre.json --json size.json

The records are those of the file, repeated with a number after each instruction. Every measurement is a
process of its own; the first one of a size encodes, the second one has the cache.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path

from lit_adapter.cli.command import check_least, command_parser, parse, run
from lit_adapter.files.write import write_json
from lit_adapter.streams import say

HEADER = (
    "| records | cache | ready, s | processor time, s | own memory, MB | with mapped files, MB "
    "| a worker, MB | a step's rows, ms | resume in epoch 4, ms |\n"
    "|---:|---|---:|---:|---:|---:|---:|---:|---:|"
)
STEPS = 20


def main(argv: Sequence[str]) -> int:
    """Measure every size."""
    parser = command_parser("Measure what data of some size costs before the first step.")
    parser.add_argument(
        "--base", type=str, default="checkpoints/smollm2-135m", help="whose tokenizer is used"
    )
    parser.add_argument("--data", type=str, required=True, help="a JSON file of records, which are repeated")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--json", type=str, required=True, help="where the rows go")
    parser.add_argument("--folder", type=str, help="where files and caches are made (default: /tmp)")
    options = parse(parser, argv)
    check_least(options, 100, "sizes")
    rows = []
    say(HEADER)
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            path = Path(scratch) / "data.jsonl"
            write_records(Path(options.data), path, size)
            os.environ["LIT_ADAPTER_CACHE"] = scratch
            for cache in ("none", "full"):
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    row = {"records": size, "cache": cache, **pool.submit(ready, options.base, path).result()}
                rows.append(row)
                write_json(Path(options.json), rows)
                say(
                    "| "
                    + " | ".join(f"{v:,.1f}" if isinstance(v, float) else str(v) for v in row.values())
                    + " |"
                )
    return 0


def write_records(source: Path, path: Path, size: int) -> None:
    """Write ``size`` records as JSON Lines."""
    given = json.loads(source.read_text(encoding="utf-8"))
    with path.open("w", encoding="utf-8") as file:
        for lap, row in islice(((lap, row) for lap in count() for row in given), size):
            file.write(
                json.dumps(row | {"instruction": f"{row['instruction']} ({lap})"}, ensure_ascii=False) + "\n"
            )


def ready(base: str, path: Path) -> dict[str, float]:
    """Read, encode and pack the first steps; return what it took."""
    from lit_adapter.config import DataConfig
    from lit_adapter.data.module import AlpacaDataModule
    from lit_adapter.data.summary import describe
    from lit_adapter.text.load import load_tokenizer
    from lit_adapter.text.template import resolve_template

    tokenizer = load_tokenizer(Path(base))
    own, workers = [memory("RssAnon")], [0.0]
    threading.Thread(target=watch_memory, args=(own, workers), daemon=True).start()
    start, before = time.perf_counter(), sum(os.times()[:4])
    data = AlpacaDataModule(
        DataConfig(train=str(path)),
        tokenizer=tokenizer,
        template=resolve_template("alpaca", tokenizer),
        tokenizer_key="measured",
        batch_size=64,
        row_tokens=2048,
        say=lambda line: None,
    ).read()
    describe(data, color=False)
    steps = data.training_steps()
    steps[0]
    seconds, processor = time.perf_counter() - start, sum(os.times()[:4]) - before
    start = time.perf_counter()
    for step in range(1, STEPS + 1):
        steps[step]
    middle = time.perf_counter()
    data.training_steps()[3 * steps.steps_per_epoch + 1]
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "own_mb": own[0],
        "with_files_mb": memory("VmHWM"),
        "worker_mb": workers[0],
        "step_ms": (middle - start) / STEPS * 1e3,
        "resume_ms": (time.perf_counter() - middle) * 1e3,
    }


def watch_memory(own: list[float], workers: list[float]) -> None:
    """Note the most memory of this process, and of one of its children, without files, ten times a second."""
    while True:
        own[0] = max(own[0], memory("RssAnon"))
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError, StopIteration):  # one that has just ended
                for child in (task / "children").read_text().split():
                    workers[0] = max(workers[0], memory("RssAnon", child))
        time.sleep(0.1)


def memory(name: str, process: str = "self") -> float:
    """Return a number of ``/proc/PROCESS/status``, in MB."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(name))


if __name__ == "__main__":
    run(main)
