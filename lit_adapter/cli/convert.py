from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_adapter.cli.command import command_parser, parse, shown
from lit_adapter.cli.main import COMMANDS
from lit_adapter.progress import byte_progress
from lit_adapter.streams import say


def main(argv: Sequence[str], program: str | None = None) -> int:
    """Parse and convert."""
    parser = command_parser(COMMANDS["convert"], program)
    parser.add_argument("source", help="a Hugging Face folder, a Meta folder, or a GGUF file")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="base folder, checkpoints/NAME")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: as in the source; float32 for quantised GGUF types",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a base that is already there")
    options = parse(parser, argv)

    from lit_adapter.weights.convert import convert

    choices = {name: options[name] for name in ("dtype", "overwrite")}
    with byte_progress("converting") as progress:
        out = convert(Path(options.source), Path(options.out), progress=progress, **choices)
    say(f"wrote {shown(out)}")
    return 0
