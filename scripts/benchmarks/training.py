"""The comparison of training: all methods take turns on the same records, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.methods import Method, Packed, PaddedOurs, Part, attach_ours
from benchmarks.models import Base
from benchmarks.profiling import activation_bytes, idle_share
from benchmarks.report import Report, Row, failure, progress_bar
from benchmarks.rivals import Rival, Shell
from benchmarks.savings import TargetHead, Unshared
from benchmarks.workload import Workload
from lit_adapter.config import OptimConfig

RATES = {"ours": OptimConfig().peak_lr, "adaption-prompt": 3e-2, "lora": 2e-3}
RECIPE_RECORDS = 52_002 * 5
"""The paper's: five epochs of Alpaca."""


@dataclass
class Entry:
    """A method with its own adapter and optimizer; methods may share the tensors that hold the adapter."""

    name: str
    make: Callable[[int], Method]
    """Makes the method, given the records in a micro-batch."""
    sizes: list[int]
    """Micro-batches to choose from, in records; ``[0]`` if the method has no such choice."""
    rate: float
    method: Method | None = None
    values: list[Tensor] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    tried: dict[int, str] = field(default_factory=dict)
    passes: list[Pass] = field(default_factory=list)
    facts: Row = field(default_factory=dict)
    error: str | None = None

    def start(self, method: Method, initial: list[Tensor]) -> None:
        """Restart training with ``method``."""
        self.method = method
        self.values = [value.clone() for value in initial]
        fused = method.parameters[0].is_cuda
        self.optimizer = torch.optim.AdamW(method.parameters, lr=self.rate, weight_decay=0.0, fused=fused)

    @contextmanager
    def in_place(self) -> Iterator[Method]:
        """Yield the method with this entry's adapter in the tensors it may share with others."""
        assert self.method is not None
        self._exchange(self.method)
        try:
            yield self.method
        finally:
            self._exchange(self.method)

    @torch.no_grad()
    def _exchange(self, method: Method) -> None:
        for parameter, value in zip(method.parameters, self.values, strict=True):
            held = parameter.clone()
            parameter.copy_(value)
            value.copy_(held)


@dataclass
class Pass:
    """One timed pass."""

    seconds: float
    operations: int
    n_tokens: int
    longest_part: int
    losses: list[float]
    peak: int | None
    compilations: int


def entries(base: Base, work: Workload, options: Any) -> dict[str, Entry]:
    """Return all methods by the name that --methods gives them."""
    ours, shells = attach_ours(base, options.seed), {}  # type: ignore[var-annotated]
    sizes = [size for size in options.peft_batch if size <= work.batch] or [work.batch]

    def packed(row_tokens: int, **how: bool) -> Entry:
        name = ", ".join(["ours", *how, f"rows of {row_tokens}"])
        return Entry(name, lambda size: Packed(base, work, ours, row_tokens, **how), [0], RATES["ours"])

    def rival(kind: str, *, grouped: bool, liger: bool = False, compiled: bool = False) -> Entry:
        label = "LoRA" if kind == "lora" else "AdaptionPrompt"
        label += " + liger-kernel" * liger + " + torch.compile" * compiled

        def make(size: int) -> Method:
            key = kind, liger, compiled
            if key not in shells:
                shells[key] = Shell(base, kind, options.seed, liger=liger, compiled=compiled)
            return Rival(base, work, shells[key], size, grouped=grouped)

        name = f"PEFT {label}, {'grouped by length' if grouped else 'random order'}"
        return Entry(name, make, sizes, RATES[kind])

    found = {f"ours-{row_tokens}": packed(row_tokens) for row_tokens in options.row_tokens}
    longest = max(options.row_tokens)
    found["ours-recompute"] = packed(longest, recompute=True)
    found["ours-float8"] = packed(longest, float8=True)
    for key, name, kind in (
        ("ours-padded", "ours, padded, no saving", PaddedOurs),
        ("saving-head", "saving 1: the output layer at targets only", TargetHead),
    ):
        found[key] = Entry(name, lambda size, kind=kind: kind(base, work, ours, size), sizes, RATES["ours"])
    row_tokens = options.row_tokens[0]
    for key, name, whole in (
        ("saving-packing", "saving 2: and packed rows", True),
        ("saving-last-layer", "saving 3: and the last layer at targets only", False),
    ):
        make = partial(Unshared, base, work, ours, row_tokens, whole_last_layer=whole)
        found[key] = Entry(name, lambda size, make=make: make(), [0], RATES["ours"])
    for kind in ("adaption-prompt", "lora"):
        found[kind] = rival(kind, grouped=False)
        found[f"{kind}-grouped"] = rival(kind, grouped=True)
        found[f"{kind}-compiled"] = rival(kind, grouped=True, compiled=True)
    found["lora-liger"] = rival("lora", grouped=True, liger=True)
    return found


