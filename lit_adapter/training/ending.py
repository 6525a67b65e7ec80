"""The end of a run: its adapter file, and what the user is told about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lit_adapter.errors import UserError, counted
from lit_adapter.model.adapter import adapter_state
from lit_adapter.streams import Say
from lit_adapter.training.module import LitAdapter
from lit_adapter.training.plan import write_adapter
from lit_adapter.training.run_record import RunRecord


def conclude(module: LitAdapter, record: RunRecord, say: Say) -> None:
    """Write the adapter of a run that has taken all its steps, and say which file to use.

    Raises:
        UserError: the file cannot be written, or the run folder is gone; the adapter is then in a new one.
    """
    folder, steps = record.folder, record.data.finished_steps
    gone = None if folder.is_there() else folder.leave()
    summary: dict[str, Any] = {"steps": steps, "train_loss": module.last["loss"]}
    if record.data.val_packer is not None:
        summary["val_loss"] = module.val_loss
    write_adapter(record.plan, folder.adapter, adapter_state(module.model), summary)
    if gone is not None:
        raise UserError(f"{gone}; its adapter is {folder.adapter}")
    size = folder.adapter.stat().st_size
    took = f"after {counted(steps, 'step')}, {record.seconds:.0f} s in all"
    say(f"wrote {folder.adapter} ({size:,} bytes) {took}{_loss(module, record, steps)}")
    for line in _advice(module, record, steps):
        say(line)


def _loss(module: LitAdapter, record: RunRecord, steps: int) -> str:
    """Return the held-out loss as the end of a sentence, if there are held-out records."""
    if math.isnan(module.val_loss):
        return ""
    folder = record.folder
    is_best = folder.lowest()[0] == steps and record.is_lowest(module.val_loss)
    lowest = f", the lowest of the run: {folder.best.name} is the same" if is_best else ""
    return f"; held-out loss {module.val_loss:.4f}{lowest}"


def _advice(module: LitAdapter, record: RunRecord, steps: int) -> Iterator[str]:
    """Yield lines that say which of two different adapters to use, or what went wrong."""
    folder = record.folder
    step, loss = folder.lowest()
    lowest = ", the lowest" if record.is_lowest(loss) else ""
    best = f"{folder.best.name} (step {step}, held-out loss {loss:.4f}{lowest})"
    divergence = record.divergence(module)
    if divergence is not None:
        is_better = 0 < step < steps and record.held_out and loss < record.held_out[0][1]
        yield f"warning: the run diverged: {divergence}" + (f"; {best} is better" if is_better else "")
        return
    rose = record.worst_after_start()
    if rose is not None:
        yield (
            f"warning: the held-out loss rose above its start, to {rose[1]:.4f} at step {rose[0]}: a lower "
            "optim.lr or another seed may do better"
        )
    if not 0 < step < steps:
        return
    if f"{loss:.2f}" == f"{module.val_loss:.2f}":
        yield f"use {folder.adapter.name} or {best}: to two decimals their held-out losses are the same"
        return
    yield (
        f"use {best} for free text; for labels and other short answers {folder.adapter.name} is usually "
        "as good: compare both on held-out records"
    )
