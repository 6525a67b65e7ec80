"""Records that are read while they are trained on, and neither downloaded nor kept on disk.

The library ``datasets`` reads files where they are, here or on the Hub. An epoch takes them in an order drawn
from (seed, epoch). Their records, one file after another, fill shuffle buffers, and each buffer is shuffled
by (seed, epoch, its number). So the order is a function of (seed, epoch), memory is bounded by a buffer, and
from the `Place` of a buffer the order continues without reading what came before.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lit_adapter.config import Columns
from lit_adapter.data.formats import PARQUET, without_null
from lit_adapter.data.reading import records_of_rows
from lit_adapter.data.recognise import Recognised, recognise, wanted_columns
from lit_adapter.data.record import AnyRecord
from lit_adapter.data.store import Source, first_of_each
from lit_adapter.data.strict_json import Row, jsonl_rows
from lit_adapter.errors import UserError, shorten

BUFFER = 10_000
"""Records of a buffer by default."""
BUFFER_CHARACTERS = 2**25
"""Characters of a buffer's texts from which it takes no further record."""
LINES = (".jsonl", ".ndjson")
BATCH_ROWS = 1024
READERS = ("datasets", "pyarrow", "fsspec", "huggingface_hub", "aiohttp", "httpx", "httpx2", "httpcore")
"""Libraries whose errors mean that a file cannot be read."""


class Place(NamedTuple):
    """Where a buffer begins: plain numbers, for checkpoints."""

    epoch: int = 0
    buffer: int = 0
    """Its number in the epoch."""
    shard: int = 0
    """Number of the file in the epoch's order."""
    row: int = 0
    """Rows of this file, or lines, that come before."""
    record: int = 0
    """Records of the run that come before."""


def check_streamable(source: Source) -> None:
    """Refuse a file that cannot be read starting at any record.

    Raises:
        UserError: it is neither JSON Lines nor Parquet, or fsspec would split its path.
    """
    if source.path.suffix.lower() not in (*LINES, PARQUET):
        raise UserError(
            f"{source.name}: data.stream reads JSON Lines and Parquet ({', '.join((*LINES, PARQUET))}); "
            "convert the file, or leave data.stream out"
        )
    part = next((part for part in _address(source).split("/") if "::" in part), None)
    if part is not None:
        raise UserError(
            f"{source.name}: data.stream would read the '::' in {shorten(part)} as a chained address; "
            "rename the file or folder, or leave data.stream out"
        )


def _address(source: Source) -> str:
    return source.address or str(source.path.resolve())


def streamed_rows(source: Source, wanted: Iterable[str], skip: int = 0) -> Iterator[Row]:
    """Yield the rows of a file after the first ``skip``, with their numbers; of Parquet the wanted columns.

    Raises:
        UserError: ``datasets`` is not installed, the file cannot be read, or a line is not strict JSON; names
            file and line.
    """
    check_streamable(source)
    with _reading(source):
        if source.path.suffix.lower() == PARQUET:
            yield from _parquet_rows(source, wanted, skip)
        else:
            lines = (str(row["text"]) for row in _rows_after(skip, _open("text", source)))
            yield from jsonl_rows(_without_mark(lines) if skip == 0 else lines, source.name, skip + 1)


def _open(kind: str, source: Source, **options: Any) -> Any:
    """Open a file with ``datasets``."""
    try:
        import datasets
    except ImportError:
        raise UserError("data.stream needs datasets; run: pip install 'datasets>=4'") from None
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # opening a file must not ask for confirmation
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # a failure is raised too, and said in one line
    files = {"train": [glob.escape(_address(source))]}  # otherwise it would be taken for a pattern
    return datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **options)


def _rows_after(skip: int, opened: Any) -> Iterator[dict[str, Any]]:
    # Rows asked for one by one, instead of in batches, would be shared out among the workers of a loader.
    for batch in opened.with_format("arrow").skip(skip).iter(BATCH_ROWS):
        yield from batch.to_pylist()


def _parquet_rows(source: Source, wanted: Iterable[str], skip: int) -> Iterator[Row]:
    columns = _open("parquet", source).column_names or []
    chosen = [column for column in wanted if column in columns]
    if not chosen:
        found = ", ".join(map(shorten, columns[:6]))
        raise UserError(
            f"{source.name}: has no column of any format (found: {found}); name them in data.columns"
        )
    ignored = dict.fromkeys(column for column in columns if column not in chosen)
    opened = _open("parquet", source, columns=chosen, batch_size=BATCH_ROWS)
    for number, values in enumerate(_rows_after(skip, opened), start=skip + 1):
        yield number, ignored | {key: without_null(value) for key, value in values.items()}


