"""An evaluation from its settings to its folder, read from top to bottom."""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import lit_adapter
from lit_adapter.device import choose_device, choose_dtype, device_name
from lit_adapter.errors import UserError
from lit_adapter.evaluation import on_records, scores
from lit_adapter.evaluation.answer_file import AnswerFile
from lit_adapter.evaluation.contestants import Contestant, contestants, identity_of
from lit_adapter.evaluation.report import write_report
from lit_adapter.evaluation.settings import Evaluation
from lit_adapter.evaluation.tasks import Tasks
from lit_adapter.evaluation.windows import LONGEST_WINDOW, plain_text
from lit_adapter.files.locks import one_at_a_time
from lit_adapter.files.paths import without_home
from lit_adapter.files.read import read_text, reading
from lit_adapter.files.write import check_writable, write_json
from lit_adapter.generation.fallback import enough_memory
from lit_adapter.streams import Say
from lit_adapter.weights.adapter_file import base_of
from lit_adapter.weights.base_folder import CONFIG, FINGERPRINT

FORMAT = 1
"""Version of the keys of results.json; docs/evaluation.md describes them."""

NO_REPORTS = {FINGERPRINT: "a converted base", CONFIG: "a model", "step-*.ckpt": "a run's checkpoints"}
"""Files whose folder gets no evaluation, and what they show it to hold; a run's own folder may get one."""


def evaluate(settings: Evaluation, say: Say) -> dict[str, Any]:
    """Evaluate the base and every adapter, write the folder, and return the contents of ``results.json``.

    Mistakes in data, metrics or tasks are found before a model is loaded. The same call continues an
    evaluation that was stopped: what is finished is kept as it comes.

    Raises:
        UserError: a setting is wrong; the message names it.
    """
    started = time.perf_counter()
    _check_out(settings.out)
    with one_at_a_time(settings.out / "results.json", wait=False, option="--out"):
        records = on_records.read(settings, say) if settings.data else None
        metrics = on_records.choose_metrics(settings, records, say) if records else []
        plain = _plain(settings)
        tasks = Tasks(settings, say)
        # Many texts together are bound by products, unlike a single one, which is bound by reading weights.
        dtype = choose_dtype(settings.dtype, choose_device(settings.device))
        choice = {"device": settings.device, "dtype": dtype, "template": settings.template}
        models = contestants(settings.adapters, settings.base, **choice)
        found: dict[str, Any] = {"format": FORMAT, "models": [one.described() for one in models]}
        answers: dict[str, list[dict[str, Any]]] = {}
        base = settings.base or base_of(settings.adapters[0])
        if records is not None:
            with _answers_kept(), enough_memory(settings.batch_size):
                asked, file = on_records.run(settings, records, metrics, models, base)
            found["data"] = {
                "source": without_home(records.source),
                "records": len(records),
                "sha256": records.sha256,
                "max_new_tokens": asked.sampling.max_new_tokens,
                "stop_early": settings.stop_early,
            }
            found |= scores.results(asked, models, file)
            found["warnings"] = scores.warnings(found)
            answers = {one.name: [file.values[one.name, i] for i in range(len(records))] for one in models}
        if tasks.loaded:
            with _answers_kept():
                found["tasks"] = tasks.run(models, base)
        if plain is not None:
            found["plain_text"] = {"source": without_home(str(settings.plain)), "sha256": _sha256(plain)}
            with _answers_kept():
                found["plain"] = _on_plain_text(settings, plain, models, base)
        found["run"] = _about(settings, models, time.perf_counter() - started)
        write_json(settings.out / "results.json", found)
        write_report(settings.out, found, answers, settings.adapters)
    return found


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out names a folder")
    with reading(out):
        for pattern, what in NO_REPORTS.items():
            if any(out.glob(pattern)):
                raise UserError(f"{out}: holds {what}; choose another --out, such as a new folder")
    check_writable(out)


@contextmanager
def _answers_kept() -> Iterator[None]:
    """After an interrupt, say that the same command continues."""
    try:
        yield
    except KeyboardInterrupt:
        kept = "interrupted: what is finished is kept; the same command continues"
        raise KeyboardInterrupt(kept) from None


def _plain(settings: Evaluation) -> str | None:
    if settings.plain is None:
        return None
    text = read_text(settings.plain)
    if not text.strip():
        raise UserError(f"{settings.plain}: the file is empty; expected a text to measure perplexity on")
    return text


def _on_plain_text(
    settings: Evaluation, text: str, models: Sequence[Contestant], base: Path
) -> dict[str, Any]:
    """Measure a text with every model that has not measured it yet; ``plain.jsonl`` keeps the results."""
    identity = {"text": _sha256(text), "longest window": LONGEST_WINDOW, **identity_of(models, base)}
    # Unlike answers, what another run has measured is replaced: there is one number per model to lose.
    file = AnswerFile(
        settings.out / "plain.jsonl", identity, overwrite=settings.overwrite, item="text", renew=True
    )
    for one in models:
        if (one.name, 0) not in file.values:
            file.append([((one.name, 0), asdict(plain_text(one.model, text, one.name)))])
    return {one.name: file.values[one.name, 0] for one in models}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _about(settings: Evaluation, models: Sequence[Contestant], seconds: float) -> dict[str, Any]:
    """Return where, with which versions and for how long it ran."""
    weight = models[0].model.model.embed_tokens.weight
    packages = ["torch", *(["lm-eval"] if settings.tasks else [])]
    return {
        "seconds": round(seconds, 1),
        "device": device_name(weight.device),
        "precision": str(weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "batch_size": settings.batch_size,
        "limit": settings.limit,
        "few_shot": settings.few_shot,
        "chat_template": settings.chat_template,
        "versions": {
            "lit_adapter": lit_adapter.__version__,
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }
