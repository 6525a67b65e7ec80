from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_adapter.cli.command import command_parser, parse, shown
from lit_adapter.cli.main import COMMANDS
from lit_adapter.streams import say


def main(argv: Sequence[str], program: str | None = None) -> int:
    """Parse, compare, print the tables, and write the page."""
    parser = command_parser(COMMANDS["compare"], program)
    runs = "run folders or files in them, and evaluations of their adapters"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=runs)
    parser.add_argument(
        "--html", type=Path | None, metavar="FILE", help="write curves and tables as an HTML page"
    )
    parser.add_argument(
        "--by",
        default="held-out",
        metavar="METRIC",
        help="metric to sort the runs by; held-out: the lowest held-out loss",
    )
    options = parse(parser, argv)

    from lit_adapter.comparison.compare import compare, show

    show(*compare([Path(run) for run in options.runs], html=options.html, by=options.by))
    if options.html is not None:
        say(f"wrote {shown(options.html)}")
    return 0
