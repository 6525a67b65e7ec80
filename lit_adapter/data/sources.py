"""What a configuration names as data: files, folders, patterns and Hub data sets, alone or several."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_adapter.config import Columns, DataConfig
from lit_adapter.data.formats import SUFFIXES, check_regular, rows_of
from lit_adapter.data.hub import hub_files, is_hub_name
from lit_adapter.data.recognise import is_conversation, recognise, wanted_columns
from lit_adapter.data.records import Records, merge, read_records
from lit_adapter.errors import UserError

SHOWN = 3
"""Sources that are named together."""


@dataclass(frozen=True)
class Source:
    """A file of records."""

    path: Path
    name: str
    """What messages call it."""
    number: int = 0
    """Which of the named sources it belongs to."""


def as_names(given: Sequence[str] | str | None) -> list[str]:
    """Return the sources that a setting names."""
    return [given] if isinstance(given, str) else list(given or ())


def title(names: Sequence[str]) -> str:
    """Return the names of sources as one, for messages."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_sources(config: DataConfig) -> None:
    """Refuse data that is not named or not there, which needs no base, no tokenizer and no network.

    Raises:
        UserError: no training data is named, a file is missing or cannot be read, or a folder or pattern has
            no data file.
    """
    if not all(as_names(config.train)) or not config.train:
        raise UserError("data.train is not set; give a file of records or a Hub data set as org/name")
    for name in (*as_names(config.train), *as_names(config.val)):
        if not is_hub_name(name):
            for source in _local(name, 0):
                check_regular(source.path, source.name)


def sources_of(given: Sequence[str] | str) -> list[Source]:
    """Return the files that a setting names, in its order; those of a Hub data set are downloaded.

    Raises:
        UserError: as `check_sources`, or the Hub has no such data set.
    """
    found = []
    for number, name in enumerate(as_names(given)):
        if is_hub_name(name):
            found += [Source(path, known, number) for path, known in hub_files(name)]
        else:
            found += _local(name, number)
    return found


def _local(name: str, number: int) -> list[Source]:
    path = Path(name)
    if path.is_dir():
        return [Source(file, str(file), number) for file in _files_in(path, name)]
    if glob.has_magic(name) and not path.exists():
        paths = [Path(found) for found in sorted(glob.glob(name, recursive=True))]
        files = [found for found in paths if found.is_file()]
        if not files:
            raise UserError(f"{name}: no file matches this pattern; check folder and suffix")
        return [Source(file, str(file), number) for file in files]
    return [Source(path, name, number)]


def _files_in(folder: Path, name: str) -> list[Path]:
    try:
        files = sorted(
            file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()
        )
    except OSError as error:
        raise UserError(f"{name}: cannot read: {error.strerror}; choose a readable folder") from None
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise UserError(f"{name}: is a folder without a data file ({', '.join(SUFFIXES)}); name another one")
    return files


def load_records(given: Sequence[str] | str, columns: Columns, wanted: str = "auto") -> Records:
    """Read all sources into one, in order.

    Raises:
        UserError: as `sources_of` and `read_records`.
    """
    files = sources_of(given)
    parts = [
        read_records(file.path, columns=columns, name=file.name, wanted=wanted, source=file.number)
        for file in files
    ]
    return parts[0] if len(parts) == 1 else merge(parts, title(as_names(given)))


def has_conversations(config: DataConfig) -> bool:
    """Whether the first record of a training source is a conversation.

    Raises:
        UserError: a source cannot be read.
    """
    seen: set[int] = set()
    for file in sources_of(config.train):
        if file.number in seen:
            continue
        seen.add(file.number)
        _, values = next(rows_of(file.path, file.name, wanted_columns(config.columns)), (0, {}))
        known = recognise(values, config.columns, config.format)
        if is_conversation(values, config.columns, known):
            return True
    return False