def _without_mark(lines: Iterator[str]) -> Iterator[str]:
    """Remove the byte order mark from the first line."""
    for first in lines:
        yield first.removeprefix("\ufeff")
        break
    yield from lines


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Turn a failure while a file is read into one line."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{source.name}: not UTF-8: {error.reason}; save the file as UTF-8") from None
    except Exception as error:
        # The library reads through others, whose errors have no base in common.
        if not isinstance(error, (OSError, ValueError)) and _library(error) not in READERS:
            raise
        reason = (str(error).strip().splitlines() or ["no answer"])[0][:200]
        raise UserError(
            f"{source.name}: cannot be streamed ({type(error).__name__}: {reason}); check the file, and the "
            "network if it is on the Hub"
        ) from None


def _library(error: Exception) -> str:
    return type(error).__module__.split(".")[0]


@dataclass
class Stream:
    """The records of files in the order of a run, without end.

    Raises:
        UserError: the first file of a source has no record, or a file cannot be streamed.
    """

    files: list[Source]
    columns: Columns
    seed: int
    wanted: str = "auto"
    """The format of the records, as `records_of` takes it."""
    start: Place = field(default_factory=Place)
    """Where a resumed run continues reading."""
    most: int = field(default_factory=lambda: BUFFER)
    """Records of a buffer, at most."""

    def __post_init__(self) -> None:
        for file in self.files:
            check_streamable(file)
        self.formats = {file.number: self._format(file) for file in first_of_each(self.files)}
        """The format of each source's records, by its number."""

    def _format(self, file: Source) -> Recognised:
        first = next(self._rows(file, 0), None)
        if first is None:
            raise UserError(f"{file.name}: has no record; leave the file out")
        return recognise(first[1], self.columns, self.wanted)

    def _rows(self, file: Source, skip: int) -> Iterator[Row]:
        return streamed_rows(file, wanted_columns(self.columns), skip)

    def _records(self, place: Place) -> Iterator[tuple[int, AnyRecord]]:
        """Yield the records of the rest of an epoch, each with its file's number in the epoch's order."""
        order = np.random.default_rng((self.seed, place.epoch)).permutation(len(self.files))
        for shard in range(place.shard, len(order)):
            file = self.files[order[shard]]
            rows = self._rows(file, place.row if shard == place.shard else 0)
            known = self.formats[file.number]
            for record in records_of_rows(rows, file.name, self.columns, known, source=file.number):
                yield shard, record

    def buffers(self, place: Place) -> Iterator[tuple[Place, list[AnyRecord]]]:
        """Yield the buffers from ``place`` on, without end, with their places and their records in order.

        Raises:
            UserError: as `streamed_rows`, or a record is malformed or of another format.
        """
        while True:
            first = place
            for here, buffer in self._buffers_of_epoch(place):
                yield here, self._shuffled(here, buffer)
                place = Place(*here[:-1], record=here.record + len(buffer))
            if first.shard == first.row == 0 and place.record == first.record:
                raise UserError(f"{self.files[0].name}: has no record any more; start again")
            place = Place(epoch=place.epoch + 1, record=place.record)

    def _buffers_of_epoch(self, here: Place) -> Iterator[tuple[Place, list[AnyRecord]]]:
        buffer: list[AnyRecord] = []
        n_characters = 0
        for shard, record in self._records(here):
            buffer.append(record)
            n_characters += sum(map(len, record.texts))
            if len(buffer) == self.most or n_characters >= BUFFER_CHARACTERS:
                yield here, buffer
                n_before = here.record + len(buffer)
                here = Place(here.epoch, here.buffer + 1, shard, record.line, n_before)
                buffer, n_characters = [], 0
        if buffer:
            yield here, buffer

    def _shuffled(self, place: Place, buffer: list[AnyRecord]) -> list[AnyRecord]:
        order = np.random.default_rng((self.seed, place.epoch, place.buffer)).permutation(len(buffer))
        return [buffer[number] for number in order.tolist()]


class StreamReader:
    """Reads a stream forwards: the records of any step; to go back, it starts again."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.place: Place | None = None
        """The place of the buffer that the last record is in."""
        self._buffer: list[AnyRecord] = []
        self._buffers: Iterator[tuple[Place, list[AnyRecord]]] = iter(())

    def records(self, first: int, count: int) -> list[AnyRecord]:
        """Return ``count`` records of the run, from number ``first`` on."""
        return [self._record(number) for number in range(first, first + count)]

    def _record(self, number: int) -> AnyRecord:
        if self.place is None or number < self.place.record:
            start = self.stream.start
            self._buffers = self.stream.buffers(start if start.record <= number else Place())
            self.place, self._buffer = next(self._buffers)
        while number >= self.place.record + len(self._buffer):
            self.place, self._buffer = next(self._buffers)
        return self._buffer[number - self.place.record]
