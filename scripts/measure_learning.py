"""Measure what each kind of adapter learns at each size: held-out loss over trained parameters.

    python scripts/measure_learning.py --text RECORDS.json --json frontier.jsonl --plot frontier.svg

Every method is trained at the best of its learning rates, and there with three seeds, on free text, short
tasks with exact answers, the demo, 300 records, and three epochs of free text; see `benchmarks.frontier`. Run
again with the same file, the script continues where it stopped; with nothing left to run it prints and draws
the results in the file.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_adapter.cli.command import check_least, command_parser, parse, run
from lit_adapter.errors import UserError, nearest

COURSES = ("text", "tasks", "demo", "few", "epochs")


def read_options(argv: Sequence[str]) -> Any:
    """Return the command line's options."""
    parser = command_parser("Measure what each kind of adapter learns at each size.")
    parser.add_argument("--json", metavar="FILE", required=True, help="results, a line after every run")
    parser.add_argument("--text", metavar="FILE", help="records for the courses text, few and epochs")
    parser.add_argument("--base", default="checkpoints/smollm2-135m", help="folder of the converted base")
    parser.add_argument(
        "--courses", nargs="+", choices=COURSES, default=list(COURSES), help="what is learned"
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these lines of the plot")
    parser.add_argument("--parameters", type=int, nargs=2, metavar=("LEAST", "MOST"), help="only these sizes")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time on each device")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after this time")
    parser.add_argument("--plot", metavar="FILE", help="draw the results, as SVG or PNG")
    options = parse(parser, argv)
    check_least(options, 1, "processes")
    return options


def main(argv: Sequence[str]) -> int:
    """Take the runs that are missing, then print the tables and draw the plot."""
    options = read_options(argv)
    from benchmarks import frontier
    from benchmarks.courses import write_courses
    from benchmarks.frontier_table import table

    chosen = chosen_methods(options, frontier.methods())
    stop_at = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        courses = write_courses(options.courses, Path(folder), options.text)
        devices = _devices() * options.processes
        results = frontier.measure(options.base, courses, chosen, Path(options.json), devices, stop_at)
    for course in options.courses:
        print(f"## {course}", table(results, course), sep="\n\n", end="\n\n")
    if options.plot:
        from benchmarks.frontier_plot import plot

        plot(results, COURSES, Path(options.plot))
        print(f"wrote {options.plot}", file=sys.stderr)
    return 0


def chosen_methods(options: Any, methods: Sequence[Any]) -> list[Any]:
    """Return the methods that were asked for.

    Raises:
        UserError: a name that no line of the plot has, or no method of these sizes.
    """
    names = list(dict.fromkeys(method.line for method in methods))
    for name in options.methods or []:
        if name not in names:
            raise UserError(f"--methods: no method '{name}'{nearest(name, names)}")
    wanted = [method for method in methods if method.line in (options.methods or names)]
    if options.parameters:
        least, most = options.parameters
        wanted = [m for m in wanted if least <= n_parameters(options.base, m) <= most]
    if not wanted:
        raise UserError(f"--parameters: no chosen method has {least:,} to {most:,} of them on this base")
    return wanted


def n_parameters(base: str, method: Any) -> int:
    """Return how many numbers a method trains on a base."""
    from lit_adapter.cli.finetune import parse_finetune
    from lit_adapter.model.adapter import adapter_shapes
    from lit_adapter.model.layout import n_numbers
    from lit_adapter.weights.base_folder import read_config

    config = parse_finetune(method.options).config.adapter
    return n_numbers(adapter_shapes(config, read_config(Path(base))))


def _devices() -> list[str]:
    """Return the ``CUDA_VISIBLE_DEVICES`` of each device; one empty text for a machine without GPUs."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return visible.split(",")
    return [str(number) for number in range(torch.cuda.device_count())] or [""]


if __name__ == "__main__":
    run(main)
