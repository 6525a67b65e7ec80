"""What is checked before the first step: memory, disk and data. It takes a few seconds at most.

A run that cannot work is refused here, with settings that would work. Memory and disk are compared with what
is free before the base is loaded (see `memory`); of the data, the first and the longest record run through
the loaded model. A sharded base is loaded once the processes are connected, so its records run then, still
before anything is written.
"""

from __future__ import annotations

import math
import signal
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from lit_adapter import streams
from lit_adapter.config import Config, TrainerConfig
from lit_adapter.data.module import AlpacaDataModule
from lit_adapter.device import free_bytes, own_device
from lit_adapter.errors import UserError
from lit_adapter.files.space import free_disk
from lit_adapter.model.adapter import adapter_parameters, adapter_shapes
from lit_adapter.model.config import LlamaConfig
from lit_adapter.model.executors import KernelError, despite_kernels, give_up_kernels
from lit_adapter.model.layout import n_numbers
from lit_adapter.model.llama import Llama
from lit_adapter.model.loss import row_loss
from lit_adapter.training.lightning_internals import rank
from lit_adapter.training.memory import Sizes
from lit_adapter.training.module import WITHOUT_KERNELS
from lit_adapter.training.placement import Placement
from lit_adapter.training.strategy import is_sharded, n_processes, n_shares, processes_per_node, whole_because

