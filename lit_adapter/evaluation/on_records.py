"""The answers and losses of every model on held-out records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lit_adapter.data.encode import encode_records
from lit_adapter.data.records import Record, Records, read_records
from lit_adapter.data.shared_starts import Scored
from lit_adapter.errors import UserError
from lit_adapter.evaluation.answer_file import AnswerFile
from lit_adapter.evaluation.contestants import Contestant
from lit_adapter.evaluation.metrics import Metric, metrics_named, suggest
from lit_adapter.evaluation.settings import Evaluation
from lit_adapter.generation.choosing import likelihoods
from lit_adapter.generation.prompt_file import BATCHES_PER_GROUP
from lit_adapter.generation.request import check_prompt
from lit_adapter.generation.settings import Sampling
from lit_adapter.progress import count_progress
from lit_adapter.weights.adapter_file import base_identity

Say = Callable[[str], None]
MOST_NEW_TOKENS = 512


@dataclass(frozen=True)
class Subject:
    """What is asked: the records, how answers are scored, and how long they may be."""

    records: Records
    metrics: list[Metric]
    sampling: Sampling
    stop_early: bool

    @property
    def references(self) -> list[str]:
        """The right answers."""
        return [record.output for record in self.records]


def read(settings: Evaluation, say: Say) -> Records:
    """Read the held-out records, before any model is loaded.

    Raises:
        UserError: as `read_records`.
    """
    records = read_records(Path(str(settings.data)), columns=settings.columns)
    if settings.limit is not None and settings.limit < len(records):
        say(f"{records.source}: the first {settings.limit} of {len(records)} records (--limit)")
        return Records(records.rows[: settings.limit], records.source, records.n_empty_output)
    return records


def choose_metrics(settings: Evaluation, records: Records, say: Say) -> list[Metric]:
    """Return the metrics asked for, or those that fit the records' outputs, and say which.

    Raises:
        UserError: one that is unknown or does not fit; ``stop_early`` with one that needs whole answers.
    """
    references = [record.output for record in records]
    suggested, looks = suggest(references)
    names = settings.metrics or suggested
    if settings.stop_early and not settings.metrics:
        names = suggested[:1]
    found = metrics_named(names, references, [record.origin for record in records])
    whole = next((metric for metric in found if metric.hopeless is None), None)
    if settings.stop_early and whole is not None:
        raise UserError(f"--stop-early: {whole.name} needs whole answers; leave it or --stop-early out")
    shown = ", ".join(metric.name for metric in found)
    say(
        f"outputs look like {looks}; scored by {shown}" + ("" if settings.metrics else " (--metrics chooses)")
    )
    return found


def subject(
    settings: Evaluation, records: Records, metrics: list[Metric], models: Sequence[Contestant]
) -> Subject:
    """Put together what is asked of every model.

    Raises:
        UserError: a prompt that does not fit the base's context; names file and line.
    """
    tokens, tokenizer = settings.max_new_tokens, models[0].model.tokenizer
    if tokens is None:
        longest = max(len(tokenizer.encode(record.output)) for record in records)
        tokens = min(MOST_NEW_TOKENS, longest + longest // 2 + 8)
    sampling = Sampling(max_new_tokens=tokens)
    for record in records:
        try:
            for one in models:
                prompt = one.model.template.encode_prompt(tokenizer, record.instruction, record.input)
                check_prompt(one.model.model.config, prompt, sampling)
        except UserError as error:
            raise UserError(f"{record.origin}: {error}") from None
    return Subject(records, metrics, sampling, settings.stop_early)


def identity(asked: Subject, models: Sequence[Contestant], base: Path) -> dict[str, Any]:
    """Return everything that answers and losses depend on, by the name that a message gives it."""
    weight = models[0].model.model.embed_tokens.weight
    about = base_identity(base)
    return {
        "data": asked.records.sha256,
        "base": [about.weights, about.tokenizer],
        "adapters or templates": [one.identity() for one in models],
        "max_new_tokens": asked.sampling.max_new_tokens,
        "metrics to stop early by": [metric.name for metric in asked.metrics] if asked.stop_early else None,
        "precision": str(weight.dtype),
        "device": weight.device.type,
    }


def answer(asked: Subject, one: Contestant, file: AnswerFile, batch_size: int) -> None:
    """Let a model answer the records that it has not answered yet, a few batches at a time."""
    size = BATCHES_PER_GROUP * batch_size
    n_records = len(asked.records)
    groups = [range(at, min(at + size, n_records)) for at in range(0, n_records, size)]
    open_ = [g for g in groups if any("answer" not in file.values.get((one.name, i), {}) for i in g)]
    done = n_records - sum(map(len, open_))
    with count_progress(f"answers, {one.name}", n_records, done) as finished:
        for group in open_:
            rows = [asked.records[i] for i in group]
            texts = one.model.generate_batch(
                [(row.instruction, row.input) for row in rows],
                batch_size=batch_size,
                finished=finished,
                enough=_enough(asked, rows) if asked.stop_early else None,
                **asdict(asked.sampling),
            )
            file.append(((one.name, i), {"answer": text}) for i, text in zip(group, texts, strict=True))


def _enough(asked: Subject, rows: Sequence[Record]) -> Callable[[int, str], bool]:
    def enough(index: int, text: str) -> bool:
        tests = (metric.hopeless for metric in asked.metrics if metric.hopeless is not None)
        return all(hopeless(text, rows[index].output) for hopeless in tests)

    return enough


def measure_losses(asked: Subject, one: Contestant, file: AnswerFile) -> None:
    """Compute the loss of every record's output, as held-out loss in training, unless it is there."""
    if all("loss" in file.values.get((one.name, i), {}) for i in range(len(asked.records))):
        return
    context = one.model.model.config.context_length
    encoded = encode_records(asked.records, one.model.tokenizer, one.model.template, max_length=context)
    texts = [
        Scored(encoded.record(i).tolist(), max(1, int(encoded.n_prompt[i]))) for i in range(len(encoded))
    ]
    with count_progress(f"losses, {one.name}", len(texts)) as finished:
        found = likelihoods(one.model.model, texts, finished)
    rows = dict(zip(encoded.source_row.tolist(), found, strict=True))
    file.append(
        ((one.name, i), {"loss": -rows[i].log_likelihood, "targets": rows[i].n_tokens})
        if i in rows
        else ((one.name, i), {"loss": None, "targets": 0})
        for i in range(len(asked.records))
    )


def score(asked: Subject, models: Sequence[Contestant], file: AnswerFile) -> None:
    """Score the answers, and put record and scores beside them in the file."""
    for one in models:
        for i, record in enumerate(asked.records):
            row = file.values[one.name, i]
            scores = {metric.name: metric.score(row["answer"], record.output) for metric in asked.metrics}
            row |= {
                "origin": record.origin,
                "instruction": record.instruction,
                "input": record.input,
                "reference": record.output,
                "scores": scores,
            }
    file.rewrite()


@torch.inference_mode()
def run(
    settings: Evaluation, records: Records, metrics: list[Metric], models: Sequence[Contestant], base: Path
) -> tuple[Subject, AnswerFile]:
    """Answer, measure and score the records with all models; what they said is in the file then."""
    asked = subject(settings, records, metrics, models)
    file = AnswerFile(
        settings.out / "answers.jsonl", identity(asked, models, base), overwrite=settings.overwrite
    )
    for one in models:
        answer(asked, one, file, settings.batch_size)
        measure_losses(asked, one, file)
    score(asked, models, file)
    return asked, file
