"""The Lightning data module: reads records, gives packed optimizer steps, and keeps the position in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from lit_adapter.config import DataConfig
from lit_adapter.data.encode import Encoded, encode_records
from lit_adapter.data.mixing import EpochOrder
from lit_adapter.data.packing import Packer, StepBatch, TrainingSteps, ValidationSteps, shared_preambles
from lit_adapter.data.records import Records, overlap, source_numbers, split_rows
from lit_adapter.data.sources import check_sources, load_records
from lit_adapter.data.worker import follow_parent, start_server
from lit_adapter.errors import UserError
from lit_adapter.files.paths import cache_folder
from lit_adapter.model.attention import PackedRow
from lit_adapter.streams import Say
from lit_adapter.text.template import Template
from lit_adapter.text.tokenizer import Tokenizer


def share_of_rows(trainer: Trainer | None) -> tuple[int, int]:
    """Return the number of this process's share of a step's rows, and the number of shares."""
    strategy = trainer.strategy if trainer is not None else None
    if not isinstance(strategy, ParallelStrategy):
        return 0, 1
    share = strategy.distributed_sampler_kwargs  # tensor-parallel processes have the same rows
    return share["rank"], share["num_replicas"]


class AlpacaDataModule(LightningDataModule):
    """Records of any format as packed optimizer steps; checkpoints hold this class's name.

    The position, in finished optimizer steps, is in this module's state and not in the loader: a resumed run
    starts its sampler after the last finished step, whatever had been prefetched before the stop.

    ``tokenizer_key``, the tokenizer's fingerprint with its BOS and EOS, is for the cache. ``batch_size``
    counts the records of an optimizer step over all processes (0 until it is chosen), ``row_tokens`` the
    tokens of the longest packed row. ``seed`` decides the order of the records and the split.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        tokenizer: Tokenizer,
        template: Template,
        tokenizer_key: str,
        batch_size: int,
        row_tokens: int,
        seed: int = 0,
        say: Say = print,
    ) -> None:
        super().__init__()
        self.config, self.tokenizer, self.template = config, tokenizer, template
        self.tokenizer_key, self.say = tokenizer_key, say
        self.batch_size, self.row_tokens, self.seed = batch_size, row_tokens, seed
        self.finished_steps = 0
        self.total_steps = 0
        self.remarks: list[str] = []
        """Remarks to print beside the counts."""

    def read(self) -> AlpacaDataModule:
        """Read, split and encode the records, which everything else needs; return this module.

        Raises:
            UserError: no file, records that cannot be read, or no record that fits ``data.max_length``.
        """
        check_sources(self.config)
        # Started before the reading, so that its imports are done by the time a loader needs a worker.
        self.worker_context = start_server() if self.config.workers else None
        records = self._records(self.config.train)
        self.whole_sha256, self.n_whole = records.sha256, len(records)
        self.n_of_sources = (
            np.bincount(source_numbers(records.rows)).tolist() if self.config.weights else None
        )
        encoded = self._encode(records)
        rows = np.arange(len(records))
        self.val_records: Records | None = None
        self.val_encoded: Encoded | None = None
        if self.config.val:
            self.val_records = self._records(self.config.val)
            self.val_encoded = self._encode(self.val_records)
        elif self.config.val_size:
            rows, held_out = split_rows(records, val_size=self.config.val_size, seed=self.seed)
            self.val_records = records.choose(held_out, f"{records.source} (validation)")
            self.val_encoded = encoded.choose(held_out, len(records))
        rows = self._without_duplicates(records, rows)
        if len(rows) < len(records):
            n_empty, source = records.n_empty_output, f"{records.source} (train)"
            records, encoded = records.choose(rows, source, n_empty), encoded.choose(rows, len(records))
        self.train_records, self.train_encoded = records, encoded
        self._prepare_packing()
        return self

    def _records(self, given: list[str] | str) -> Records:
        config = self.config
        return load_records(given, config.columns, config.format, cache=cache_folder(), say=self.say)

    def _without_duplicates(self, records: Records, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count training records that repeat others, and held-out records among them; drop them if asked.

        Raises:
            UserError: none is left.
        """
        train = records.choose(rows, records.source)
        self.n_duplicate, self.n_overlap, self.n_held_out_too = train.n_duplicate, 0, 0
        keep = train.is_first
        if self.val_records is not None:
            self.n_overlap = int(overlap(self.val_records, train).sum())
            is_held_out = overlap(train, self.val_records)
            self.n_held_out_too = int((keep & is_held_out).sum())
            keep = keep & ~is_held_out
        if not self.config.drop_duplicates:
            return rows
        if not keep.any():
            raise UserError(
                f"data.drop_duplicates leaves no training record of {records.source}: all of them are held "
                "out too; give other data, or leave it out"
            )
        return rows[keep]

    def _encode(self, records: Records) -> Encoded:
        return encode_records(
            records,
            self.tokenizer,
            self.template,
            max_length=self.config.max_length,
            cache=cache_folder(),
            tokenizer_key=self.tokenizer_key,
            last_answer_only=self.config.last_answer_only,
            say=self.say,
        )

    def _prepare_packing(self) -> None:
        """Make the packers of what was read; a UserError says that none of it fits ``data.max_length``."""
        train, val = (self.train_records, self.train_encoded), (self.val_records, self.val_encoded)
        for records, encoded in (train, val):
            if records is not None and not encoded:
                raise UserError(
                    f"{records.source}: every answer is longer than data.max_length "
                    f"{self.config.max_length}; raise it"
                )
        self.preambles = shared_preambles(self.train_encoded)
        self.train_packer = self._packer(self.train_encoded)
        self.val_packer = self._packer(self.val_encoded) if self.val_encoded else None

    @property
    def _packer(self) -> Callable[[Encoded], Packer]:
        """What packs encoded records; workers get it too."""
        return partial(
            Packer,
            preambles=self.preambles,
            mask_prompt=self.config.mask_prompt,
            row_tokens=self.row_tokens,
        )

    @property
    def n_skipped(self) -> int:
        """The number of records that each epoch skips, because they do not fill a step."""
        return len(self.train_encoded) % self.batch_size

    @property
    def n_records(self) -> int | None:
        """The number of training records; None where it is not known."""
        return len(self.train_encoded)

    @property
    def steps_per_epoch(self) -> int | None:
        """The optimizer steps of an epoch; None where the number of records is not known."""
        return self.training_steps().steps_per_epoch

    @property
    def step_tokens(self) -> float:
        """The tokens of a step, on average."""
        return self.batch_size * float(self.train_encoded.length.mean())

    def first_steps(self, most: int) -> list[NDArray[np.int64]]:
        """Return the records of the first steps, ``most`` or an epoch, as `train_packer` knows them."""
        steps = self.training_steps()
        return [steps.records(step) for step in range(min(most, steps.steps_per_epoch))]

    def rows_of_step(self, step: int) -> Iterator[tuple[str, PackedRow]]:
        """Yield each record of a step alone in a row, with the file and line it comes from."""
        for record in self.training_steps().records(step).tolist():
            yield self.origin(record), self.train_packer.row([record])

    def training_steps(self, rank: int = 0, n_processes: int = 1) -> TrainingSteps:
        """Return the run's optimizer steps, each with the rows of process ``rank`` of ``n_processes``."""
        return TrainingSteps(
            self.train_packer,
            batch_size=self.batch_size,
            order=self.epoch_order(),
            rank=rank,
            n_processes=n_processes,
        )

    def epoch_order(self) -> EpochOrder:
        """Return the order of the training records in each epoch."""
        rows, weights, source = self.train_encoded.source_row, self.config.weights, None
        if weights is not None:
            source = source_numbers(self.train_records.rows)[rows]
        return EpochOrder(len(rows), self.seed, source, weights)

    def train_dataloader(self) -> DataLoader[StepBatch]:
        """Return the loader of the steps that are not finished."""
        steps = self.training_steps(*share_of_rows(self.trainer))
        return self._loader(steps, Remaining(self))

    def val_dataloader(self) -> DataLoader[StepBatch] | list[Any]:
        """Return the loader of the held-out records."""
        if self.val_packer is None:
            return []
        rank, n_processes = share_of_rows(self.trainer)
        steps = ValidationSteps(
            self.val_packer, batch_size=max(self.batch_size, 32), rank=rank, n_processes=n_processes
        )
        return self._loader(steps, range(len(steps)))

    def _loader(self, steps: torch.utils.data.Dataset, sampler: Any) -> DataLoader[StepBatch]:
        return DataLoader(
            steps,
            sampler=sampler,
            batch_size=None,
            num_workers=self.config.workers,
            multiprocessing_context=self.worker_context,
            worker_init_fn=follow_parent,
            # A generator of its own, so that an iteration draws no seed from the global one.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def finish(self, batch: StepBatch) -> None:
        """Move the position past a step."""
        self.finished_steps = batch.step + 1

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"finished_steps": self.finished_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last finished step."""
        self.finished_steps = state_dict["finished_steps"]

    def origin(self, record: int) -> str:
        """Return the file and line of a training record, for messages."""
        return self.train_records[int(self.train_encoded.source_row[record])].origin

    def identity(self) -> dict[str, Any]:
        """Return the data's part of the run identity, which determines the records of every step."""
        return {
            "records": self.train_records.sha256[:16],
            "n_records": len(self.train_encoded),
            "val_records": self.val_records.sha256[:16] if self.val_records else None,
            "n_val_records": len(self.val_encoded) if self.val_encoded else 0,
            "file": self.whole_sha256[:16],
            "n_file": self.n_whole,
            "sources": self.n_of_sources,
        }


class Remaining(Sampler[int]):
    """The indices of the run's steps that are not finished; its length is that of the whole run."""

    def __init__(self, module: AlpacaDataModule) -> None:
        self.module = module

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.module.finished_steps, self.module.total_steps))

    def __len__(self) -> int:
        return self.module.total_steps
