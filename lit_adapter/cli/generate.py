from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lit_adapter.cli.command import add_sampling, check_least, command_parser, parse, sampling_of
from lit_adapter.cli.main import COMMANDS
from lit_adapter.config import Columns
from lit_adapter.errors import UserError, counted, shorten
from lit_adapter.generation.settings import Sampling, check_choices
from lit_adapter.streams import say

BATCH_SIZE = 16
PROMPTS = (
    "a JSON, JSONL, CSV, TSV or Parquet file of tasks or conversations, as for training; a .txt file with an "
    "instruction on each line; or - for standard input: JSONL, a JSON array, CSV whose first line "
    "names the instruction column, or plain text"
)
COLUMNS = {
    "instruction": "column of --prompts with the instruction",
    "input": "column with what the instruction works on, which the file may lack",
    "output": "column for the answer; an existing one of this name is replaced, all others are kept",
}
CHOICES = (
    "give the probabilities of these answers instead of generating one; quote an answer that has a comma: "
    'a,"b, c"'
)


def main(argv: Sequence[str], program: str | None = None) -> int:
    """Parse and answer, on standard output or into the file of ``--output``."""
    options = _parse(argv, program)
    sampling = sampling_of(options)
    columns = Columns(**options.columns)
    choices = _choices(options, sampling)
    task = (_instruction(options), options.input or "") if options.prompts is None else None
    from lit_adapter.generation import answering
    from lit_adapter.weights.adapter_search import find_adapter

    if options.adapter is not None:
        options.adapter = str(find_adapter(options.adapter))
    chosen = {field.name: options[field.name] for field in fields(answering.ModelChoice)}
    choice = answering.ModelChoice(**chosen)
    if task is None:
        target = Path(options.output)
        number = answering.answer_file(
            choice,
            Path(options.prompts),
            target,
            sampling,
            options.batch_size,
            columns=columns,
            choices=choices,
            overwrite=options.overwrite,
        )
        say(f"wrote {target} ({counted(number, 'answer')})")
        return 0
    if choices:
        answering.choose(choice.load(), task, choices, sys.stdout)
        return 0
    write = answering.compare if options.compare else answering.stream
    write(choice.load(), task, sampling, sys.stdout)
    return 0


def _parse(argv: Sequence[str], program: str | None) -> Any:
    parser = command_parser(COMMANDS["generate"], program)
    parser.add_argument("--adapter", metavar="FILE", help="adapter.safetensors of a run, or the run's folder")
    parser.add_argument(
        "--base", metavar="FOLDER", help="base folder; by default the one that the adapter names"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="the instruction; by default standard input")
    parser.add_argument("--input", metavar="TEXT", help="what the instruction works on")
    parser.add_argument("--prompts", metavar="FILE", help=PROMPTS)
    parser.add_argument("--output", metavar="FILE", help="JSONL: the rows of --prompts with their answers")
    for name, what in COLUMNS.items():
        parser.add_argument(f"--columns.{name}", metavar="NAME", default=name, help=what)
    parser.add_argument(
        "--batch_size", type=int, default=BATCH_SIZE, help="how many of --prompts are answered together"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    parser.add_argument(
        "--no-adapter", action="store_true", help="use the plain base, with the adapter's template"
    )
    parser.add_argument(
        "--compare", action="store_true", help="show plain base and adapter side by side, for one prompt"
    )
    parser.add_argument("--choices", metavar="A,B,...", help=CHOICES)
    parser.add_argument("--template", help="template of a plain base: alpaca (default), chat, a text or file")
    parser.add_argument("--device", help="cpu or cuda; by default CUDA where there is one")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; by default the faster one")
    parser.add_argument(
        "--verify", action="store_true", help="compare every byte of the base with its checksums"
    )
    add_sampling(parser)
    options = parse(parser, argv)
    _check(options)
    return options


def _check(options: Any) -> None:
    """Refuse options that would have no effect, or that exclude each other."""
    if options.adapter is None and options.base is None:
        raise UserError("give --adapter FILE, or --base FOLDER for a plain base")
    excluded = [
        (options.prompts is not None, "--prompts", ("prompt", "input", "compare")),
        (options.prompts is None, "without --prompts", ("output", "batch_size", "overwrite")),
        (options.adapter is None, "without --adapter", ("no_adapter", "compare")),
        (options.adapter is not None, "--adapter, which brings its template,", ("template",)),
        (options.no_adapter, "--no-adapter", ("compare",)),
        (options.choices is not None, "--choices", ("compare",)),
    ]
    unset = (None, False, BATCH_SIZE)
    for applies, reason, names in excluded:
        given = next((name for name in names if options[name] not in unset), None)
        if applies and given is not None:
            option = "--no-adapter" if given == "no_adapter" else f"--{given}"
            if reason.startswith("without"):
                needed = f"{reason.removeprefix('without ')} FILE"
                raise UserError(f"{option} {reason} has no meaning; add {needed}, or leave {option} out")
            raise UserError(f"{option} together with {reason} has no meaning; leave one of them out")
    other = next((name for name in COLUMNS if options.columns[name] != name), None)
    if options.prompts is None and other is not None:
        raise UserError(f"--columns.{other} without --prompts has no meaning; add --prompts FILE")
    if options.prompts is not None and options.output is None:
        raise UserError("--prompts needs --output FILE for the answers")
    if options.output == "-":  # standard output in other programs
        raise UserError("--output is -; answers go to a file, so name one, such as answers.jsonl")
    check_least(options, 1, "batch_size")


def _choices(options: Any, sampling: Sampling) -> list[str]:
    """Return the answers of --choices, or none."""
    if options.choices is None:
        return []
    default = Sampling()
    changed = [name for name, value in asdict(sampling).items() if value != getattr(default, name)]
    if changed:
        raise UserError(f"--{changed[0]} together with --choices has no meaning: no answer is generated")
    try:
        (choices,) = csv.reader([options.choices], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError):
        raise UserError(f"--choices is {shorten(options.choices)}; expected answers as a,b,c") from None
    choices = [choice.strip() for choice in choices]
    check_choices(choices)
    return choices


def _instruction(options: Any) -> str:
    """Return the prompt, or all of standard input without the line break at its end."""
    if options.prompt is not None:
        text, source = options.prompt, "--prompt"
    elif sys.stdin is None or sys.stdin.isatty():
        raise UserError("nothing to answer: give --prompt TEXT, --prompts FILE, or text on standard input")
    else:
        content = sys.stdin.buffer.read()
        try:
            text, source = content.decode("utf-8-sig"), "standard input"
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not UTF-8 text (byte {error.start})") from None
        text = text.removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise UserError(f"{source} is empty; write an instruction")
    return text
