"""The question that a held-out record asks of a model, and the right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_adapter.data.examples import trimmed
from lit_adapter.data.record import AnyRecord, Conversation, PlainText
from lit_adapter.errors import UserError
from lit_adapter.text.conversation import encode_prompt
from lit_adapter.text.template import Template
from lit_adapter.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """An instruction record, or a conversation, whose last answer is asked for."""

    record: AnyRecord
    instruction: str
    """The task, or the turns so far."""
    input: str
    reference: str
    """The right answer."""

    def prompt(self, template: Template, tokenizer: Tokenizer) -> list[int]:
        """Return the token ids that the answer continues.

        Raises:
            UserError: the template cannot show what a message holds.
        """
        if isinstance(self.record, Conversation):
            said = trimmed(self.record.messages)[:-1]
            return encode_prompt(tokenizer, template, said, self.record.tools)
        return template.encode_prompt(tokenizer, self.instruction, self.input)


def questions_of(records: Sequence[AnyRecord]) -> list[Question]:
    """Return a question for each record.

    Raises:
        UserError: a record that has none; names file and line.
    """
    return [_question(record) for record in records]


def _question(record: AnyRecord) -> Question:
    if isinstance(record, PlainText):
        raise UserError(f"{record.origin}: a plain text asks for no answer; --plain measures its perplexity")
    if not isinstance(record, Conversation):
        return Question(record, record.instruction, record.input, record.output)
    *before, last = trimmed(record.messages)
    if not last.content.strip():
        raise UserError(f"{record.origin}: the last answer has no text to compare with; remove the record")
    said = "\n".join(f"{message.role}: {message.content}" for message in before)
    return Question(record, said, "", last.content)
