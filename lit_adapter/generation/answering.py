"""Answers for the command line: one, streamed; two, side by side; or a file of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_adapter.config import Columns
from lit_adapter.device import choose_device, choose_dtype
from lit_adapter.errors import UserError, visible
from lit_adapter.files.paths import refuse_input
from lit_adapter.files.read import file_sha256
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.chatting import prompt_of
from lit_adapter.generation.choosing import ScoredChoice, encode_choices
from lit_adapter.generation.fallback import enough_memory
from lit_adapter.generation.load import load
from lit_adapter.generation.prompt_file import (
    BATCHES_PER_GROUP,
    STANDARD_INPUT,
    Answers,
    Prompt,
    check_target,
    earlier_dtype,
    read_prompts,
)
from lit_adapter.generation.repeats import until_repeats
from lit_adapter.generation.request import check_prompt, check_stop_ids
from lit_adapter.generation.settings import Sampling
from lit_adapter.generation.task import Task
from lit_adapter.progress import count_progress
from lit_adapter.streams import say, write_answer
from lit_adapter.weights.adapter_file import base_identity, base_of
from lit_adapter.weights.base_content import check_content

COLUMN_WIDTH = 48
"""Below this column width, two answers are printed one under the other."""
CHOICE_COLUMNS = ("probabilities", "log_likelihoods")


@dataclass(frozen=True)
class ModelChoice:
    """What to load, as `load` takes it, whether its adapter answers, and whether to verify the base."""

    adapter: str | None
    base: str | None
    device: str | None
    dtype: str | None
    template: str | None
    no_adapter: bool
    verify: bool

    def load(self, dtype: str | torch.dtype | None = None) -> AdaptedLlama:
        """Load it, in ``dtype`` if the choice leaves that open; None lets `load` choose."""
        dtype = dtype if self.dtype in (None, "auto") else self.dtype
        model = load(self.adapter, self.base, device=self.device, dtype=dtype, template=self.template)
        if self.verify:
            check_content(self.base_folder(), everything=True, say=partial(say, out=sys.stderr))
        return model.base if self.no_adapter else model

    def base_folder(self) -> Path:
        """Return the chosen base, or the one that the adapter names."""
        return Path(self.base) if self.base else base_of(Path(str(self.adapter)))

    def identity(self, model: AdaptedLlama, sampling: Sampling) -> dict[str, Any]:
        """Return everything but the prompts that answers depend on; not paths, and not the batch size."""
        base = base_identity(self.base_folder())
        weight = model.model.embed_tokens.weight
        return {
            "sampling": asdict(sampling),
            "adapter": file_sha256(Path(self.adapter)) if self.adapter and not self.no_adapter else None,
            "base": [base.weights, base.tokenizer],
            "template": model.template.to_dict(),
            "dtype": str(weight.dtype),
            "device": weight.device.type,
        }


def stream(model: AdaptedLlama, task: Task, sampling: Sampling, out: TextIO) -> None:
    """Write an answer to ``out`` as it is generated.

    Raises:
        BrokenPipeError: nobody reads ``out`` any more.
    """
    _write(model.stream(*task, **asdict(sampling)), out)


def _write(pieces: Iterable[str], out: TextIO) -> None:
    for piece in pieces:
        write_answer(piece, out)
    write_answer("\n", out)


def compare(model: AdaptedLlama, task: Task, sampling: Sampling, out: TextIO) -> None:
    """Write the answers of the plain base and of the adapted model: in columns on a wide terminal.

    The base's answer ends where it repeats itself.
    """
    console = Console(file=out)
    plain, adapted = (side.stream(*task, **asdict(sampling)) for side in (model.base, model))
    sides = (("plain base", until_repeats(plain)), ("with adapter", adapted))
    if not console.is_terminal or console.width < 2 * COLUMN_WIDTH:
        for number, (title, pieces) in enumerate(sides):
            out.write("\n" * bool(number) + f"--- {title} ---\n")
            _write(pieces, out)
        return
    table = Table(expand=True)
    answers = []
    for title, pieces in sides:
        table.add_column(title, ratio=1, overflow="fold")
        # As Text: rich reads square brackets in a plain string as markup.
        answers.append(Text(visible("".join(pieces))))
    table.add_row(*answers)
    console.print(table)


def choose(model: AdaptedLlama, task: Task, choices: Sequence[str], out: TextIO) -> None:
    """Write the choices with their probabilities and log-likelihoods, the most likely one first."""
    scored = model.choose(*task, choices=choices)
    write_answer("probability  log-likelihood  answer\n", out)
    for choice in scored:
        write_answer(f"{choice.probability:11.4f}  {choice.log_likelihood:14.3f}  {choice.text}\n", out)


def answer_file(
    choice: ModelChoice,
    path: Path,
    target: Path,
    sampling: Sampling,
    batch_size: int,
    *,
    columns: Columns,
    choices: Sequence[str],
    overwrite: bool,
) -> int:
    """Answer the prompts of ``path`` into ``target`` and return how many there are.

    With ``choices`` each answer is the most likely of them, and two more columns have the probabilities and
    log-likelihoods of all.

    Raises:
        UserError: a column of the prompts that has the name of one of these two, a file that cannot be read
            or written, a prompt or stop id that does not fit the model, or a batch that does not fit the GPU.
    """
    answer_columns = (columns.output, *(CHOICE_COLUMNS if choices else ()))
    if choices:
        _refuse_choice_columns(columns)
    prompts = read_prompts(path, columns, answer_columns)
    if path != STANDARD_INPUT and target.exists() and target.samefile(path):
        raise UserError(f"{target}: --output is the file of --prompts; choose another")
    check_target(target, overwrite=overwrite)
    inputs = [choice.base_folder(), *([Path(choice.adapter)] if choice.adapter else [])]
    refuse_input(target, inputs, "--output")
    device = choose_device(choice.device)
    dtype: Any = earlier_dtype(target, prompts, device.type)
    if dtype is None and min(batch_size, len(prompts)) > 1:  # batches are bound by products, not by memory
        dtype = choose_dtype(choice.dtype, device)
    model = choice.load(dtype)
    _check_prompts(model, prompts, sampling, choices)
    identity = choice.identity(model, sampling)
    identity |= {"answer_columns": answer_columns, "choices": choices}
    group = BATCHES_PER_GROUP * batch_size
    answers = Answers(target, prompts, identity, group=group, overwrite=overwrite)
    with enough_memory(batch_size), count_progress("answering", len(prompts), len(answers.lines)) as finished:
        how: dict[str, Any] = {"batch_size": batch_size, "finished": finished}

        def answer_group(group: Sequence[Prompt]) -> list[dict[str, Any]]:
            if choices:
                tasks = [(prompt.instruction, prompt.input) for prompt in group]
                scored = model.choose_batch(tasks, choices=choices, **how)
                return [_chosen(found, choices, answer_columns) for found in scored]
            asked = [_ids(model, prompt) for prompt in group]
            texts = model.continue_batch(asked, **how, **asdict(sampling))
            return [{columns.output: text} for text in texts]

        answers.run(answer_group)
    return len(prompts)


def _ids(model: AdaptedLlama, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt, rendered with the model's template."""
    if prompt.messages:
        return prompt_of(model.tokenizer, model.template, prompt.messages, prompt.tools)
    return model.template.encode_prompt(model.tokenizer, prompt.instruction, prompt.input)


