from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_adapter.cli.command import check_least, command_parser, parse, shown
from lit_adapter.cli.main import COMMANDS
from lit_adapter.config import Columns
from lit_adapter.errors import UserError
from lit_adapter.evaluation.settings import Evaluation
from lit_adapter.streams import output_is_no_result, say
from lit_adapter.weights.adapter_search import find_adapter

DATA = "held-out records: a JSON, JSONL, CSV, TSV or Parquet file, as for training"
METRICS = (
    "exact, normalised, contains, numeric, json_exact, json_valid, json_fields, label, rouge_l, chrf or "
    "module:function; by default those that fit the outputs"
)
TASKS = "tasks of lm-evaluation-harness: names, or YAML files of your own, as a,b,c"


def main(argv: Sequence[str], program: str | None = None) -> int:
    """Parse, evaluate, and print the scores."""
    settings = _settings(_parse(argv, program))
    output_is_no_result()
    from lit_adapter.evaluation.evaluate import evaluate
    from lit_adapter.evaluation.terminal import show

    found = evaluate(settings, say)
    show(found)
    answers = ", answers.jsonl" if settings.data else ""
    say(f"wrote {shown(settings.out)}: report.html, report.md, results.json{answers}")
    return 0


def _parse(argv: Sequence[str], program: str | None) -> Any:
    parser = command_parser(COMMANDS["evaluate"], program)
    add = parser.add_argument
    add(
        "--adapter",
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN",
        help="run folders or adapter files; may be repeated; the plain base is always added",
    )
    add("--base", metavar="FOLDER", help="base folder; by default the one that the first adapter names")
    add(
        "--out",
        required=True,
        metavar="FOLDER",
        help="folder for the report; the same command continues an evaluation there",
    )
    add("--data", metavar="FILE", help=DATA)
    for name in ("instruction", "input", "output"):
        add(f"--columns.{name}", metavar="NAME", default=name, help=f"column of --data with the {name}")
    add("--metrics", metavar="A,B,...", help=METRICS)
    add(
        "--max_new_tokens",
        type=int | None,
        help="longest answer, in tokens; by default about 1.5 times the longest output",
    )
    add("--stop_early", action="store_true", help="end an answer as soon as it can no longer be right")
    add("--plain", metavar="FILE", help="a plain text, whose perplexity shows what was forgotten")
    add("--tasks", metavar="A,B,...", help=TASKS)
    add("--few_shot", type=int | None, help="examples before each question; by default as each task says")
    add("--chat_template", action="store_true", help="put tasks into the base's chat template")
    add("--limit", type=int | None, help="use at most this many records, and questions of each task")
    add("--batch_size", type=int, default=16, help="how many answers are generated together")
    add("--template", help="template of a plain base: alpaca (default), chat, a text or file")
    add("--device", help="cpu or cuda; by default CUDA where there is one")
    add("--dtype", help="float32, bfloat16 or float16; by default the faster one")
    add("--overwrite", action="store_true", help="discard the answers of another evaluation in --out")
    return parse(parser, argv)


def _settings(options: Any) -> Evaluation:
    """Return the settings of the command line.

    Raises:
        UserError: no model to evaluate, or nothing to evaluate on; a number out of range.
    """
    if not options.adapter and options.base is None:
        raise UserError("give --adapter FILE, or --base FOLDER for a plain base")
    if not (options.data or options.plain or options.tasks):
        raise UserError("nothing to evaluate on: give --data FILE, --plain FILE or --tasks A,B")
    if options.adapter and options.template:
        raise UserError(
            "--template together with --adapter, which brings its own, has no meaning; leave it out"
        )
    check_least(options, 1, "batch_size", "max_new_tokens", "limit")
    check_least(options, 0, "few_shot")
    for needed, names in (
        ("data", ("metrics", "max_new_tokens", "stop_early")),
        ("tasks", ("few_shot", "chat_template")),
    ):
        given = next((name for name in names if not (options[name] is None or options[name] is False)), None)
        if given is not None and not options[needed]:
            raise UserError(f"--{given} without --{needed} has no meaning; leave it out")
    return Evaluation(
        out=Path(options.out),
        adapters=tuple(find_adapter(adapter) for adapter in options.adapter),
        base=_path(options.base),
        data=_path(options.data),
        columns=Columns(**options.columns),
        metrics=_names(options.metrics),
        tasks=_names(options.tasks),
        plain=_path(options.plain),
        **{
            name: options[name]
            for name in (
                *("limit", "max_new_tokens", "stop_early", "few_shot", "chat_template"),
                *("template", "device", "dtype", "batch_size", "overwrite"),
            )
        },
    )


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)


def _names(value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (value or "").split(",") if name.strip())
