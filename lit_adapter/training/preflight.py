"""What can be known before the first step: whether memory, disk and data suffice. A few seconds at most.

What cannot work is refused here, with the two settings that would make it work. Memory and disk are asked
by arithmetic before the base is loaded (see `memory`); the data by running its first and its longest record
through the loaded model. A base that is cut over processes is loaded when they are connected: its records
wait until then, and still run before anything is written.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from lit_adapter.config import Config
from lit_adapter.data.module import AlpacaDataModule
from lit_adapter.device import free_bytes, own_device
from lit_adapter.errors import UserError
from lit_adapter.files.space import free_disk
from lit_adapter.model.adapter import adapter_shapes
from lit_adapter.model.config import AdapterConfig, LlamaConfig
from lit_adapter.model.llama import Llama
from lit_adapter.model.loss import row_loss
from lit_adapter.training.memory import Memory, RowShape, estimate, path_of
from lit_adapter.training.strategy import is_sharded, n_processes, whole_because

STEPS_LOOKED_AT = 3
HEADERS = 65_536
"""Bytes of a checkpoint or adapter beside its tensors, at most."""
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Sizes:
    """What the memory of a step depends on; a setting is tried by replacing one of them."""

    model: LlamaConfig
    adapter: AdapterConfig
    row: RowShape
    longest: int
    """Tokens of the longest record: no row can be shorter."""
    precision: str
    device: str = "cpu"
    recompute: bool = False
    shards: int = 1
    tensor_parallel: int = 1
    may_be_cut_over: int = 1
    """Devices of each node that could share the base; 1 where it has to be whole."""

    @property
    def memory(self) -> Memory:
        """What a step needs."""
        path = path_of(self.model, self.adapter, self.precision, self.device, self.tensor_parallel)
        return estimate(
            self.model,
            self.adapter,
            self.row,
            precision=self.precision,
            path=path,
            recompute=self.recompute,
            shards=self.shards,
            tensor_parallel=self.tensor_parallel,
        )

    def with_tokens(self, tokens: int) -> Sizes:
        """Return the same with a row of ``tokens``."""
        return replace(self, row=self.row.scaled(tokens))

    def with_layers(self, layers: int) -> Sizes:
        """Return the same with ``layers`` adapted layers."""
        return replace(self, adapter=replace(self.adapter, layers=layers))


def sizes(
    model: LlamaConfig,
    config: Config,
    data: AlpacaDataModule,
    precision: str,
    device: str,
    shards: int = 1,
) -> Sizes:
    """Return the sizes of the hungriest row of the first steps, or of the longest record alone."""
    steps, packer = data.training_steps(), data.train_packer
    longest = int(packer.encoded.length.argmax())
    rows = [[longest]]
    for step in range(min(STEPS_LOOKED_AT, steps.steps_per_epoch)):
        rows.append(max(packer.assign(steps.records(step)), key=packer.row_length))
    shapes = [RowShape.of(packer.row(row)) for row in rows]
    n_tokens, options = int(packer.encoded.length[longest]), config.trainer
    whole = device != "cuda" or whole_because(options)
    layout = (options.recompute, shards, options.tensor_parallel, 1 if whole else torch.cuda.device_count())
    found = [Sizes(model, config.adapter, shape, n_tokens, precision, device, *layout) for shape in shapes]
    return max(found, key=lambda one: one.memory.total)


def check_space(
    config: Config,
    model: LlamaConfig,
    data: AlpacaDataModule,
    steps: int,
    precision: str,
    device: torch.device,
    say: Callable[[str], None],
) -> Sizes:
    """Compare memory and disk with what a run of ``steps`` needs, and say both.

    Raises:
        UserError: as `check_memory` and `check_disk`.
    """
    options = config.trainer
    processes = n_processes(options, device)
    needed = sizes(model, config, data, precision, device.type, processes if is_sharded(options) else 1)
    free, sharing = free_bytes(own_device(device)), 1
    if free is not None and device.type == "cpu":  # the processes of a machine share its memory
        sharing = processes // options.num_nodes
        free //= sharing
    say(check_memory(needed, free, sharing))
    say(check_disk(Path(config.out), model, config, steps))
    return needed


def check_memory(needed: Sizes, free: int | None, sharing: int = 1) -> str:
    """Return a line about the memory of a step.

    Args:
        needed: of one process.
        free: bytes that it can still have; None if the system does not say.
        sharing: processes that share a memory, each with so many bytes of it.

    Raises:
        UserError: more than is free; names two settings that would fit.
    """
    each = f" for each of {sharing} processes" if sharing > 1 else ""
    memory = needed.memory
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in vars(memory).items())
    line = f"memory: about {gigabytes(memory.total)} on the {needed.device} ({parts})"
    if free is None:
        return line
    if memory.total > free:
        advice = " or ".join(remedies(needed, free)) or "a smaller base, or a device with more memory,"
        raise UserError(f"{line}, but {gigabytes(free)} are free{each}; {advice} would fit")
    return f"{line}; {gigabytes(free)} are free{each}"


def remedies(needed: Sizes, free: int) -> list[str]:
    """Return two settings that bring a step below ``free`` bytes, alone or in pairs.

    Where there are several GPUs, the second is to cut the base over more of them.
    """
    others = {"": needed}
    if not needed.recompute:
        others["trainer.recompute true"] = replace(needed, recompute=True)
    if needed.precision != "bf16-true":
        others["trainer.precision bf16-true"] = replace(needed, precision="bf16-true")
    most_layers = len(needed.adapter.adapted_layers(needed.model.n_layer)) - 1
    found: list[str] = []
    for other, start in others.items():
        together = f" with {other}" if other else ""
        if other and start.memory.total <= free:
            found.append(other)
        tokens = _largest(needed.longest, needed.row.tokens - 1, free, start.with_tokens)
        if tokens is not None:
            found.append(f"optim.row_tokens {tokens}{together}")
        layers = _largest(1, most_layers, free, start.with_layers)
        if layers is not None:
            found.append(f"adapter.layers {layers}{together}")
    cut = _cut(needed, free)
    return [*found[:1], cut] if cut else found[:2]


def _cut(needed: Sizes, free: int) -> str | None:
    """Return the fewest devices that a base can be cut over so that a step fits, as settings."""
    if needed.may_be_cut_over < 2:
        return None
    most = needed.may_be_cut_over
    for shards in (*(n for n in (2, 4, 8) if n < most), most, 2 * most, 4 * most, 8 * most):
        devices = min(shards, most)
        if devices % needed.tensor_parallel:
            continue
        if shards > needed.shards and replace(needed, shards=shards).memory.total <= free:
            nodes = f" with trainer.num_nodes {shards // devices}" if shards > devices else ""
            return f"trainer.strategy fsdp2 with trainer.devices {devices}{nodes}"
    return None


def _largest(least: int, most: int, free: int, with_value: Callable[[int], Sizes]) -> int | None:
    """Return the largest value from ``least`` to ``most`` that fits; memory grows with it."""
    if most < least or with_value(least).memory.total > free:
        return None
    while least < most:
        middle = (least + most + 1) // 2
        if with_value(middle).memory.total <= free:
            least = middle
        else:
            most = middle - 1
    return least


def run_bytes(model: LlamaConfig, config: Config, steps: int) -> int:
    """Return about what a run writes into its folder: checkpoints, two adapters and curves."""
    trained = sum(math.prod(shape) for shape in adapter_shapes(config.adapter, model).values())
    layers = len(config.adapter.adapted_layers(model.n_layer))
    adapter = 4 * trained + HEADERS
    checkpoint = 12 * trained + HEADERS  # with AdamW's two averages
    point = 100 * (12 + 2 * layers) + 4 * layers * model.n_head  # numbers, and a picture of the gates
    # A new checkpoint or adapter lies beside the old one until it is whole.
    return (
        (config.trainer.keep_checkpoints + 1) * checkpoint
        + 3 * adapter
        + point * (steps // config.trainer.log_every + 1)
    )


def check_disk(folder: Path, model: LlamaConfig, config: Config, steps: int) -> str:
    """Return a line about the disk space of a run.

    Raises:
        UserError: more than is free; names two settings that would fit.
    """
    needed = run_bytes(model, config, steps)
    free = free_disk(folder)
    line = f"disk: the run writes about {needed:,} bytes into {folder}"
    if needed <= free:
        return f"{line}; {free:,} are free"
    fewer = replace(config, trainer=replace(config.trainer, keep_checkpoints=1))
    rarer = replace(config, trainer=replace(config.trainer, log_every=max(10, steps // 10)))
    tries = {"trainer.keep_checkpoints 1": fewer, f"trainer.log_every {rarer.trainer.log_every}": rarer}
    found = [name for name, other in tries.items() if run_bytes(model, other, steps) <= free]
    raise UserError(
        f"{line}, but {free:,} are free; {' or '.join([*found[:1], '--out on another disk'])} would do"
    )


def check_records(model: Llama, data: AlpacaDataModule, needed: Sizes) -> None:
    """Run the data's first and longest record through the model.

    Raises:
        UserError: a loss that is not finite, or memory that does not suffice after all.
    """
    encoded, precision = data.train_encoded, needed.precision
    device = model.embed_tokens.weight.device.type
    records = dict.fromkeys([0, int(encoded.length.argmax())])
    lower = torch.autocast(device, AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST)
    with torch.no_grad(), lower, enough_memory(needed):
        for record in records:
            loss = float(row_loss(model, data.train_packer.row([record])))
            if not math.isfinite(loss):
                wider = "" if precision == "32-true" else "use trainer.precision 32-true, or "
                raise UserError(
                    f"{data.origin(record)}: the loss on this record is {loss} under trainer.precision "
                    f"{precision}; {wider}convert the base again"
                )


class FirstRecords(Callback):
    """`check_records` for a base that is loaded when the processes are connected; all of them run it."""

    def __init__(self, data: AlpacaDataModule, needed: Sizes) -> None:
        self.data, self.needed = data, needed

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Run the records."""
        check_records(pl_module.model, self.data, self.needed)


@contextmanager
def enough_memory(needed: Sizes) -> Iterator[None]:
    """Turn an allocation that fails, here or in a loader process, into one line with settings that need less.

    Raises:
        UserError: instead of torch's own error.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if "DataLoader worker" in text:
            # torch's handler raises for every one that dies, wherever the run is; `Signals` puts it back.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise UserError(
                f"a loader process was killed, perhaps for want of memory ({text[:120]}); "
                "lower data.workers or free memory; --resume last goes on from the last checkpoint "
                '(a Python script that calls this needs `if __name__ == "__main__":`)'
            ) from None
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in text:
            raise
        fewer = needed.memory.total - needed.memory.activations // 2
        advice = " or ".join(remedies(needed, fewer)) or "a smaller base, or a device with more memory"
        raise UserError(f"out of memory ({text[:160]}); try {advice}; checkpoints are unaffected") from None


def gigabytes(size: int) -> str:
    """Return a size as people read it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