STEPS_LOOKED_AT, RECORDS_LOOKED_AT = 100, 20_000
"""How much of a run's start is searched for its longest row."""
HEADERS = 65_536
"""Most bytes of a checkpoint or adapter file that are not tensors."""
WHOLE_SHARE = 0.9
"""Of the memory that is free: what a step may need with the layers that `with_whole_layers` adds."""
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def sizes(config: Config, model: LlamaConfig, data: AlpacaDataModule, placement: Placement) -> Sizes:
    """Return the sizes of the first steps' longest row, or of the longest record's if that needs more."""
    packer, options = data.train_packer, config.trainer
    device = placement.device
    shares = n_shares(options, device)
    alone = [int(packer.encoded.length.argmax())]
    n_steps = min(STEPS_LOOKED_AT, RECORDS_LOOKED_AT // data.batch_size + 1)
    rows = [row for records in data.first_steps(n_steps) for row in packer.assign(records, shares)]
    longest, fullest = packer.row(alone), packer.row(max([alone, *rows], key=packer.row_length))
    whole = device.type != "cuda" or whole_because(options)
    needed = Sizes(
        model,
        config.adapter,
        fullest,
        longest,
        placement.precision,
        device.type,
        recompute=options.recompute,
        shards=n_processes(options, device) if is_sharded(options) else 1,
        tensor_parallel=options.tensor_parallel,
        shardable_over=1 if whole else torch.cuda.device_count(),
    )
    least = replace(needed, row=longest)
    if data.n_records is None and len(fullest.ids) > len(longest.ids):  # later records may fill a row
        needed = replace(needed, tokens=data.row_tokens)
    return max(needed, least, key=lambda one: one.memory.total)


def free_memory(options: TrainerConfig, device: torch.device) -> tuple[int | None, int]:
    """Return the bytes that each process can still have, None if unknown, and how many share the memory."""
    free = free_bytes(own_device(device))
    sharing = 1 if free is None or device.type != "cpu" else processes_per_node(options, device)
    return free and free // sharing, sharing


def with_whole_layers(needed: Sizes, options: TrainerConfig, free: int | None) -> Sizes:
    """Return the sizes with the whole layers of ``trainer.whole_layers``: by default as many as fit a GPU."""
    if not needed.gathers:
        return needed
    if isinstance(options.whole_layers, int):
        return replace(needed, whole_layers=options.whole_layers)
    if free is None or needed.device != "cuda":
        return needed
    tries = [replace(needed, whole_layers=n) for n in range(1, needed.model.n_layer + 1)]
    return next((more for more in reversed(tries) if more.memory.total <= WHOLE_SHARE * free), needed)


def check_memory(needed: Sizes, free: int | None, sharing: int = 1) -> str:
    """Return a line about the memory of a step.

    Each of ``sharing`` processes can have ``free`` bytes; None if the system does not say.

    Raises:
        UserError: more is needed than is free; names two settings that would fit.
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

    If there are several GPUs, the second one is to shard the base over more of them.
    """
    found, sharding = list(islice(_fitting(needed, free), 2)), _sharding(needed, free)
    return [*found[:1], sharding] if sharding else found


def _fitting(needed: Sizes, free: int) -> Iterator[str]:
    """Yield settings that fit, the mildest first; memory grows with tokens and with layers."""
    tokens = range(len(needed.longest.ids), len(needed.row.ids))
    layers = range(1, len(needed.adapter.adapted_layers(needed.model.n_layer)))
    if needed.whole_layers and replace(needed, whole_layers=0).memory.total <= free:
        yield "trainer.whole_layers 0"
    others = {"": needed}
    if not needed.recompute:
        others["trainer.recompute true"] = replace(needed, recompute=True)
    if needed.precision != "bf16-true":
        others["trainer.precision bf16-true"] = replace(needed, precision="bf16-true")
    for other, start in others.items():
        together = f" with {other}" if other else ""
        if other and start.memory.total <= free:
            yield other
        if n := bisect_right(tokens, free, key=lambda n: replace(start, tokens=n).memory.total):
            yield f"optim.row_tokens {tokens[n - 1]}{together}"
        if n := bisect_right(layers, free, key=lambda n: with_layers(start, n).memory.total):
            yield f"adapter.layers {layers[n - 1]}{together}"


def with_layers(needed: Sizes, layers: int) -> Sizes:
    """Return the same sizes with ``layers`` adapted layers."""
    return replace(needed, adapter=replace(needed.adapter, layers=layers))


def _sharding(needed: Sizes, free: int) -> str | None:
    """Return the fewest devices over which the base can be sharded so that a step fits, as settings."""
    per_node = needed.shardable_over
    if per_node < 2:
        return None
    layouts = [(n, 1) for n in (2, 4, 8) if n < per_node] + [(per_node, nodes) for nodes in (1, 2, 4, 8)]
    for devices, nodes in layouts:
        more = replace(needed, shards=devices * nodes, whole_layers=0)
        possible = devices % needed.tensor_parallel == 0 and more.shards > needed.shards
        if possible and more.memory.total <= free:
            on_nodes = f" with trainer.num_nodes {nodes}" if nodes > 1 else ""
            return f"trainer.strategy fsdp2 with trainer.devices {devices}{on_nodes}"
    return None


def run_bytes(model: LlamaConfig, config: Config, steps: int) -> int:
    """Return approximately the bytes of a run's checkpoints, adapters and curves."""
    trained = n_numbers(adapter_shapes(config.adapter, model))
    layers = len(config.adapter.adapted_layers(model.n_layer))
    adapter = 4 * trained + HEADERS
    checkpoint = 12 * trained + HEADERS  # the adapter and AdamW's two averages
    point = 100 * (12 + 2 * layers) + 4 * layers * model.n_head  # numbers, and a picture of the gates
    # The old checkpoint or adapter file stays until the new one is complete.
    return (
        (config.trainer.keep_checkpoints + 1) * checkpoint
        + 3 * adapter
        + point * (steps // config.trainer.log_every + 1)
    )


def check_disk(folder: Path, model: LlamaConfig, config: Config, steps: int) -> str:
    """Return a line about the disk space that a run needs.

    Raises:
        UserError: more is needed than is free; names two settings that would fit.
    """
    needed = run_bytes(model, config, steps)
    free = free_disk(folder)
    line = f"disk: the run writes about {gigabytes(needed)} into {folder}"
    if needed <= free:
        return f"{line}; {gigabytes(free)} are free"
    fewer = replace(config, trainer=replace(config.trainer, keep_checkpoints=1))
    rarer = replace(config, trainer=replace(config.trainer, log_every=max(10, steps // 10)))
    tries = {"trainer.keep_checkpoints 1": fewer, f"trainer.log_every {rarer.trainer.log_every}": rarer}
    found = [name for name, other in tries.items() if run_bytes(model, other, steps) <= free]
    advice = " or ".join([*found[:1], "--out on another disk"])
    raise UserError(f"{line}, but {gigabytes(free)} are free; {advice} would do")


def check_kernels(model: Llama, data: AlpacaDataModule, needed: Sizes) -> None:
    """Compile the kernels of a step on the data's first record; without them, the modules compute the run."""
    parameters = [parameter for _, parameter in adapter_parameters(model)]
    row = data.train_packer.row([0])
    try:
        with enough_memory(needed):
            loss = row_loss(model, row, recompute=needed.recompute)
            # A record may leave some without a gradient.
            torch.autograd.grad(loss, parameters, allow_unused=True)
    except KernelError as error:
        _leave_to_modules(model, error)


def _leave_to_modules(model: Llama, error: KernelError) -> None:
    if model.is_sharded:  # the other processes may be waiting for this one's part of a layer
        raise UserError(f"process {rank()}: {error}") from error
    give_up_kernels(error)
    if rank() == 0:
        streams.say(f"warning: {error}; {WITHOUT_KERNELS}")


def check_records(model: Llama, data: AlpacaDataModule, needed: Sizes) -> None:
    """Run the data's first and longest record through the model.

    Raises:
        UserError: the loss is not finite, or the memory does not suffice after all.
    """
    encoded, precision = data.train_encoded, needed.precision
    device = model.embed_tokens.weight.device.type
    records = dict.fromkeys([0, int(encoded.length.argmax())])
    lower = torch.autocast(device, AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST)
    with torch.no_grad(), lower, enough_memory(needed):
        for record in records:
            compute = partial(row_loss, model, data.train_packer.row([record]))
            loss = float(despite_kernels(compute, partial(_leave_to_modules, model)))
            if not math.isfinite(loss):
                wider = "" if precision == "32-true" else "use trainer.precision 32-true, or "
                raise UserError(
                    f"{data.origin(record)}: the loss on this record is {loss} under trainer.precision "
                    f"{precision}; {wider}convert the base again"
                )


@contextmanager
def enough_memory(needed: Sizes) -> Iterator[None]:
    """Turn a failed allocation, here or in a loader process, into one line that names smaller settings.

    Raises:
        UserError: in place of torch's own error.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if "DataLoader worker" in text:
            # torch's handler would raise again for the next worker that dies; `Signals` restores it.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise UserError(
                f"a loader process was killed, perhaps because memory ran out ({text[:120]}); "
                "lower data.workers or free memory; --resume last continues from the last checkpoint "
                '(a Python script that trains needs `if __name__ == "__main__":`)'
            ) from None
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in text:
            raise
        fewer = needed.memory.total - needed.memory.activations // 2
        advice = " or ".join(remedies(needed, fewer)) or "a smaller base, or a device with more memory"
        raise UserError(f"out of memory ({text[:160]}); try {advice}; checkpoints are unaffected") from None


def gigabytes(size: int) -> str:
    """Return a size in GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
