"""Answers to a few held-out records at each validation, as text beside the curves."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_adapter.config import TrainerConfig
from lit_adapter.data.examples import trimmed
from lit_adapter.data.record import AnyRecord, Conversation, Record
from lit_adapter.data.records import Records
from lit_adapter.errors import UserError
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.request import NonFiniteLogitsError
from lit_adapter.text.conversation import encode_prompt
from lit_adapter.training.loggers import write_text
from lit_adapter.training.processes import agree


@dataclass(frozen=True)
class Sample:
    """A held-out record to be answered."""

    prompt: list[int]
    """Token ids."""
    shown: dict[str, str]
    """What is to be answered, keyed by title."""
    reference: str
    """The record's own answer."""


def _sample_of(record: AnyRecord, assistant: AdaptedLlama) -> Sample | None:
    """Return the sample of a record; None for a text, which asks for no answer."""
    tokenizer, template = assistant.tokenizer, assistant.template
    if isinstance(record, Record):
        prompt = template.encode_prompt(tokenizer, record.instruction, record.input)
        return Sample(prompt, {"Instruction": record.instruction, "Input": record.input}, record.output)
    if not isinstance(record, Conversation):
        return None
    *before, last = trimmed(record.messages)
    shown = "\n\n".join(f"{message.role}: {message.content}" for message in before)
    prompt = encode_prompt(tokenizer, template, before, record.tools)
    return Sample(prompt, {"Conversation": shown}, last.content or str(last.more.get("tool_calls", "")))


class Samples(Callback):
    """Generates the sample answers; skips records that are too long for the base's context.

    Raises:
        UserError: `sample_tokens` leaves no room for a prompt.
    """

    def __init__(self, assistant: AdaptedLlama, records: Records | None, options: TrainerConfig) -> None:
        self.assistant, self.max_new_tokens = assistant, options.sample_tokens
        room = assistant.model.config.context_length - options.sample_tokens
        if options.samples and room < 1:
            raise UserError(
                f"trainer.sample_tokens is {options.sample_tokens}, but the base's context is "
                f"{assistant.model.config.context_length}; lower it"
            )
        samples = (_sample_of(record, assistant) for record in records or ())
        fitting = (sample for sample in samples if sample is not None and len(sample.prompt) <= room)
        self.samples = list(islice(fitting, options.samples))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the answers."""
        if trainer.logger is None or trainer.should_stop:
            return
        answers = self.answers(trainer, pl_module)
        if not answers:
            return
        for number, (sample, answer) in enumerate(zip(self.samples, answers, strict=True)):
            parts = {**sample.shown, "Answer": answer, "Reference": sample.reference}
            text = "\n\n".join(f"**{title}**\n\n{_quoted(body)}" for title, body in parts.items() if body)
            write_text(trainer.logger, f"samples/{number}", text, trainer.global_step)

    def answers(self, trainer: Any, pl_module: Any) -> list[str]:
        """Answer the records, on the first process, while the others wait in the next step.

        If the base is sharded, all processes generate the same tokens together. Return no answer on a process
        that does not take part, or after a signal, which ends the generation.
        """
        together = isinstance(trainer.strategy, ModelParallelStrategy)
        if not self.samples or not (trainer.is_global_zero or together):
            return []

        def stopped() -> bool:
            if together:
                agree(trainer, pl_module)
            return bool(pl_module.signals.agreed if together else pl_module.signals.received)

        prompts = [sample.prompt for sample in self.samples]
        try:
            answers = self.assistant.continue_batch(
                prompts, max_new_tokens=self.max_new_tokens, stopped=stopped
            )
        except NonFiniteLogitsError:  # training counts such steps itself, and stops when there are too many
            answers = ["(no answer: the logits are NaN or infinite)"] * len(prompts)
        return [] if stopped() else answers


def _quoted(text: str) -> str:
    """Indent a text so that Markdown shows it unchanged."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
