"""The command ``merge``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_adapter.cli.command import command_parser, parse, shown
from lit_adapter.cli.main import COMMANDS
from lit_adapter.progress import byte_progress


def main(argv: Sequence[str], program: str | None = None) -> int:
    """Parse, merge, and print the report."""
    parser = command_parser(COMMANDS["merge"], program)
    parser.add_argument("adapter", help="adapter.safetensors of a run with adapter.prompt_length 0")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to make")
    parser.add_argument("--base", metavar="FOLDER", help="by default the base the adapter names")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="default: float32; bfloat16 and float16 round what was learned",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a base that is already there")
    options = parse(parser, argv)

    from lit_adapter.weights.merge import merge

    out = Path(options.out)
    with byte_progress("merging") as progress:
        report = merge(
            Path(options.adapter),
            out,
            base=Path(options.base) if options.base else None,
            dtype=options.dtype,
            overwrite=options.overwrite,
            progress=progress,
        )
    print(f"wrote {shown(out)}: {report}")
    return 0
