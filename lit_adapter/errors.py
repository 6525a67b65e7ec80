"""The one exception a user's mistake raises, and how the scripts show it."""

from __future__ import annotations


class UserError(Exception):
    """What went wrong, where (file, line, key) and what would be right, in one line.

    The scripts print it as ``error: ...`` on standard error and exit with status 2. Everything else
    that escapes is a bug of ours and keeps its traceback.
    """

    exit_status = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class WriteError(UserError):
    """A file could not be written."""


def nearest(name: str, candidates: list[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the candidate most like ``name``, or an empty string."""
    import difflib

    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""
