"""The command line of ``scripts/generate.py``; torch comes in after parsing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, get_args, get_type_hints

from lit_adapter.command import command_parser
from lit_adapter.errors import UserError, counted
from lit_adapter.generation.settings import Sampling
from lit_adapter.progress import count_progress

if TYPE_CHECKING:
    import torch

    from lit_adapter.generation.adapted import AdaptedLlama
    from lit_adapter.generation.prompt_file import Prompt

COLUMN_WIDTH = 48
"""Narrower columns make long answers hard to read; then they stand one under the other."""
BATCH_SIZE = 16


def parser() -> Any:
    """Return the parser of ``scripts/generate.py``."""
    options = command_parser("scripts/generate.py", "Prompt a base with its adapter, or a plain base.")
    options.add_argument("--adapter", type=str, metavar="FILE", help="adapter.safetensors of a run")
    options.add_argument("--base", type=str, metavar="FOLDER", help="by default the base the adapter names")
    options.add_argument("--prompt", type=str, metavar="TEXT", help="the instruction; else standard input")
    options.add_argument("--input", type=str, metavar="TEXT", help="what the instruction works on")
    options.add_argument("--prompts", type=str, metavar="FILE", help="JSONL of instruction and input")
    options.add_argument("--output", type=str, metavar="FILE", help="JSONL for the answers of --prompts")
    options.add_argument("--batch_size", type=int, help=f"of --prompts answered together ({BATCH_SIZE})")
    options.add_argument("--overwrite", action="store_true", help="replace --output")
    options.add_argument(
        "--no-adapter", action="store_true", help="the plain base, with the adapter's template"
    )
    options.add_argument("--compare", action="store_true", help="plain base and adapter side by side")
    options.add_argument(
        "--template", type=str, help="of a plain base: alpaca (default), chat, a text or file"
    )
    options.add_argument("--device", type=str, help="cpu or cuda; by default CUDA where there is one")
    options.add_argument("--dtype", type=str, help="float32, bfloat16 or float16; by default the faster one")
    _add_sampling(options)
    return options


def _add_sampling(options: Any) -> None:
    """Add the fields of `Sampling`, with their defaults and the texts below them as help."""
    from docstring_parser import parse_from_object

    described = {item.arg_name: item.description for item in parse_from_object(Sampling).params}
    types = get_type_hints(Sampling)
    defaults = asdict(Sampling())
    for field in fields(Sampling):
        several = get_args(types[field.name])
        more = {"nargs": "+", "metavar": "ID" if several[0] is int else "TEXT"} if several else {}
        options.add_argument(
            f"--{field.name}",
            type=several[0] if several else types[field.name],
            default=list(defaults[field.name]) if several else defaults[field.name],
            help=described[field.name],
            **more,
        )


def answer(args: Any, out: TextIO) -> int:
    """Answer what the parsed command line asks, on ``out`` or into its output file.

    Raises:
        UserError: options that contradict each other, or anything that loading and generating refuse.
    """
    _check(args)
    sampling = Sampling(**{field.name: _frozen(args[field.name]) for field in fields(Sampling)})
    if args.prompts is not None:
        return _answer_file(args, sampling, out)
    task = (_instruction(args), args.input or "")
    model = _load(args)
    if args.compare:
        _compare(model, task, sampling, out)
    else:
        _stream(model, task, sampling, out)
    return 0


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(args: Any) -> None:
    """Refuse options that would have no effect, or two that exclude each other."""
    if args.adapter is None and args.base is None:
        raise UserError("give --adapter FILE, or --base FOLDER for a plain base")
    excluded = [
        (args.prompts is not None, "--prompts", ("prompt", "input", "compare")),
        (args.prompts is None, "without --prompts", ("output", "batch_size", "overwrite")),
        (args.adapter is None, "without --adapter", ("no_adapter", "compare")),
        (args.adapter is not None, "--adapter, which brings its template", ("template",)),
        (args.no_adapter, "--no-adapter", ("compare",)),
    ]
    for applies, reason, names in excluded:
        given = next((name for name in names if args[name] not in (None, False)), None)
        if applies and given is not None:
            option = "--no-adapter" if given == "no_adapter" else f"--{given}"
            joint = reason if reason.startswith("without") else f"together with {reason}"
            raise UserError(f"{option} {joint} has no meaning; leave one of them out or see --help")
    if args.prompts is not None and args.output is None:
        raise UserError("--prompts needs --output FILE for the answers")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}; expected 1 or more")


def _instruction(args: Any) -> str:
    """Return the prompt, or all of standard input less the line break at its end."""
    if args.prompt is not None:
        text, source = args.prompt, "--prompt"
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
        raise UserError(f"{source} is empty; write what is to be done")
    return text


def _load(args: Any, dtype: str | torch.dtype | None = None) -> AdaptedLlama:
    """Load what the command line names, in ``dtype`` if it leaves that open; None lets `load` choose."""
    from lit_adapter.generation.adapted import load

    if args.dtype not in (None, "auto"):
        dtype = args.dtype
    model = load(args.adapter, args.base, device=args.device, dtype=dtype, template=args.template)
    return model.base if args.no_adapter else model


def _stream(model: AdaptedLlama, task: tuple[str, str], sampling: Sampling, out: TextIO) -> None:
    """Write an answer as it comes; a reader that has gone away ends it."""
    for piece in model.stream(*task, **asdict(sampling)):
        out.write(piece)
        out.flush()
    out.write("\n")
    out.flush()


def _compare(model: AdaptedLlama, task: tuple[str, str], sampling: Sampling, out: TextIO) -> None:
    from rich.console import Console

    console = Console(file=out)
    sides = (("plain base", model.base), ("with adapter", model))
    if console.is_terminal and console.width >= 2 * COLUMN_WIDTH:
        _print_table(task, sampling, console, sides)
        return
    for number, (title, side) in enumerate(sides):
        out.write("\n" * bool(number) + f"--- {title} ---\n")
        _stream(side, task, sampling, out)


def _print_table(
    task: tuple[str, str], sampling: Sampling, console: Any, sides: Sequence[tuple[str, AdaptedLlama]]
) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    answers = []
    for title, side in sides:
        table.add_column(title, ratio=1)
        # As Text: square brackets in an answer are no markup.
        answers.append(Text(side.generate(*task, **asdict(sampling))))
    table.add_row(*answers)
    console.print(table)


def _answer_file(args: Any, sampling: Sampling, out: TextIO) -> int:
    """Answer a file of prompts into another."""
    import torch

    from lit_adapter.device import choose_device, choose_dtype
    from lit_adapter.files import refuse_input
    from lit_adapter.generation.prompt_file import (
        BATCHES_PER_GROUP,
        Answers,
        check_target,
        earlier_dtype,
        read_prompts,
    )

    path, target = Path(args.prompts), Path(args.output)
    prompts = read_prompts(path)
    if target.exists() and target.samefile(path):
        raise UserError(f"{target}: --output is the file of --prompts; choose another")
    check_target(target, overwrite=args.overwrite)
    refuse_input(target, [_base_folder(args), *([Path(args.adapter)] if args.adapter else [])], "--output")
    device, batch_size = choose_device(args.device), args.batch_size or BATCH_SIZE
    dtype: Any = earlier_dtype(target, prompts, device.type)
    if dtype is None and min(batch_size, len(prompts)) > 1:  # a matter of products then, not of memory
        dtype = choose_dtype(args.dtype, device)
    model = _load(args, dtype)
    _check_prompts(model, prompts, sampling)
    identity, group = _identity(args, model, sampling), BATCHES_PER_GROUP * batch_size
    answers = Answers(target, prompts, identity, group=group, overwrite=args.overwrite)
    with count_progress("answering", len(prompts), answers.n_done) as finished:

        def answer_group(group: Sequence[Prompt]) -> list[str]:
            tasks = [(prompt.instruction, prompt.input) for prompt in group]
            try:
                return model.generate_batch(
                    tasks, batch_size=batch_size, finished=finished, **asdict(sampling)
                )
            except torch.OutOfMemoryError:
                raise UserError(
                    f"out of GPU memory with --batch_size {batch_size}; run again with a smaller one, "
                    "finished answers are kept"
                ) from None

        answers.run(answer_group)
    out.write(f"wrote {target} ({counted(len(prompts), 'answer')})\n")
    return 0


def _check_prompts(model: AdaptedLlama, prompts: Sequence[Prompt], sampling: Sampling) -> None:
    """Refuse a prompt or stop id that does not fit before hours went into the others."""
    from lit_adapter.generation.request import check_prompt, check_stop_ids

    check_stop_ids(model.model.config, sampling)
    for prompt in prompts:
        try:
            ids = model.template.encode_prompt(model.tokenizer, prompt.instruction, prompt.input)
            check_prompt(model.model.config, ids, sampling)
        except UserError as error:
            raise UserError(f"{prompt.origin}: {error}") from None


def _identity(args: Any, model: AdaptedLlama, sampling: Sampling) -> dict[str, Any]:
    """Return all that answers depend on beside the prompts; paths and the batch size are left out."""
    from lit_adapter.files import file_sha256
    from lit_adapter.weights.adapter_file import base_identity

    base = base_identity(_base_folder(args))
    weight = model.model.embed_tokens.weight
    return {
        "sampling": asdict(sampling),
        "adapter": file_sha256(Path(args.adapter)) if args.adapter and not args.no_adapter else None,
        "base": [base.weights, base.tokenizer],
        "template": model.template.to_dict(),
        "dtype": str(weight.dtype),
        "device": weight.device.type,
    }


def _base_folder(args: Any) -> Path:
    """Return the folder of --base, or of the base that the adapter names."""
    from lit_adapter.weights.adapter_file import read_adapter
    from lit_adapter.weights.base_folder import find_base

    return Path(args.base) if args.base else find_base(read_adapter(Path(args.adapter))[0].base.name)
