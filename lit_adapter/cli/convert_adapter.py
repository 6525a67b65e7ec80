from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from lit_adapter.cli.command import command_parser, parse
from lit_adapter.cli.main import COMMANDS
from lit_adapter.streams import say
from lit_adapter.weights.adapter_search import find_adapter

TARGETS = ("ours", "lit-llama", "litgpt", "peft", "peft-lora")
SOURCES = ("auto", "official", *TARGETS)


def main(argv: Sequence[str], program: str | None = None) -> int:
    """Parse, convert, and print the report."""
    parser = command_parser(COMMANDS["convert-adapter"], program)
    parser.add_argument("source", help="an adapter file, a run's folder, or a PEFT adapter's folder")
    parser.add_argument("--out", required=True, metavar="PATH", help="file to write; for peft, folder")
    parser.add_argument(
        "--from", dest="given", choices=SOURCES, default="auto", help="by default recognised by its keys"
    )
    parser.add_argument("--to", choices=TARGETS, default="ours", help="format to write")
    parser.add_argument(
        "--base",
        type=Path | None,
        metavar="FOLDER",
        help="the adapter's converted base; needed for other code bases' adapters, and to compare logits",
    )
    parser.add_argument(
        "--gate",
        choices=["tanh", "identity"],
        help="gates of an official adapter, whose file does not say: squashed by tanh, or not (identity)",
    )
    parser.add_argument(
        "--template", help="template of ours; by default alpaca, or for litgpt alpaca-newline"
    )
    parser.add_argument(
        "--to-gate",
        choices=["tanh", "identity", "layer", "token"],
        help="form of our gates: per attention head, squashed (tanh) or not (identity); or, not squashed, "
        "per layer or per attention head and prompt token (token)",
    )
    parser.add_argument(
        "--allow-lossy", action="store_true", help="where gates that differ must become one, write their mean"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    options = parse(parser, argv)

    from lit_adapter.weights.foreign.convert import ConversionOptions, convert_adapter

    wanted = ConversionOptions(**{field.name: options[field.name] for field in fields(ConversionOptions)})
    for line in convert_adapter(find_adapter(options.source), Path(options.out), wanted):
        say(line)
    return 0
