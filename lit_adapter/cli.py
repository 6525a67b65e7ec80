"""The scripts' command lines; each parses before anything heavy is imported, then calls one function."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import yaml

from lit_adapter.command import command_parser, parse
from lit_adapter.config import Config
from lit_adapter.errors import UserError, nearest
from lit_adapter.files.read import read_text
from lit_adapter.streams import output_is_no_result

_PLAIN_TAG = "tag:yaml.org,2002:"
_PYTHON_TAG = "tag:yaml.org,2002:python/"


def finetune_main(argv: Sequence[str]) -> int:
    """Parse a run's configuration and train."""
    request = parse_finetune(argv)
    output_is_no_result()
    from lit_adapter.training.signals import Signals

    signals = Signals()
    signals.install()  # before the seconds that the next import takes
    if isinstance(sys.stdout, TextIOWrapper):  # a log file should show the last step, also of a killed run
        sys.stdout.reconfigure(line_buffering=True)
    from lit_adapter.training.finetune import finetune

    return finetune(request.config, request.resume, signals=signals, dry_run=request.dry_run)


class FinetuneRequest(NamedTuple):
    """What the command line of ``scripts/finetune.py`` asks for."""

    config: Config
    resume: str | None
    dry_run: bool


def parse_finetune(argv: Sequence[str]) -> FinetuneRequest:
    """Return the configuration, what to resume, and whether it is only a trial.

    Raises:
        UserError: a file, key or value that is wrong; names file, line and key.
    """
    parser = command_parser("finetune.py", "Fine-tune a frozen LLaMA with gated prefix attention.")
    import jsonargparse

    parser.add_argument(
        "--config", action=jsonargparse.ActionConfigFile, help="YAML file of the fields below"
    )
    # Suppressed, so that what --print_config prints is a configuration and nothing else.
    absent = {"default": argparse.SUPPRESS}
    parser.add_argument("--resume", type=str | None, help="'last', or a checkpoint of the run", **absent)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, try three steps, leave no run", **absent
    )
    parser.add_class_arguments(Config, nested_key=None)
    for path in _config_files(argv):
        check_config_file(path)
    parsed = parse(parser, argv)
    values = parser.instantiate(parsed)
    values = {field.name: values[field.name] for field in fields(Config)}
    return FinetuneRequest(Config(**values), parsed.get("resume"), parsed.get("dry_run", False))


def _config_files(argv: Sequence[str]) -> list[Path]:
    found = [value for flag, value in pairwise(argv) if flag == "--config"]
    found += [argument.partition("=")[2] for argument in argv if argument.startswith("--config=")]
    return [Path(value) for value in found]


def check_config_file(path: Path) -> None:
    """Look for mistakes that need the file's lines to be named: YAML itself, unknown and repeated keys.

    Raises:
        UserError: the first mistake, with file and line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        node = yaml.compose(read_text(path), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: expected keys and values, as in configs/quickstart.yaml")
    _check_keys(node, Config, path, "")


def _check_keys(node: yaml.MappingNode, kind: Any, path: Path, prefix: str) -> None:
    known = get_type_hints(kind)
    seen: set[str] = set()
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.startswith(_PLAIN_TAG):
            raise UserError(f"{path}:{line}: a key must be a plain name, as in configs/quickstart.yaml")
        key = key_node.value
        if not value_node.tag.startswith(_PLAIN_TAG) or value_node.tag.startswith(_PYTHON_TAG):
            raise UserError(
                f"{path}:{line}: '{prefix}{key}' has the tag {value_node.tag}; give a plain value"
            )
        if "." in key and key in _all_keys(Config):
            section, *names = key.split(".")
            nested = "".join(f"{{{name}: " for name in names) + "..." + "}" * len(names)
            raise UserError(f"{path}:{line}: key '{key}' with a dot; write it as {section}: {nested}")
        if key not in known:
            hint = nearest(key, [*known, *_all_keys(Config)])  # those of its own section first
            raise UserError(f"{path}:{line}: unknown key '{prefix}{key}'{hint}")
        if key in seen:
            raise UserError(f"{path}:{line}: key '{prefix}{key}' is given twice; keep one")
        seen.add(key)
        inner = _section(known[key])
        if inner is None:
            _check_plain(value_node, f"{path}:{line}: '{prefix}{key}'", known[key])
            continue
        if not isinstance(value_node, yaml.MappingNode):
            raise UserError(
                f"{path}:{line}: '{prefix}{key}' must hold keys such as {', '.join(get_type_hints(inner))}"
            )
        _check_keys(value_node, inner, path, f"{prefix}{key}.")


def _section(kind: Any) -> Any:
    """Return the dataclass of a key's type, or None for a plain value."""
    return next((k for k in (kind, *get_args(kind)) if is_dataclass(k)), None)


def _all_keys(kind: Any, prefix: str = "") -> list[str]:
    """Return the full names of all keys below a section."""
    found = []
    for name, inner in get_type_hints(kind).items():
        section = _section(inner)
        found += _all_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return found


def _check_plain(node: yaml.Node, place: str, kind: Any) -> None:
    """Refuse keys, deep lists and references to itself where a plain value or a list of them belongs.

    And no value where there must be one: jsonargparse takes null for any field that has a default.
    """
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise UserError(f"{place} holds keys or lists within; give a plain value")
    if any("\0" in item.value for item in items):
        raise UserError(f"{place} holds a null character; give plain text")
    odd = next((item.value for item in items if _is_odd_number(item)), None)
    if odd is not None:
        value = yaml.safe_load(odd)
        raise UserError(f"{place} is {odd}, which YAML reads as {value}; write the number out")
    if type(None) not in get_args(kind) and any(item.tag == f"{_PLAIN_TAG}null" for item in items):
        raise UserError(f"{place} has no value; give one, or leave the key out for its default")


def _is_odd_number(node: yaml.Node) -> bool:
    """Whether a plain value is a number in YAML alone: octal for its leading 0, or with parts of 60."""
    kind = node.tag.removeprefix(_PLAIN_TAG)
    is_octal = kind == "int" and re.match(r"[-+]?0_*\d", node.value) is not None
    return is_octal or (kind in ("int", "float") and ":" in node.value)


def generate_main(argv: Sequence[str]) -> int:
    """Parse and answer prompts."""
    from lit_adapter.generation.command import answer, parser

    return answer(parse(parser(), argv), sys.stdout)
