"""The answers and losses of every model on held-out records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_adapter.data.encode import encode_records
from lit_adapter.data.records import Records, read_records
from lit_adapter.data.shared_starts import Scored
from lit_adapter.errors import UserError
from lit_adapter.evaluation.answer_file import AnswerFile
from lit_adapter.evaluation.contestants import Contestant, identity_of
from lit_adapter.evaluation.metrics import Metric, metrics_named, suggest
from lit_adapter.evaluation.questions import Question, questions_of
from lit_adapter.evaluation.samples import SHOWN
from lit_adapter.evaluation.settings import Evaluation
from lit_adapter.generation.choosing import likelihoods
from lit_adapter.generation.prompt_file import BATCHES_PER_GROUP
from lit_adapter.generation.request import check_prompt
from lit_adapter.generation.settings import Sampling
from lit_adapter.progress import count_progress
from lit_adapter.streams import Say

MOST_NEW_TOKENS = 512


@dataclass(frozen=True)
class Subject:
    """What every model is asked: the records, how answers are scored, and how long they may be."""

    records: Records
    questions: list[Question]
    metrics: list[Metric]
    sampling: Sampling
    stop_early: bool

    @property
    def references(self) -> list[str]:
        """The right answers."""
        return [question.reference for question in self.questions]


def read(settings: Evaluation, say: Say) -> Records:
    """Read the held-out records, before any model is loaded.

    Raises:
        UserError: as `read_records`.
    """
    records = read_records(Path(str(settings.data)), columns=settings.columns, option="--columns")
    if settings.limit is not None and settings.limit < len(records):
        say(f"{records.source}: the first {settings.limit} of {len(records)} records (--limit)")
        return records.choose(np.arange(settings.limit), records.source, records.n_empty_output)
    return records


def choose_metrics(settings: Evaluation, records: Records, say: Say) -> list[Metric]:
    """Return the metrics asked for, or those that fit the records' outputs, and say which.

    Raises:
        UserError: one that is unknown or does not fit; ``stop_early`` with one that needs whole answers.
    """
    references = [question.reference for question in questions_of(records)]
    suggested, looks = suggest(references)
    names = settings.metrics or suggested
    if settings.stop_early and not settings.metrics:
        names = suggested[:1]
    found = metrics_named(names, references, [record.origin for record in records])
    whole = next((metric for metric in found if metric.hopeless is None), None)
    if settings.stop_early and whole is not None:
        raise UserError(f"--stop_early: {whole.name} needs whole answers; leave it or --stop_early out")
    shown = ", ".join(metric.name for metric in found)
    say(
        f"outputs look like {looks}; scored by {shown}" + ("" if settings.metrics else " (--metrics chooses)")
    )
    return found


def subject(
    settings: Evaluation, records: Records, metrics: list[Metric], models: Sequence[Contestant]
) -> Subject:
    """Put together what every model is asked.

    Raises:
        UserError: a prompt that does not fit the base's context; names file and line.
    """
    tokens, tokenizer, questions = settings.max_new_tokens, models[0].model.tokenizer, questions_of(records)
    if tokens is None:
        longest = max(len(tokenizer.encode(question.reference)) for question in questions)
        tokens = min(MOST_NEW_TOKENS, longest + longest // 2 + 8)
    sampling = Sampling(max_new_tokens=tokens)
    for question in questions:
        try:
            for one in models:
                prompt = question.prompt(one.model.template, tokenizer)
                check_prompt(one.model.model.config, prompt, sampling)
        except UserError as error:
            raise UserError(f"{question.record.origin}: {error}") from None
    return Subject(records, questions, metrics, sampling, settings.stop_early)


def identity(asked: Subject, models: Sequence[Contestant], base: Path) -> dict[str, Any]:
    """Return everything that answers and losses depend on, by the name that a message gives it."""
    return {
        "data": asked.records.sha256,
        **identity_of(models, base),
        "max_new_tokens": asked.sampling.max_new_tokens,
        "metrics to stop early by": [metric.name for metric in asked.metrics] if asked.stop_early else None,
    }


def measure_losses(asked: Subject, one: Contestant, file: AnswerFile) -> None:
    """Compute the loss of every record's output, like held-out loss in training, unless it is known.

    The same pass tells how greedy decoding answers, up to the first token that differs from the output.
    """
    if all("loss" in file.values.get((one.name, i), {}) for i in range(len(asked.records))):
        return
    context = one.model.model.config.context_length
    encoded = encode_records(
        asked.records, one.model.tokenizer, one.model.template, max_length=context, last_answer_only=True
    )
    texts = [
        Scored(encoded.record(i).tolist(), max(1, int(encoded.n_prompt[i]))) for i in range(len(encoded))
    ]
    with count_progress(f"losses, {one.name}", len(texts)) as finished:
        found = likelihoods(one.model.model, texts, finished)
    rows: dict[int, dict[str, Any]] = {}
    for place, (text, of) in enumerate(zip(texts, found, strict=True)):
        row: dict[str, Any] = {"loss": -of.log_likelihood, "targets": of.n_tokens}
        if encoded.whole[place]:
            begun = list(text.ids[text.n_context : text.n_context + of.n_greedy])
            row["greedy"] = begun if of.then < 0 else [*begun, of.then]
        rows[int(encoded.source_row[place])] = row
    nothing: dict[str, Any] = {"loss": None, "targets": 0}
    file.append(((one.name, i), rows.get(i, nothing)) for i in range(len(asked.records)))


def answer(asked: Subject, one: Contestant, file: AnswerFile, batch_size: int) -> None:
    """Let a model answer the records that it has not answered yet, a few batches at a time.

    What the losses have shown is not generated again: an answer equal to the output is complete, and any
    other answer is generated from the first token that differs.
    """
    known = [_Start(asked, one, i, file.values[one.name, i].get("greedy")) for i in range(len(asked.records))]
    size = BATCHES_PER_GROUP * batch_size
    waiting = [i for i, start in enumerate(known) if not start.is_answer]
    waiting = [i for i in waiting if "answer" not in file.values[one.name, i]]
    file.append(((one.name, i), {"answer": start.text}) for i, start in enumerate(known) if start.is_answer)
    n_records = len(asked.records)
    with count_progress(f"answers, {one.name}", n_records, n_records - len(waiting)) as finished:
        for at in range(0, len(waiting), size):
            group = waiting[at : at + size]
            texts = one.model.continue_batch(
                [known[i].prompt for i in group],
                begun=[known[i].begun for i in group],
                batch_size=batch_size,
                finished=finished,
                enough=_enough(asked, group) if asked.stop_early else None,
                **asdict(asked.sampling),
            )
            file.append(((one.name, i), {"answer": text}) for i, text in zip(group, texts, strict=True))


class _Start:
    """The part of an answer that the losses have shown.

    Args:
        asked: the records.
        one: the model that answers.
        record: which record.
        greedy: the answer's first tokens, the end token included; None if they are not known.
    """

    def __init__(self, asked: Subject, one: Contestant, record: int, greedy: Sequence[int] | None) -> None:
        model = one.model
        self.prompt = asked.questions[record].prompt(model.template, model.tokenizer)
        known, most = list(greedy or ()), asked.sampling.max_new_tokens
        stop = model.template.stop_ids(model.tokenizer)
        ends = bool(known) and known[-1] in stop
        self.begun = (known[:-1] if ends else known)[:most]
        self.text = model.tokenizer.decode(self.begun)
        wrong = asked.stop_early and _cannot_be_right(asked, record, self.text)
        self.is_answer = bool(known) and (ends or len(self.begun) >= most or wrong)


def _cannot_be_right(asked: Subject, record: int, text: str) -> bool:
    """Whether an answer need not be finished; the first ones are, so that readers see whole answers."""
    if record < SHOWN:
        return False
    tests = (metric.hopeless for metric in asked.metrics if metric.hopeless is not None)
    return all(hopeless(text, asked.questions[record].reference) for hopeless in tests)


def _enough(asked: Subject, group: Sequence[int]) -> Callable[[int, str], bool]:
    return lambda index, text: _cannot_be_right(asked, group[index], text)


def score(asked: Subject, models: Sequence[Contestant], file: AnswerFile) -> None:
    """Score the answers, and put records and scores beside them in the file."""
    for one in models:
        for i, question in enumerate(asked.questions):
            row = file.values[one.name, i]
            scores = {m.name: m.score(row["answer"], question.reference) for m in asked.metrics}
            row.pop("greedy", None)  # said by the answer
            row |= {
                "origin": question.record.origin,
                "instruction": question.instruction,
                "input": question.input,
                "reference": question.reference,
                "scores": scores,
            }
    file.rewrite()


@torch.inference_mode()
def run(
    settings: Evaluation, records: Records, metrics: list[Metric], models: Sequence[Contestant], base: Path
) -> tuple[Subject, AnswerFile]:
    """Answer, measure and score the records with all models; the file then has their answers."""
    asked = subject(settings, records, metrics, models)
    file = AnswerFile(
        settings.out / "answers.jsonl", identity(asked, models, base), overwrite=settings.overwrite
    )
    for one in models:
        measure_losses(asked, one, file)
        answer(asked, one, file, settings.batch_size)
    score(asked, models, file)
    return asked, file
