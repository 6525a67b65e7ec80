from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from io import TextIOWrapper
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from lit_adapter.cli.command import command_parser, parse
from lit_adapter.cli.config_file import check_config_file
from lit_adapter.cli.main import COMMANDS
from lit_adapter.config import Config
from lit_adapter.streams import output_is_no_result


def main(argv: Sequence[str], program: str | None = None) -> int:
    """Parse a run's configuration and train."""
    request = parse_finetune(argv, program)
    output_is_no_result()
    from lit_adapter.training.signals import Signals

    signals = Signals()
    signals.install()  # before the next import, which takes seconds
    if isinstance(sys.stdout, TextIOWrapper):  # so that the log of a killed run shows its last step
        sys.stdout.reconfigure(line_buffering=True)
    from lit_adapter.training.finetune import finetune

    return finetune(
        request.config, request.resume, signals=signals, dry_run=request.dry_run, verify=request.verify
    )


class FinetuneRequest(NamedTuple):
    """The request of a command line."""

    config: Config
    resume: str | None
    dry_run: bool
    verify: bool


def parse_finetune(argv: Sequence[str], program: str | None = None) -> FinetuneRequest:
    """Return the configuration, what to resume, whether this is a dry run, and whether to verify the base.

    Raises:
        UserError: a file, key or value that is wrong; names the file, line and key.
    """
    import jsonargparse

    class CheckedConfigFile(jsonargparse.ActionConfigFile):
        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
            check_config_file(Path(values))
            super().__call__(parser, cfg, values, option_string)

    parser = command_parser(COMMANDS["finetune"], program)
    parser.add_argument("--config", action=CheckedConfigFile, help="YAML file of the fields below")
    # Suppressed, so that --print_config prints a configuration and nothing else.
    absent = {"default": argparse.SUPPRESS}
    parser.add_argument("--resume", type=str | None, help="'last', or a checkpoint of the run", **absent)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, try three steps, start no run", **absent
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare every byte of the base with its checksums", **absent
    )
    parser.add_class_arguments(Config, nested_key=None)
    parsed = parse(parser, _with_lists(argv))
    values = parser.instantiate(parsed)
    values = {field.name: values[field.name] for field in fields(Config)}
    config, flags = Config(**values), (parsed.get(name, False) for name in ("dry_run", "verify"))
    return FinetuneRequest(config, parsed.get("resume"), *flags)


SINGLE = ("--data.train", "--data.val")
"""Options that may also have a single value."""
LISTS = ("--adapter.lora.on", "--data.train", "--data.val", "--data.weights")


def _with_lists(argv: Sequence[str]) -> list[str]:
    """Return the arguments with several words after one of `LISTS` as one list, for jsonargparse."""
    found: list[str] = []
    words = iter(enumerate(argv))
    for index, word in words:
        found.append(word)
        if word not in LISTS:
            continue
        names = [*takewhile(lambda name: not name.startswith(("-", "[")), argv[index + 1 :])]
        if len(names) > 1 or (names and word not in SINGLE):
            found.append(json.dumps(names) if word in SINGLE else f"[{', '.join(names)}]")
            next(islice(words, len(names) - 1, None))
    return found
