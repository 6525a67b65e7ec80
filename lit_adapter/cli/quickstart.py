from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_adapter.cli.command import command_parser, parse
from lit_adapter.cli.finetune import parse_finetune
from lit_adapter.cli.main import COMMANDS
from lit_adapter.errors import UserError
from lit_adapter.streams import output_is_no_result

CONFIG = Path("configs/quickstart.yaml")
OUT = "run folder; a stopped run there is continued, for a complete one a number is added to the name"


def main(argv: Sequence[str], program: str | None = None) -> int:
    """Parse, then do everything."""
    parser = command_parser(COMMANDS["quickstart"], program)
    parser.add_argument("--out", type=str, default="out/quickstart", help=OUT)
    parser.add_argument("--seed", type=int, default=0, help="seed of the demo data")
    options = parse(parser, argv)
    if not CONFIG.is_file():
        raise UserError(f"{CONFIG}: not found; run this from the repository's top folder")
    config = parse_finetune(["--config", str(CONFIG), "--out", options.out]).config
    output_is_no_result()
    from lit_adapter.quickstart import quickstart

    return quickstart(config, options.seed)
