"""The data module of a stream: steps are packed from records as they are read.

Step s has the records s * batch_size and following of the run; those with nothing to learn within
``data.max_length`` are left out, so that such a step is smaller. The position is a number of records, and the
`Place` from which they are read again. Every process and loader worker reads the whole stream, and encodes
and packs only the steps that it is asked for.

Settings that need all records are not offered: a number of epochs, weights, a part to hold out, duplicates.
The first records stand for all of them in what is printed and checked before training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from lit_adapter.data.encode import Encoded, encode_few
from lit_adapter.data.module import AlpacaDataModule, Remaining, share_of_rows
from lit_adapter.data.packing import Packer, StepBatch, share_of_step
from lit_adapter.data.recognise import each_once
from lit_adapter.data.record import AnyRecord
from lit_adapter.data.records import Records
from lit_adapter.data.sources import as_names, check_sources, sources_of, title
from lit_adapter.data.streaming import BUFFER, Place, Stream, StreamReader
from lit_adapter.data.worker import start_server
from lit_adapter.errors import UserError, counted
from lit_adapter.files.read import reading
from lit_adapter.model.attention import PackedRow

LOOKED_AT = 1000
"""First records, which stand for the whole stream."""
END_BYTES = 2**16
"""Bytes at the start and at the end of a local file by which a resumed run identifies it."""


class StreamDataModule(AlpacaDataModule):
    """Like its base class, for ``data.stream``; ``train_records`` are only the first ones."""

    def read(self) -> StreamDataModule:
        """Read the first records, and those that are held out; return this module.

        Raises:
            UserError: no file, records that cannot be read, or none that fits ``data.max_length``.
        """
        config = self.config
        check_sources(config)
        if self.row_tokens < config.max_length - 1:
            raise UserError(
                f"optim.row_tokens is {self.row_tokens}, but a record of a stream may take "
                f"{config.max_length - 1} tokens of a row; raise it, or lower data.max_length"
            )
        self.worker_context = start_server() if config.workers else None
        files = sources_of(config.train, self.say, stream=True)
        self.stream = Stream(files, config.columns, self.seed, config.format)
        name = f"{title(as_names(config.train))}, a stream of {counted(len(files), 'file')}; at its beginning"
        _, buffer = next(self.stream.buffers(Place()))
        rows = tuple(record for record in buffer[:LOOKED_AT] if not record.is_empty)
        n_empty = len(buffer[:LOOKED_AT]) - len(rows)
        self.train_records = Records(rows, name, n_empty, each_once(self.stream.formats.items()))
        self.train_encoded = self._encode_few(rows)
        self.val_records = self._records(config.val) if config.val else None
        self.val_encoded = self._encode(self.val_records) if self.val_records else None
        self.n_duplicate = self.n_overlap = self.n_held_out_too = 0
        self._prepare_packing()
        self.remarks.append(
            "the rest is read during training: files in random order, their records shuffled within "
            f"{BUFFER:,}; duplicates, and held-out records among them, are not counted"
        )
        return self

    @property
    def _encode_few(self) -> Callable[..., Encoded]:
        return partial(
            encode_few,
            tokenizer=self.tokenizer,
            template=self.template,
            max_length=self.config.max_length,
            last_answer_only=self.config.last_answer_only,
        )

    n_records = steps_per_epoch = None
    n_skipped = 0

    def first_steps(self, most: int) -> list[NDArray[np.int64]]:
        """Return the first records, divided as into steps."""
        step = self.train_encoded.source_row // self.batch_size
        return [np.flatnonzero(step == number) for number in np.unique(step)[:most]]

    @property
    def step_tokens(self) -> float:
        """The tokens of a step, on average."""
        n_read = len(self.train_records) + self.train_records.n_empty_output
        return self.batch_size * int(self.train_encoded.length.sum()) / n_read

    def rows_of_step(self, step: int) -> Iterator[tuple[str, PackedRow]]:
        """Yield each record of a step alone in a row, with the file and line it comes from."""
        records, packer = self.streamed_steps().read(step)
        for record, row in enumerate(packer.encoded.source_row.tolist()):
            yield records[row].origin, packer.row([record])

    def streamed_steps(self, rank: int = 0, n_processes: int = 1) -> StreamedSteps:
        """Return the run's optimizer steps, each with the rows of process ``rank`` of ``n_processes``."""
        reader = StreamReader(self.stream)
        return StreamedSteps(reader, self._encode_few, self._packer, self.batch_size, rank, n_processes)

    def train_dataloader(self) -> DataLoader[StepBatch]:
        """Return the loader of the steps that are not finished."""
        return self._loader(self.streamed_steps(*share_of_rows(self.trainer)), Remaining(self))

    def on_before_batch_transfer(self, batch: StepBatch | UserError, dataloader_idx: int) -> StepBatch:
        """Raise the error that a worker has found in the data.

        Raises:
            UserError: a record is malformed, or a file cannot be read.
        """
        if isinstance(batch, UserError):
            raise batch
        return batch

    def finish(self, batch: StepBatch) -> None:
        """Move the position behind a step."""
        super().finish(batch)
        self.stream.start = batch.place or Place()

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return super().state_dict() | {"place": [*self.stream.start]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last finished step."""
        super().load_state_dict(state_dict)
        self.stream.start = Place(*state_dict["place"])

    def identity(self) -> dict[str, Any]:
        """Return the data's part of the run identity: the files of the stream, and the held-out records."""
        files = self.stream.files
        facts = [
            file.address or f"{file.path.name} {file.path.stat().st_size} {file.number}" for file in files
        ]
        digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
        return {
            "streamed": f"{counted(len(files), 'file')}, {digest[:16]}",
            "file_contents": ends_sha256([file.path for file in files if not file.address])[:16],
            "val_records": self.val_records.sha256[:16] if self.val_records else None,
            "n_val_records": len(self.val_encoded) if self.val_encoded else 0,
        }


def ends_sha256(paths: Iterable[Path]) -> str:
    """Return a hash of the first and last `END_BYTES` of files.

    Raises:
        UserError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        with reading(path), path.open("rb") as file:
            digest.update(file.read(END_BYTES))
            file.seek(max(0, path.stat().st_size - END_BYTES))
            digest.update(file.read(END_BYTES))
    return digest.hexdigest()


@dataclass
class StreamedSteps(Dataset):
    """The optimizer steps of a run on a stream; item s is this process's share of step s."""

    reader: StreamReader
    encode: Callable[[list[AnyRecord]], Encoded]
    pack: Callable[[Encoded], Packer]
    batch_size: int
    rank: int = 0
    n_processes: int = 1

    def read(self, step: int) -> tuple[list[AnyRecord], Packer]:
        """Return the records of a step that have something to learn, and their packer.

        Raises:
            UserError: a record is malformed, or a file cannot be read.
        """
        every = self.reader.records(step * self.batch_size, self.batch_size)
        records = [record for record in every if not record.is_empty]
        return records, self.pack(self.encode(records))

    def __getitem__(self, step: int) -> StepBatch | UserError:
        try:
            _, packer = self.read(step)
        except UserError as error:  # raised here, in a worker, it would come with a traceback
            return error
        records = np.arange(len(packer.encoded))
        batch = share_of_step(packer, records, step, self.rank, self.n_processes)
        # A step may have nothing to learn; its loss is then 0, and not 0 / 0.
        batch.n_targets = max(1, batch.n_targets)
        batch.place = self.reader.place
        return batch
