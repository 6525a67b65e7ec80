"""Measure training or decoding against other libraries, or a server against its engine, taking turns.

    python scripts/benchmark.py train --model 7b --json train.json --markdown train.md
    python scripts/benchmark.py generate --model checkpoints/smollm2-135m --json generate.json
    python scripts/benchmark.py serve --model checkpoints/smollm2-135m --json serve.json

A method that fails gets a row that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_adapter.cli import command
from lit_adapter.cli.command import check_least, command_parser, parse
from lit_adapter.errors import UserError

ONLY_FOR = {
    "train": ("steps", "batch", "row_tokens", "peft_batch"),
    "generate": ("batches", "new_tokens", "prompt_tokens", "first_token_prompt"),
    "serve": ("streams", "new_tokens", "prompt_tokens"),
}
"""What can be measured, and the options that apply to nothing else."""


def read_options(argv: Sequence[str]) -> Any:
    """Return the command line's options.

    Raises:
        UserError: a mistake in it.
    """
    parser = command_parser("Measure training or decoding against other libraries.")
    parser.add_argument("work", choices=list(ONLY_FOR), help="what to measure")
    parser.add_argument(
        "--model",
        required=True,
        help="folder of a converted base, or 7b, llama3-8b or qwen3-8b with random weights",
    )
    parser.add_argument("--data", help="a file of records (default: random tokens of Alpaca's lengths)")
    parser.add_argument("--tokenizer", help="folder of a tokenizer for --data (default: the model's)")
    parser.add_argument(
        "--json", required=True, metavar="FILE", help="write the rows to this file as they come"
    )
    parser.add_argument("--markdown", metavar="FILE", help="write the table to this file too")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="only these; ours-N packs rows of N tokens"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each method")
    parser.add_argument("--steps", type=int, help="optimizer steps in a pass (default: 4; 1 on a CPU)")
    parser.add_argument("--batch", type=int, help="records in an optimizer step (default: 64; 32 on a CPU)")
    parser.add_argument(
        "--row-tokens", nargs="+", type=int, help="longest packed rows (default: 8192 2048; 2048 on a CPU)"
    )
    parser.add_argument("--peft-batch", nargs="+", type=int, help="micro-batch sizes to choose the best from")
    parser.add_argument("--batches", nargs="+", type=int, help="texts decoded together (default: 1 32)")
    parser.add_argument(
        "--streams", type=int, help="answers at a time, each by a different adapter (default: 8)"
    )
    parser.add_argument("--new-tokens", type=int, help="tokens to decode (default: 256; for serve 32)")
    parser.add_argument("--prompt-tokens", type=int, help="prompt length for decoding (default: 64)")
    parser.add_argument(
        "--first-token-prompt",
        type=int,
        help="prompt length for the time to the first token (default: 512; 200 on a CPU)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--base-precision", default="auto", help="dtype of the frozen base (default: auto)")
    parser.add_argument("--seed", type=int, default=1337, help="seed of weights, records and adapters")
    options = parse(parser, argv)
    check_least(options, 1, "repeats", "steps", "batch", "row_tokens", "peft_batch", "batches", "new_tokens")
    check_least(options, 1, "prompt_tokens", "first_token_prompt", "streams")
    check_least(options, 0, "seed")
    for name in sorted({name for names in ONLY_FOR.values() for name in names}):
        works = [work for work, names in ONLY_FOR.items() if name in names]
        if options[name] is not None and options.work not in works:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is for {' and '.join(works)}; leave it out of {options.work}")
    if options.seed >= 2**63:
        raise UserError(f"--seed is {options.seed}; expected less than 2**63")
    if options.data and not options.tokenizer and not (Path(options.model) / "config.json").is_file():
        raise UserError(f"--data needs a tokenizer, and --model {options.model} has none: give --tokenizer")
    return options


def main(argv: Sequence[str]) -> int:
    """Run the comparison; the status is 1 if one of our own methods failed."""
    options = read_options(argv)
    from benchmarks import run

    table, ok = {"train": run.train, "generate": run.generate, "serve": run.serve}[options.work](options)
    print(table)
    return 0 if ok else 1


if __name__ == "__main__":
    command.run(main)
