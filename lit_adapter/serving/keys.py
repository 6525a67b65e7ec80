"""Who may ask: keys from a file, compared in constant time, and never written anywhere."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_adapter.errors import UserError
from lit_adapter.files.read import read_text

LEAST = 16
"""Characters of a key: shorter ones can be guessed."""
ADMIN = "admin"


@dataclass(frozen=True)
class Key:
    """One key of the file."""

    line: int
    """By which logs name it."""
    digest: bytes
    is_admin: bool


def words_of(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the words of each line of a file of keys that is more than a comment."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split("#")[0].split()
        if words:
            yield number, words


class Keys:
    """The keys of a file, one per line; ``admin KEY`` may also load and unload adapters; # begins a comment.

    Raises:
        UserError: the file has no key, or one that is too short, has spaces, or comes twice.
    """

    def __init__(self, path: Path) -> None:
        self.keys: list[Key] = []
        for number, words in words_of(path):
            is_admin = len(words) == 2 and words[0] == ADMIN
            if len(words) > 1 + is_admin:
                raise UserError(f"{path}, line {number}: expected KEY, or {ADMIN} KEY")
            key = words[-1]
            if len(key) < LEAST:
                raise UserError(f"{path}, line {number}: the key has fewer than {LEAST} characters")
            digest = hashlib.sha256(key.encode()).digest()
            if any(other.digest == digest for other in self.keys):
                raise UserError(f"{path}, line {number}: this key is given twice; remove one")
            self.keys.append(Key(number, digest, is_admin))
        if not self.keys:
            raise UserError(f"{path}: no key; write one per line")

    def find(self, given: str) -> Key | None:
        """Return the key that a client sends, or None. The time taken says nothing of how close it is."""
        digest, found = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest(), None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found
