"""What every script shares: parsing that answers in one line, and exit statuses."""

from __future__ import annotations

import argparse
import errno
import re
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NoReturn

from lit_adapter.errors import UserError, nearest, shorten
from lit_adapter.streams import prepare_streams

INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""
PIPE_CLOSED = 141
"""128 + SIGPIPE: what it ends reports the same."""

_ABOUT_A_NAME = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
"""What the system says of a file's name, whatever was to be done with it."""


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a script's ``main`` on the command line and leave with its status.

    A user's mistake becomes one ``error: ...`` line and status 2, Ctrl-C status 130; a reader that closes
    the pipe (``| head``) ends it quietly with 141. So does a name that the system refuses to look at, with
    one line. Anything else is our bug and keeps its traceback.
    """
    prepare_streams()
    try:
        status = _status(main)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.exit_status
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        status = getattr(interrupt, "exit_status", INTERRUPTED)
    except BrokenPipeError:
        status = PIPE_CLOSED
    except OSError as error:
        if error.filename is None or error.errno not in _ABOUT_A_NAME:
            raise
        print(f"error: {shorten(str(error.filename))}: {error.strerror}", file=sys.stderr)
        status = UserError.exit_status
    sys.exit(status)


def _status(main: Callable[[Sequence[str]], int]) -> Any:
    try:
        status: Any = main(sys.argv[1:])
    except SystemExit as leaving:  # after --help
        status = leaving.code
    sys.stdout.flush()
    return status


def command_parser(program: str, description: str) -> Any:
    """Return a jsonargparse parser for `parse`: whole option names only, no exit on error."""
    import jsonargparse

    # The texts below a configuration's fields are its help.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return jsonargparse.ArgumentParser(
        prog=program, description=description, exit_on_error=False, allow_abbrev=False
    )


def parse(parser: Any, argv: Sequence[str]) -> Any:
    """Parse ``argv`` with a parser made by `command_parser`; ``--a-b`` and ``--a_b`` are one option.

    Raises:
        UserError: the first mistake, with the nearest right option name where one was misspelt.
    """
    options = {action.dest: action.option_strings for action in parser._actions}
    known = {option.replace("_", "-"): option for option in chain(*options.values())}
    try:
        return parser.parse_args([_as_known(word, known) for word in argv])
    except argparse.ArgumentError as error:
        raise UserError(_one_line(str(error), options)) from None


def _as_known(word: str, known: dict[str, str]) -> str:
    """Return an option as its parser spells it; other words unchanged."""
    name, equals, value = word.partition("=")
    return known.get(name.replace("_", "-"), name) + equals + value if name.startswith("--") else word


def check_least(options: Any, least: int, *names: str) -> None:
    """Refuse numbers of the command line below ``least``; an option without a value is left alone.

    Raises:
        UserError: names the option.
    """
    for name in names:
        given = options[name]
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} is {value}; expected {least} or more")


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "tuple": "a list such as [0.9, 0.95]",
}


def _wrong_value(message: str) -> str | None:
    """Say jsonargparse's "does not validate" in words: key, value and what would be right."""
    key = re.search(r'Parser key "([^"]+)"', message)
    given = re.search(r"(?:Got|Given) value: (.*)", message)
    classes = re.findall(r"Expected an? <class '(\w+)'>", message)
    choices = re.findall(r"Expected an? typing\.Literal\[(.*?)\]", message)
    wanted = [_KINDS[name] for name in dict.fromkeys(classes) if name in _KINDS]
    wanted += [f"one of {choice.replace(chr(39), '')}" for choice in choices]
    if key is None or given is None or not wanted:
        return None
    if "a number" in wanted and "a whole number" in wanted:
        wanted.remove("a whole number")
    return f"{key[1]} is {given[1]!r}; expected {' or '.join(wanted)}"


def _one_line(message: str, options: dict[str, list[str]]) -> str:
    in_words = _wrong_value(message)
    if in_words is not None:
        return in_words
    section = re.search(r'Parser key "([^"]+)": Unable to load config', message)
    if section is not None:
        return f"{section[1]} is a group of fields; give them one by one, as --{section[1]}.FIELD VALUE"
    missing = re.match(r"the following arguments are required: (.*)", message)
    if missing is not None:
        names = [(options.get(name) or [name])[0] for name in missing[1].split(", ")]
        return f"{' and '.join(names)} must be given; see --help"
    unknown = re.match(r"unrecognized arguments: (.*)", message, re.DOTALL)
    if unknown is None:
        return f"{message}; see --help"
    given = unknown[1].split()[0]
    if not given.startswith("-"):
        return f"unexpected argument '{given}'; see --help"
    name = given.split("=")[0]
    return f"unknown option '{name}'{nearest(name, [*chain(*options.values())]) or '; see --help'}"
