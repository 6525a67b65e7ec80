"""The frozen trunk computed once: its hidden states are kept on disk, and every epoch reads them.

Below the first adapted layer nothing learns, so what enters that layer is the same in every epoch. With L of
N layers adapted a step costs about 2 L layers' products instead of N + L (no weight has a gradient), after
one pass of N - L. Exact: the numbers are those of the same layers, rounded as they would be in another row.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback

from lit_adapter.config import Config
from lit_adapter.data.module import AlpacaDataModule, share_of_rows
from lit_adapter.data.packing import Packer, StepBatch, ValidationSteps
from lit_adapter.data.trunk_file import TrunkFile
from lit_adapter.errors import UserError
from lit_adapter.files import durable_path, free_disk
from lit_adapter.model.attention import PackedRow
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.loss import row_trunk
from lit_adapter.training.processes import agree
from lit_adapter.training.signals import Signals

FORMAT_VERSION = 1
RECORDS_AT_ONCE = 256


def trunk_files(
    config: Config, base: LlamaConfig, data: AlpacaDataModule, precision: str, facts: dict[str, Any]
) -> list[tuple[Packer, TrunkFile]]:
    """Return the files of a run's training and held-out records; none where no cache is wanted.

    Args:
        config: of the run.
        base: the base's sizes.
        data: of the run.
        precision: as Lightning calls it.
        facts: whatever else the numbers depend on.

    Raises:
        UserError: no layer is below the first adapted one.
    """
    if config.trainer.trunk_cache is None:
        return []
    first = config.adapter.adapted_layers(base.n_layer).start
    if config.adapter.version != "v1" or first == 0:
        raise UserError(
            "trainer.trunk_cache is set, but every layer of the base learns, so that nothing can be kept; "
            f"leave it out, or adapt fewer than {base.n_layer} layers (adapter.layers, version v1)"
        )
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    facts = {**facts, "version": FORMAT_VERSION, "layer": first, "precision": precision}
    packers = [data.train_packer] + ([data.val_packer] if data.val_packer is not None else [])
    found = []
    for packer in packers:
        lengths, key = packer.part_lengths, _key(packer, facts)
        path = Path(config.trainer.trunk_cache) / f"trunk-{key[:32]}.safetensors"
        found.append((packer, TrunkFile(path, lengths, base.n_embd, dtype, key)))
    return found


def _key(packer: Packer, facts: dict[str, Any]) -> str:
    encoded = packer.encoded
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for array in (encoded.ids, encoded.start, packer.n_head):
        digest.update(array.tobytes())
    return digest.hexdigest()


def check_room(found: list[tuple[Packer, TrunkFile]], say: Callable[[str], None]) -> None:
    """Say how large the files are that are not there yet.

    Raises:
        UserError: larger than the free space of their disk.
    """
    wanted = [file for _, file in found if not file.is_there()]
    if not wanted:
        return
    folder, size = wanted[0].path.parent, sum(file.n_bytes for file in wanted)
    free = free_disk(folder)
    line = f"trunk cache: {size:,} bytes into {folder}"
    if size > free:
        raise UserError(
            f"{line}, but {free:,} are free; name a folder on another disk, or leave out trainer.trunk_cache"
        )
    say(f"{line}; {free:,} are free")


class TrunkCache(Callback):
    """Fills the files that are missing before the first step, all processes together, and has them read.

    Args:
        found: files by packer, from `trunk_files`.
        signals: a stop ends the filling; what is not whole is not kept.
        say: gets a line before and after.
    """

    def __init__(
        self, found: list[tuple[Packer, TrunkFile]], signals: Signals, say: Callable[[str], None]
    ) -> None:
        self.found, self.signals, self.say = found, signals, say

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the files, then read from them."""
        for packer, file in self.found:
            if not trainer.strategy.broadcast(file.is_there()):
                with suppress(_Stopped):
                    self._make(trainer, pl_module, packer, file)
            if not self.signals.agreed:
                self._use(packer, file)

    def _use(self, packer: Packer, file: TrunkFile) -> None:
        if not file.is_there():
            raise UserError(f"{file.path}: not to be seen from this node; name a folder that all nodes share")
        packer.trunk = file

    def _make(self, trainer: Any, module: Any, packer: Packer, file: TrunkFile) -> None:
        start = time.perf_counter()
        self.say(f"trunk cache: computing {file.n_tokens:,} tokens' hidden states once: {file.path}")
        with _written_together(trainer, file) as path:
            descriptor = os.open(path, os.O_WRONLY)
            try:
                self._fill(trainer, module, packer, file, descriptor)
            finally:
                os.close(descriptor)
        self.say(f"trunk cache: {file.n_bytes:,} bytes in {time.perf_counter() - start:.0f} s")

    def _fill(self, trainer: Any, module: Any, packer: Packer, file: TrunkFile, descriptor: int) -> None:
        """Write this process's share of the parts; every process runs as many rows."""
        writes = trainer.global_rank % module.n_copies == 0  # once, of those that compute the same rows
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for row, parts, wanted in _rows(packer, *share_of_rows(trainer)):
                agree(trainer, module.device, self.signals)
                if self.signals.agreed:
                    raise _Stopped
                hidden = row_trunk(module.model, row)
                file.write(descriptor, parts, wanted if writes else (), hidden)


class _Stopped(Exception):  # noqa: N818 (no error: a signal)
    """A signal has come while a file was filled."""


def _rows(packer: Packer, rank: int, n_processes: int) -> Iterator[tuple[PackedRow, list[int], set[int]]]:
    """Yield rows, what they consist of, and which of that this process is to write.

    Shared heads lie in many rows; they are written by the first process, from a row of their first record.
    """
    n_records = len(packer.encoded)
    for variant in packer.heads:
        headed = np.flatnonzero((packer.encoded.variant == variant) & (packer.n_head > 0))
        for record in headed[:1].tolist():
            yield packer.row([record]), packer.parts([record]), {n_records + variant} if rank == 0 else set()
    steps = ValidationSteps(packer, batch_size=RECORDS_AT_ONCE, rank=rank, n_processes=n_processes)
    for number in range(len(steps)):
        step: StepBatch = steps[number]
        for row, records in zip(step.rows, step.records, strict=True):
            yield row, packer.parts(records), set(records)


@contextmanager
def _written_together(trainer: Any, file: TrunkFile) -> Iterator[Path]:
    """Yield the path of a temporary file that all processes write to; renamed when all have."""
    strategy = trainer.strategy
    if not trainer.is_global_zero:
        yield Path(strategy.broadcast(""))
        strategy.barrier()
    else:
        with durable_path(file.path, needed=file.n_bytes) as temporary:
            file.reserve(temporary)
            strategy.broadcast(str(temporary))
            yield temporary
            strategy.barrier()
    strategy.barrier()  # the first process has renamed it
