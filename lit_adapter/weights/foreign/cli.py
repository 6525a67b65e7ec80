"""The command line of ``scripts/convert_adapter.py``; torch comes in after parsing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_adapter.command import command_parser, parse

SOURCES = ("auto", "official", "lit-llama", "litgpt", "peft", "ours")
TARGETS = ("ours", "lit-llama", "litgpt", "peft")


def convert_adapter_main(argv: Sequence[str]) -> int:
    """Run ``scripts/convert_adapter.py``."""
    parser = command_parser(
        "scripts/convert_adapter.py", "Turn an adapter of another code base into ours, or ours into theirs."
    )
    parser.add_argument("source", help="an adapter file, or the folder of one of PEFT's")
    parser.add_argument("--out", required=True, metavar="PATH", help="the file; for peft a folder")
    parser.add_argument("--from", dest="given", choices=SOURCES, default="auto", help="default: by its keys")
    parser.add_argument("--to", choices=TARGETS, default="ours", help="default: ours")
    parser.add_argument(
        "--base",
        metavar="FOLDER",
        help="the converted base the adapter belongs to: needed where the source is not ours, and to "
        "compare logits",
    )
    parser.add_argument(
        "--gate",
        choices=["tanh", "identity"],
        help="how an official adapter's gates act, which its file does not say",
    )
    parser.add_argument(
        "--template",
        help="for ours: the prompt template it was trained with; default: alpaca, for litgpt alpaca-newline",
    )
    parser.add_argument(
        "--to-gate", choices=["tanh", "identity", "layer"], help="for ours: another form of gate"
    )
    parser.add_argument(
        "--allow-lossy", action="store_true", help="write means where gates must be joined and differ"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    options = parse(parser, argv)

    from lit_adapter.weights.foreign.convert import Wishes, convert_adapter

    wishes = Wishes(
        to=options.to,
        given=options.given,
        base=Path(options.base) if options.base else None,
        template=options.template,
        gate=options.gate,
        to_gate=options.to_gate,
        allow_lossy=options.allow_lossy,
        overwrite=options.overwrite,
    )
    for line in convert_adapter(Path(options.source), Path(options.out), wishes):
        print(line)
    return 0
