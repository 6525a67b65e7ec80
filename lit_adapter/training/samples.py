"""Answers to a few held-out records at each validation, as text beside the curves."""

from __future__ import annotations

from itertools import islice
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_adapter.config import TrainerConfig
from lit_adapter.data.records import Records
from lit_adapter.errors import UserError
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.request import NonFiniteLogitsError
from lit_adapter.training.loggers import write_text
from lit_adapter.training.processes import agree


class Samples(Callback):
    """Generates the sample answers; passes over records that are too long for the base's context.

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
        encode, tokenizer = assistant.template.encode_prompt, assistant.tokenizer
        fitting = (
            record
            for record in records or ()
            if len(encode(tokenizer, record.instruction, record.input)) <= room
        )
        self.records = list(islice(fitting, options.samples))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the answers."""
        if trainer.logger is None or trainer.should_stop:
            return
        answers = self.answers(trainer, pl_module)
        if not answers:
            return
        for number, (record, answer) in enumerate(zip(self.records, answers, strict=True)):
            parts = {"Instruction": record.instruction, "Input": record.input}
            parts |= {"Answer": answer, "Reference": record.output}
            text = "\n\n".join(f"**{title}**\n\n{_quoted(body)}" for title, body in parts.items() if body)
            write_text(trainer.logger, f"samples/{number}", text, trainer.global_step)

    def answers(self, trainer: Any, pl_module: Any) -> list[str]:
        """Answer the records, on the first process, while the others wait in the next step.

        If the base is sharded, all processes generate the same tokens together. Return no answer on a process
        that does not take part, or after a signal, which ends the generation.
        """
        together = isinstance(trainer.strategy, ModelParallelStrategy)
        if not self.records or not (trainer.is_global_zero or together):
            return []

        def stopped() -> bool:
            if together:
                agree(trainer, pl_module)
            return bool(pl_module.signals.agreed if together else pl_module.signals.received)

        pairs = [(record.instruction, record.input) for record in self.records]
        try:
            size = self.max_new_tokens
            answers = self.assistant.generate_batch(pairs, max_new_tokens=size, stopped=stopped)
        except NonFiniteLogitsError:  # training counts such steps itself, and stops when there are too many
            answers = ["(no answer: the logits are NaN or infinite)"] * len(pairs)
        return [] if stopped() else answers


def _quoted(text: str) -> str:
    """Indent a text so that Markdown shows it unchanged."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
