from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_adapter.cli.command import command_parser, parse, shown
from lit_adapter.cli.main import COMMANDS
from lit_adapter.progress import byte_progress
from lit_adapter.streams import say
from lit_adapter.weights.adapter_search import find_adapter


def main(argv: Sequence[str], program: str | None = None) -> int:
    """Parse, merge, and print the report."""
    parser = command_parser(COMMANDS["merge"], program)
    parser.add_argument("adapter", help="a run's folder or its adapter.safetensors; prompt_length must be 0")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--base",
        type=Path | None,
        metavar="FOLDER",
        help="base folder; by default the one that the adapter names",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="default: float32; bfloat16 and float16 round what was learned",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a merged model that is already there"
    )
    options = parse(parser, argv)

    from lit_adapter.weights.merge import merge

    choices = {name: options[name] for name in ("base", "dtype", "overwrite")}
    with byte_progress("merging") as progress:
        report = merge(find_adapter(options.adapter), Path(options.out), progress=progress, **choices)
    say(f"wrote {shown(Path(options.out))}: {report}")
    return 0
