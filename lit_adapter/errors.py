"""The exception for users' mistakes, and helpers for its messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake of the user: one line with what is wrong, where (file, line, key) and what would be right.

    The scripts print it as ``error: ...`` on standard error and exit with status 2. Any other exception
    is a bug and keeps its traceback. To Python callers it is a ValueError.
    """

    exit_status = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class WriteError(UserError):
    """A file could not be written."""


class WrongTypeError(UserError, TypeError):
    """A Python caller has passed a value of another type than the parameter takes, or an unknown keyword."""


_in_command = False


@contextmanager
def options_of_a_command() -> Iterator[None]:
    """Let messages name parameters as a command line spells them, inside the block."""
    global _in_command
    before, _in_command = _in_command, True
    try:
        yield
    finally:
        _in_command = before


def option(name: str) -> str:
    """Return a parameter as the user gives it: ``--base`` to a command, ``base=...`` to a Python function.

    For messages that both can meet; ``name`` is Python's.
    """
    return f"--{name}" if _in_command else f"{name}=..."


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""All control characters but tab and line feed, those that reverse the order of what follows, and surrogates.

Direction marks (U+200E, U+200F, U+061C) stay: they belong to ordinary right-to-left text, and move only the
punctuation and digits next to them.
"""


def visible(text: str) -> str:
    """Return a text with its control characters written out as in a repr: a terminal would obey them."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Return a text on one line, with what a terminal would obey written out, as by `visible`."""
    return visible(" ".join(text.split()))


def counted(number: int, noun: str) -> str:
    """Return ``1 step``, ``2 steps``: a noun after its number."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural}"


OTHER_NAMES = {
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "batch": "batch_size",
    "global_batch_size": "batch_size",
    "per_device_train_batch_size": "row_tokens",
    "max_seq_length": "max_length",
    "grad_clip": "clip",
    "max_grad_norm": "clip",
    "model": "base",
    "checkpoint_dir": "base",
    "dataset": "train",
    "output": "out",
    "output_dir": "out",
    "out_dir": "out",
    "adapter_len": "prompt_length",
    "adapter_layer": "layers",
    "max_tokens": "max_new_tokens",
}
"""Other programs' names for our settings."""


def nearest(name: str, candidates: list[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the candidate most similar to ``name``, or an empty string.

    A candidate with the same name in another section, or with another program's name for it, is preferred.
    """
    import difflib

    plain = {_plain(candidate): candidate for candidate in candidates}
    last = _plain(name).rpartition(".")[2]
    same = [other for other in plain if other.rpartition(".")[2] in (last, OTHER_NAMES.get(last))]
    found = same or difflib.get_close_matches(_plain(name), list(plain), n=1, cutoff=0.5)
    return f"; did you mean '{plain[found[0]]}'?" if found else ""


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def shorten(value: object, limit: int = 60) -> str:
    """Return ``repr(value)``, cut to ``limit`` characters."""
    shown = repr(value[:limit] if isinstance(value, str) else value)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
