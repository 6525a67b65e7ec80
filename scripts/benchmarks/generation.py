"""The comparison of decoding: time to the first token of a long prompt, and tokens per second after it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.methods import attach_ours
from benchmarks.models import Base, causal_model
from benchmarks.report import Report, Row, failure, progress_bar
from benchmarks.rivals import adapted
from lit_adapter.generation.adapter import Adapter
from lit_adapter.generation.engine import Engine
from lit_adapter.generation.request import Request
from lit_adapter.generation.settings import Sampling

Generate = Callable[[Tensor, int], None]
"""Answers prompts ``[B, T]`` greedily with the given number of new tokens each."""


def ours(base: Base, seed: int) -> Generate:
    """Return our decoding, with our default adapter."""
    attach_ours(base, seed)
    base.model.eval().requires_grad_(False)
    engine, adapter = Engine(), Adapter.of(base.model)

    def generate(ids: Tensor, n_new: int) -> None:
        requests = [Request(ids, Sampling(max_new_tokens=n_new), adapter) for ids in ids.tolist()]
        events = engine.run(requests, batch_size=len(requests))
        n_tokens = sum(token is not None for _, token in events)
        _expect(n_tokens, ids.shape[0] * n_new)

    return generate


def rival(base: Base, kind: str | None, seed: int, cache: str | None = None) -> Generate:
    """Return transformers' ``generate``, plain or with a PEFT adapter, with a dynamic or static cache."""
    torch.manual_seed(seed)
    causal = causal_model(base)
    causal = adapted(causal, kind, base.adapted) if kind else causal
    settings = causal.generation_config
    settings.do_sample, settings.eos_token_id, settings.pad_token_id = False, None, 0

    @torch.inference_mode(cache is None)  # torch.compile needs it off for a static cache
    @torch.no_grad()
    def generate(ids: Tensor, n_new: int) -> None:
        mask = torch.ones_like(ids)
        found = causal.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=n_new, cache_implementation=cache
        )
        _expect(found.numel(), ids.shape[0] * (ids.shape[1] + n_new))

    return generate


def _expect(found: int, wanted: int) -> None:
    if found != wanted:
        raise RuntimeError(f"made {found} tokens, not {wanted}: it stopped early")


def makers(base: Base, options: Any) -> dict[str, tuple[str, Callable[[], Generate]]]:
    """Return each method's name and maker by the name that --methods gives it."""
    seed = options.seed
    return {
        "ours": ("ours", lambda: ours(base, seed)),
        "adaption-prompt": ("PEFT AdaptionPrompt", lambda: rival(base, "adaption-prompt", seed)),
        "lora": ("PEFT LoRA", lambda: rival(base, "lora", seed)),
        "transformers": ("transformers, dynamic cache", lambda: rival(base, None, seed)),
        "transformers-static": ("transformers, static cache", lambda: rival(base, None, seed, "static")),
    }


@dataclass
class Case:
    """A method at a batch size."""

    name: str
    batch: int
    make: Callable[[], Generate]
    generate: Generate | None = None
    whole: list[float] = field(default_factory=list)
    """Seconds of a call that makes all new tokens."""
    one: list[float] = field(default_factory=list)
    """Seconds of a call that makes one new token from the same prompts."""
    first: list[float] = field(default_factory=list)
    """Seconds to the first token of the long prompt."""
    facts: Row = field(default_factory=dict)
    error: str | None = None


class Decoding:
    """Runs cases in turn.

    Args:
        base: shared by all methods.
        cases: the methods at their batch sizes.
        report: receives the rows.
        options: repeats, n_new, prompt_tokens and first_token_prompt.
        ids: prompt ids for the largest case, on the base's device.
    """

    def __init__(
        self, base: Base, cases: list[Case], report: Report, options: Any, ids: torch.Tensor
    ) -> None:
        self.base, self.cases, self.report, self.options = base, cases, report, options
        self.device, self.ids = base.device, ids

    def run(self) -> None:
        """Warm up, time in turn, and report every case."""
        with progress_bar() as bar:
            task = bar.add_task("warm-up", total=len(self.cases) * (1 + self.options.repeats))
            for number in range(1 + self.options.repeats):
                for case in self.cases:
                    what = f"repeat {number}" if number else "warm-up"
                    bar.update(task, description=f"{what}: {case.name}")
                    self._guarded(case, self._timed if number else self._warm_up)
                    bar.advance(task)

    def _guarded(self, case: Case, work: Callable[[Case], None]) -> None:
        """Do part of a case's work; an exception ends that case, not the comparison."""
        if case.error is None:
            try:
                work(case)
            except Exception as error:  # whatever other libraries raise here is their result
                case.error = failure(error)
        self.report.put(self._row(case))

    def _warm_up(self, case: Case) -> None:
        case.generate = case.make()
        case.facts["warmup_seconds"] = machine.seconds(lambda: self._calls(case), self.device)
        self._calls(case)

    def _timed(self, case: Case) -> None:
        whole, one, first = self._calls(case)
        case.whole.append(whole)
        case.one.append(one)
        if first is not None:
            case.first.append(first)

    def _calls(self, case: Case) -> tuple[float, float, float | None]:
        """Return the seconds of a whole call, of one token of it, and of the long prompt's first token."""
        options, generate = self.options, case.generate
        assert generate is not None
        prompts = self.ids[: case.batch, : options.prompt_tokens]
        long = self.ids[:1, : options.first_token_prompt]
        compiled = machine.compilations()
        whole = machine.seconds(lambda: generate(prompts, options.n_new), self.device)
        one = machine.seconds(lambda: generate(prompts, 1), self.device)
        first = machine.seconds(lambda: generate(long, 1), self.device) if case.batch == 1 else None
        case.facts["compilations_while_timed"] = machine.compilations() - compiled
        return whole, one, first

    def _row(self, case: Case) -> Row:
        row: Row = {"name": f"{case.name}, batch {case.batch}", "useful_tokens_per_s": None}
        row |= {"batch": case.batch, "n_new": self.options.n_new} | case.facts
        if case.error is not None:
            return row | {"error": case.error}
        if not case.whole:
            return row
        n_later, n_all = case.batch * (self.options.n_new - 1), case.batch * self.options.n_new
        rates = [n_later / (whole - one) for whole, one in zip(case.whole, case.one, strict=True)]
        return row | {
            "useful_tokens_per_s": statistics.median(rates),
            "useful_tokens_per_s_spread": [min(rates), max(rates)],
            "repeats": len(rates),
            "call_tokens_per_s": n_all / statistics.median(case.whole),
            "first_token_seconds": statistics.median(case.first) if case.first else None,
            "first_token_prompt": self.options.first_token_prompt,
        }


def limit(base: Base, batch: int, copy_rate: float) -> Row:
    """Return the row of the limit: every token reads the weights once."""
    rate = batch * copy_rate / base.n_bytes
    name = f"limit: the weights' bytes at the measured bandwidth, batch {batch}"
    return {"name": name, "useful_tokens_per_s": rate, "useful_tokens_per_s_spread": [rate, rate]}
