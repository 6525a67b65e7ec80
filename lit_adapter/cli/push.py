from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_adapter.cli.command import command_parser, parse, shown
from lit_adapter.cli.main import COMMANDS
from lit_adapter.streams import say
from lit_adapter.weights.adapter_search import find_adapter


def main(argv: Sequence[str], program: str | None = None) -> int:
    """Parse, push, and print the address; with --dry-run print what would be pushed."""
    parser = command_parser(COMMANDS["push"], program)
    parser.add_argument("adapter", help="a run's folder or its adapter.safetensors")
    parser.add_argument("name", help="org/name of the repository, which is created if needed")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--card", type=Path | None, metavar="FILE", help="model card; default: write one if missing"
    )
    parser.add_argument(
        "--results",
        type=Path | None,
        metavar="FOLDER",
        help="an evaluation for the card; by default those in the adapter's run folder",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent; send nothing")
    options = parse(parser, argv)

    from lit_adapter.errors import UserError
    from lit_adapter.evaluation.card import evaluated
    from lit_adapter.weights.adapter_hub import push_adapter

    adapter, card = find_adapter(options.adapter), options.card
    if card is not None and options.results is not None:
        raise UserError("--card and --results are both given; --results is for the card that is written")
    told = evaluated(adapter, options.results) if card is None else None
    address, text = push_adapter(
        adapter, options.name, private=options.private, card=card, evaluated=told, dry_run=options.dry_run
    )
    if options.dry_run:
        only = "" if card else ", if the repository has none yet"
        say(f"dry run: nothing was sent to {options.name}; it would get")
        say(f"  adapter.safetensors  {adapter.stat().st_size:,} bytes, from {shown(adapter)}")
        for name, content in told.files.items() if told is not None else ():
            say(f"  {name:<20} {len(content):,} bytes, a plot for the card")
        say(f"  README.md            this model card{only}:\n\n{text}")
        return 0
    say(f"pushed {shown(adapter)}: {address}")
    if text is None:
        say("the repository's model card is unchanged; --card FILE replaces it")
    elif card is None:
        say("a model card has been written; fill in the licence there")
    return 0
