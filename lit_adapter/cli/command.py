"""What all commands share: a parser whose mistakes are one line, and exit statuses."""

from __future__ import annotations

import argparse
import errno
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from lit_adapter.errors import UserError, nearest, options_of_a_command, shorten
from lit_adapter.generation.settings import Sampling
from lit_adapter.streams import prepare_streams, say

INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""
PIPE_CLOSED = 141
"""128 + SIGPIPE, as shells report a process that it ends."""

_ABOUT_A_NAME = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
"""Errors that are about a file's name, whatever was done with the file."""


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run ``main`` on the command line and exit with its status.

    A `UserError` becomes one ``error: ...`` line and its status, 2, and so does a file name that the system
    refuses. Ctrl-C exits with 130; a reader that closes the pipe (``| head``) ends the command quietly with
    141. Anything else is a bug and keeps its traceback.
    """
    prepare_streams()
    status: Any
    try:
        try:
            with options_of_a_command():
                status = main(sys.argv[1:])
        except SystemExit as leaving:  # after --help
            status = leaving.code
        sys.stdout.flush()
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        status = error.exit_status
    except KeyboardInterrupt as interrupt:
        say(str(interrupt) or "interrupted", sys.stderr)
        status = getattr(interrupt, "exit_status", INTERRUPTED)
    except BrokenPipeError:
        status = PIPE_CLOSED
    except OSError as error:
        if error.filename is None or error.errno not in _ABOUT_A_NAME:
            raise
        say(f"error: {shorten(str(error.filename))}: {error.strerror}", sys.stderr)
        status = UserError.exit_status
    sys.exit(status)


def command_parser(description: str, program: str | None = None) -> Any:
    """Return a jsonargparse parser for `parse`: whole option names only, no exit on error.

    ``program`` is the command as the user typed it; None for the script's own name, as in argparse.
    """
    import jsonargparse

    # A configuration field's help is the docstring below it.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return jsonargparse.ArgumentParser(
        prog=program, description=description, exit_on_error=False, allow_abbrev=False
    )


def parse(parser: Any, argv: Sequence[str]) -> Any:
    """Parse ``argv`` with a parser made by `command_parser`; ``--a-b`` and ``--a_b`` are one option.

    Raises:
        UserError: the first mistake, with the nearest option name if one is misspelt.
    """
    known = [option for action in parser._actions for option in action.option_strings]
    try:
        return parser.parse_args([_as_known(word, known) for word in argv])
    except argparse.ArgumentError as error:
        raise UserError(_in_words(str(error))) from None


def _as_known(word: str, known: list[str]) -> str:
    """Return an option as its parser spells it; other words unchanged."""
    name, equals, value = word.partition("=")
    if not name.startswith("--") or name == "--":
        return word
    same = next((option for option in known if option.replace("_", "-") == name.replace("_", "-")), None)
    if same is not None:
        return same + equals + value
    if " " in word:  # a value to argparse too, such as a prompt
        return word
    raise UserError(f"unknown option '{name}'{nearest(name, known) or '; see --help'}")


def add_sampling(parser: Any) -> None:
    """Add the fields of `Sampling` with their defaults; their docstrings are the help."""
    from docstring_parser import parse_from_object

    described = {item.arg_name: item.description for item in parse_from_object(Sampling).params}
    types = get_type_hints(Sampling)
    defaults = asdict(Sampling())
    for field in fields(Sampling):
        several = get_args(types[field.name])
        more = {"nargs": "+", "metavar": "ID" if several[0] is int else "TEXT"} if several else {}
        parser.add_argument(
            f"--{field.name}",
            type=several[0] if several else types[field.name],
            default=list(defaults[field.name]) if several else defaults[field.name],
            help=described[field.name],
            **more,
        )


def sampling_of(options: Any) -> Sampling:
    """Return the settings that the options of `add_sampling` were given."""
    given: Any = {field.name: options[field.name] for field in fields(Sampling)}
    return Sampling(**given | {"stop": tuple(options.stop), "stop_ids": tuple(options.stop_ids)})


def check_least(options: Any, least: int, *names: str) -> None:
    """Refuse numbers on the command line below ``least``; an option without a value passes."""
    for name in names:
        given = options[name]
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} is {value}; expected {least} or more")


def shown(path: Path) -> Path:
    """Return a path relative to the working directory if it lies below it."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "tuple": "a list such as [0.9, 0.95]",
}


def _in_words(message: str) -> str:
    """Return jsonargparse's report of a wrong value in a user's words; its text is all that it offers."""
    key = re.search(r'Parser key "([^"]+)"', message)
    given = re.search(r"(?:Got|Given) value: (.*)", message)
    wanted = [_KINDS.get(kind, kind) for kind in re.findall(r"Expected an? <class '(\w+)'>", message)]
    choices = re.findall(r"Expected an? typing\.Literal\[(.*?)\]", message)
    wanted += [f"one of {choice.replace(chr(39), '')}" for choice in choices]
    if key and given and wanted:
        return f"{key[1]} is {given[1]!r}; expected {' or '.join(dict.fromkeys(wanted))}"
    if key and "Unable to load config" in message:
        return f"{key[1]} is a group of fields; give them one by one, as --{key[1]}.FIELD VALUE"
    return f"{message}; see --help"
