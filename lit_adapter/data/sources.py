"""The sources that a configuration names as data: files, folders, patterns and Hub data sets."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from lit_adapter.config import Columns, DataConfig
from lit_adapter.data.formats import SUFFIXES, check_regular, rows_of
from lit_adapter.data.hub import hub_addresses, hub_files, is_hub_name
from lit_adapter.data.recognise import is_conversation, recognise, wanted_columns
from lit_adapter.data.records import Records
from lit_adapter.data.store import Source, first_of_each, stored_records
from lit_adapter.data.streaming import check_streamable, streamed_rows
from lit_adapter.errors import UserError
from lit_adapter.streams import Say

SHOWN = 3
"""Sources that are named together."""


def as_names(given: Sequence[str] | str | None) -> list[str]:
    """Return the sources that a setting names."""
    return [given] if isinstance(given, str) else list(given or ())


def title(names: Sequence[str]) -> str:
    """Return the names of sources as one, for messages."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_sources(config: DataConfig) -> None:
    """Refuse data that is not named or does not exist. This needs no base, no tokenizer and no network.

    Raises:
        UserError: no training data is named; a file is missing, or cannot be read or streamed; or a folder or
            pattern has no data file.
    """
    if not all(as_names(config.train)) or not config.train:
        raise UserError("data.train is not set; give a file of records or a Hub data set as org/name")
    train = [*as_names(config.train)]
    for number, name in enumerate((*train, *as_names(config.val))):
        if not is_hub_name(name):
            for source in _local(name, 0):
                check_regular(source.path, source.name)
                if config.stream and number < len(train):
                    check_streamable(source)


def sources_of(
    given: Sequence[str] | str, say: Say = lambda line: None, *, stream: bool = False
) -> list[Source]:
    """Return the files that a setting names, in its order.

    Those of a Hub data set are downloaded (``say`` gets a line if there are many), or with ``stream`` only
    named.

    Raises:
        UserError: as `check_sources`, or the Hub has no such data set, or the disk no room for it.
    """
    found: list[Source] = []
    for number, name in enumerate(as_names(given)):
        if is_hub_name(name) and stream:
            found += [Source(Path(known), known, number, address) for address, known in hub_addresses(name)]
        elif is_hub_name(name):
            found += [Source(path, known, number) for path, known in hub_files(name, say)]
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
        found = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()]
    except OSError as error:
        raise UserError(f"{name}: cannot read: {error.strerror}; choose a readable folder") from None
    files = sorted(file for file in found if not file.name.startswith("."))
    if not files:
        raise UserError(f"{name}: is a folder without a data file ({', '.join(SUFFIXES)}); name another one")
    return files


def load_records(
    given: Sequence[str] | str,
    columns: Columns,
    wanted: str = "auto",
    *,
    cache: Path | None,
    say: Say = print,
) -> Records:
    """Read all sources into one, in order; ``cache`` and ``say`` are those of `stored_records`.

    Raises:
        UserError: as `sources_of` and `stored_records`.
    """
    files = sources_of(given, say)
    name = files[0].name if len(files) == 1 else title(as_names(given))
    return stored_records(files, name, columns, wanted, cache=cache, say=say)


def has_conversations(config: DataConfig, say: Say = lambda line: None) -> bool:
    """Whether the first record of a training source is a conversation; ``say`` is that of `sources_of`.

    Raises:
        UserError: a source cannot be read.
    """
    wanted = wanted_columns(config.columns)
    for file in first_of_each(sources_of(config.train, say, stream=config.stream)):
        rows = streamed_rows(file, wanted) if config.stream else rows_of(file.path, file.name, wanted)
        _, values = next(rows, (0, {}))
        known = recognise(values, config.columns, config.format)
        if is_conversation(values, config.columns, known):
            return True
    return False
