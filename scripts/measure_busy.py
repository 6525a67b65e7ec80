"""How fast training and generating are beside programs that never wait, compared with running alone.

    python scripts/measure_busy.py --base checkpoints/smollm2-135m --data alpaca_libre.json --json busy.json

Training is the speed that a dry run forecasts, generating the time of a whole command for 100 tokens. Every
command runs as users run it, alternating with the OpenMP library's own spin count. Compare figures only
within a run, on an otherwise idle machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from lit_adapter.cli.command import check_least, command_parser, parse, run
from lit_adapter.files.write import write_json
from lit_adapter.streams import say

ROOT = Path(__file__).parents[1]
WAYS = {"ours": {}, "always spinning": {"GOMP_SPINCOUNT": "300000"}}
"""Environment variables; the number is GNU's default, given so that nothing else decides."""


def main(argv: Sequence[str]) -> int:
    """Measure in turn, and print medians."""
    parser = command_parser("Measure training and generating beside busy programs.")
    parser.add_argument("--base", type=str, default="checkpoints/smollm2-135m")
    parser.add_argument("--data", type=str, required=True, help="a file of records")
    parser.add_argument("--json", type=str, required=True, help="where the rows go")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 1, 2], help="busy programs beside")
    options = parse(parser, argv)
    check_least(options, 1, "repeats")
    rows = []
    for repeat in range(options.repeats):
        for loops in options.loops:
            for way, variables in WAYS.items():
                with busy(loops):
                    speed = tokens_per_second(options.base, options.data, variables)
                    seconds = generating(options.base, variables)
                measured = {"tokens_per_s": speed, "generate_s": seconds}
                rows.append({"round": repeat, "loops": loops, "way": way, **measured})
                write_json(Path(options.json), rows)
    say("| busy programs | | training, tokens/s | 100 tokens, s |\n|---:|---|---:|---:|")
    for loops in options.loops:
        for way in WAYS:
            chosen = [row for row in rows if (row["loops"], row["way"]) == (loops, way)]
            speed, seconds = (median(row[name] for row in chosen) for name in ("tokens_per_s", "generate_s"))
            say(f"| {loops} | {way} | {speed:,.0f} | {seconds:.1f} |")
    return 0


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Run programs that never wait, inside the block."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def tokens_per_second(base: str, data: str, variables: dict[str, str]) -> float:
    """Return the speed that a dry run of the small recipe reports."""
    with tempfile.TemporaryDirectory() as scratch:
        config = str(ROOT / "configs" / "small_gpu.yaml")
        paths = ["--config", config, "--base", base, "--data.train", data, "--out", f"{scratch}/run"]
        said = command("finetune", *paths, "--dry-run", **variables)
    found = re.search(r"s: ([\d,]+) tokens/s", said)
    if found is None:
        raise SystemExit(f"the dry run says no speed:\n{said}")
    return float(found[1].replace(",", ""))


def generating(base: str, variables: dict[str, str]) -> float:
    """Return the seconds of a command that generates 100 tokens."""
    start = time.perf_counter()
    asked = ["--prompt", "Tell a long story.", "--max_new_tokens", "100"]
    command("generate", "--base", base, *asked, **variables)
    return time.perf_counter() - start


def command(name: str, *arguments: str, **variables: str) -> str:
    """Run a command of the package without the user's settings of threads; return its output."""
    unset = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    done = subprocess.run(
        [sys.executable, "-m", "lit_adapter", name, *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return done.stdout


if __name__ == "__main__":
    run(main)