def _refuse_choice_columns(columns: Columns) -> None:
    """Refuse a column that the numbers of the choices would overwrite."""
    for name, column in asdict(columns).items():
        if column in CHOICE_COLUMNS:
            raise UserError(
                f"--columns.{name} is {column!r}, which --choices writes its numbers to; give it another name"
            )


def _chosen(
    scored: Sequence[ScoredChoice], choices: Sequence[str], answer_columns: Sequence[str]
) -> dict[str, Any]:
    """Return the values of the answer's columns: the likeliest choice, and numbers in the choices' order."""
    ordered = sorted(scored, key=lambda choice: choices.index(choice.text))
    values = (
        scored[0].text,
        {choice.text: choice.probability for choice in ordered},
        {choice.text: choice.log_likelihood for choice in ordered},
    )
    return dict(zip(answer_columns, values, strict=True))


def _check_prompts(
    model: AdaptedLlama, prompts: Sequence[Prompt], sampling: Sampling, choices: Sequence[str]
) -> None:
    """Refuse what does not fit the model before the first answer: the rest may take hours."""
    config = model.model.config
    check_stop_ids(config, sampling)
    for prompt in prompts:
        task = (prompt.instruction, prompt.input)
        try:
            if choices and prompt.messages:
                raise UserError("--choices answers tasks; this is a conversation")
            if choices:
                encode_choices(model.tokenizer, model.template, task, choices, config.context_length)
            else:
                check_prompt(config, _ids(model, prompt), sampling)
        except UserError as error:
            raise UserError(f"{prompt.origin}: {error}") from None