class Comparison:
    """Runs entries in turn.

    Args:
        base: shared by all methods.
        work: the records.
        chosen: the entries.
        report: receives the rows.
        repeats: timed passes of each.
    """

    def __init__(
        self, base: Base, work: Workload, chosen: dict[str, Entry], report: Report, repeats: int
    ) -> None:
        self.base, self.work, self.report, self.repeats = base, work, report, repeats
        self.entries, self.device = list(chosen.values()), base.device

    def run(self) -> None:
        """Warm up, choose micro-batches, time, and report every method."""
        with progress_bar() as bar:
            total = sum(len(entry.sizes) + self.repeats + 1 for entry in self.entries)
            task = bar.add_task("warm-up", total=total)
            for entry in self.entries:
                bar.update(task, description=f"warm-up: {entry.name}")
                self._guarded(entry, self._prepare)
                bar.advance(task, len(entry.sizes))
            for number in range(1, self.repeats + 1):
                for entry in self.entries:
                    bar.update(task, description=f"repeat {number}: {entry.name}")
                    self._guarded(entry, lambda entry, n=number: self._timed(entry, self.work.records(n)))
                    bar.advance(task)
            for entry in self.entries:
                bar.update(task, description=f"memory and loss: {entry.name}")
                self._guarded(entry, self._finish)
                bar.advance(task)

    def _guarded(self, entry: Entry, work: Callable[[Entry], None]) -> None:
        """Do part of an entry's work; an exception ends that entry, not the comparison."""
        if entry.error is None:
            try:
                work(entry)
            except Exception as error:  # whatever other libraries raise here is their result
                entry.error = failure(error)
                if entry.method is not None:
                    entry.method.parameters[0].grad = None
            machine.release()
        self.report.put(self._row(entry))

    def _prepare(self, entry: Entry) -> None:
        """Warm up every micro-batch size, choose the fastest, and restart with it."""
        best, initial = float("inf"), None
        started = time.perf_counter()
        for size in entry.sizes:
            method = entry.make(size)
            if initial is None:
                initial = [parameter.detach().clone() for parameter in method.parameters]
            entry.start(method, initial)
            seconds = self._try(entry)
            if seconds is None:
                entry.tried[size] = "out of memory"
                machine.release()  # only now: the exception held the tensors of its frames
                continue
            entry.tried[size] = f"{self.work.tokens(self.work.records(0)) / seconds:.1f}"
            if seconds < best:
                best, chosen = seconds, method
        if initial is None or best == float("inf"):
            raise torch.OutOfMemoryError(f"every micro-batch of {entry.sizes} records is too large")
        entry.facts["warmup_seconds"] = time.perf_counter() - started
        entry.start(chosen, initial)
        entry.facts["loss_before"] = self._evaluate(entry)

    def _try(self, entry: Entry) -> float | None:
        """Return the seconds of pass 0 after compilation and allocation; None: out of memory."""
        with entry.in_place() as method:
            try:
                self._fill_memory(method, self.work.records(0))
                return self._pass(entry, self.work.records(0)).seconds
            except torch.OutOfMemoryError:
                return None

    def _timed(self, entry: Entry, records: list[NDArray[np.int64]]) -> None:
        with entry.in_place() as method:
            self._fill_memory(method, records)
            entry.passes.append(self._pass(entry, records))

    def _fill_memory(self, method: Method, records: list[NDArray[np.int64]]) -> None:
        """Compute a pass and discard it, so that allocation is not timed: each entry frees all its memory."""
        for parts in method.steps(records):
            for part in parts:
                method.loss(part).backward()
        for parameter in method.parameters:
            parameter.grad = None

    def _pass(self, entry: Entry, records: list[NDArray[np.int64]]) -> Pass:
        """Train on a pass of records, including packing or padding them."""
        method, optimizer = entry.method, entry.optimizer
        assert method is not None
        assert optimizer is not None
        operations = n_tokens = longest = 0
        losses: list[Tensor] = []
        compiled, cuda = machine.compilations(), self.device.type == "cuda"
        machine.synchronise(self.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_allocated(self.device) if cuda else 0
        start = time.perf_counter()
        for parts in method.steps(records):
            losses.append(self._step(method, optimizer, parts))
            operations += sum(part.operations for part in parts)
            n_tokens += sum(part.n_tokens for part in parts)
            longest = max(longest, *(part.n_tokens for part in parts))
        machine.synchronise(self.device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(self.device) - held if cuda else None
        compiled = machine.compilations() - compiled
        values = torch.stack(losses).tolist()
        return Pass(seconds, operations, n_tokens, longest, values, peak, compiled)

    def _step(self, method: Method, optimizer: torch.optim.Optimizer, parts: list[Part]) -> Tensor:
        """Do one optimizer step and return its loss per target, without waiting for the device."""
        n_targets = sum(part.n_targets for part in parts)
        total = torch.zeros((), device=self.device)
        for part in parts:
            loss = method.loss(part)
            (loss / n_targets).backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(method.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total / n_targets

    def _evaluate(self, entry: Entry) -> float:
        """Return the loss per target on the first step of pass 0, which no timed pass trains on."""
        total, n_targets = 0.0, 0
        with entry.in_place() as method, torch.no_grad():
            for parts in method.steps(self.work.records(0)[:1]):
                total += sum(float(method.loss(part)) for part in parts)
                n_targets += sum(part.n_targets for part in parts)
        return total / n_targets

    def _finish(self, entry: Entry) -> None:
        """Measure what would slow the timed passes."""
        method = entry.method
        assert method is not None
        entry.facts["loss_after"] = self._evaluate(entry)
        parts = [part for step in method.steps(self.work.records(1)[:1]) for part in step]
        largest = max(parts, key=lambda part: part.n_tokens)
        kept = activation_bytes(method, largest, self.device)
        entry.facts["activation_bytes_per_token"] = kept / largest.n_tokens
        if self.device.type == "cuda":
            records = self.work.records(1)[:2]
            with entry.in_place():
                entry.facts["gpu_idle_share"] = idle_share(lambda: self._pass(entry, records))

    def _row(self, entry: Entry) -> Row:
        """Return an entry's results so far."""
        row: Row = {"name": entry.name, "useful_tokens_per_s": None}
        if any(entry.sizes):
            row |= {"micro_batch": getattr(entry.method, "size", None), "by_micro_batch": entry.tried}
        row |= entry.facts
        if entry.error is not None:
            return row | {"error": entry.error}
        if not entry.passes:
            return row
        useful = [self.work.tokens(self.work.records(n + 1)) for n in range(len(entry.passes))]
        rates = [tokens / one.seconds for tokens, one in zip(useful, entry.passes, strict=True)]
        n_records, peaks = self.work.batch * self.work.steps, [one.peak for one in entry.passes if one.peak]
        per_record = statistics.median(one.seconds for one in entry.passes) / n_records
        matmul = self.report.machine["matmul_flops_per_s"]
        return row | {
            "useful_tokens_per_s": statistics.median(rates),
            "useful_tokens_per_s_spread": [min(rates), max(rates)],
            "repeats": len(rates),
            "computed_tokens_per_s": statistics.median(one.n_tokens / one.seconds for one in entry.passes),
            "largest_part_tokens": max(one.longest_part for one in entry.passes),
            "recipe_seconds": per_record * RECIPE_RECORDS,
            "utilisation": statistics.median(one.operations / one.seconds for one in entry.passes) / matmul,
            "operations_per_record": statistics.mean(one.operations for one in entry.passes) / n_records,
            "peak_bytes_beside_weights": max(peaks, default=None),
            "losses": [loss for one in entry.passes for loss in one.losses],
            "compilations_while_timed": sum(one.compilations for one in entry.passes),
        }
