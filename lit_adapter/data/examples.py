"""A record as token ids, cut to length, with what each token is to the loss.

A record is one example, except a conversation whose template renders earlier answers differently from the
last one, for example without reasoning. Then each of its answers is an example of its own: the conversation
up to this answer, rendered as it is when the answer is generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lit_adapter.data.record import AnyRecord, Conversation, PlainText, Record
from lit_adapter.errors import UserError
from lit_adapter.text.conversation import (
    ANSWER,
    CONTEXT,
    NEVER,
    EncodedConversation,
    Message,
    RewrittenError,
    encode_conversation,
)
from lit_adapter.text.template import Template
from lit_adapter.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """A training example: a record, or a part of one."""

    ids: NDArray[np.int32]
    """Its tokens ``[T]``."""
    kinds: NDArray[np.int8]
    """What each is to the loss: `NEVER`, `CONTEXT` or `ANSWER` ``[T]``."""
    variant: int
    """Which text of the template it uses (`Template.variant`)."""
    whole: bool
    """Whether nothing was cut off."""

    @property
    def n_prompt(self) -> int:
        """The number of tokens before the first one of an answer."""
        return int((self.kinds == ANSWER).argmax())


def encode_examples(
    record: AnyRecord,
    tokenizer: Tokenizer,
    template: Template,
    max_length: int,
    *,
    last_answer_only: bool = False,
) -> list[Example | None]:
    """Encode a record and cut its examples to ``max_length`` tokens; None for one with nothing to learn.

    An instruction record loses the start of its prompt and keeps its answer and EOS. A conversation loses its
    first turns, but not its system prompt. A text loses its end.

    Args:
        record: of any format.
        tokenizer: the base's.
        template: of a task or a conversation; a text has none.
        max_length: in tokens.
        last_answer_only: learn only the last answer of a conversation.

    Raises:
        UserError: as `Template.encode_example` and `encode_conversation`; names the record, and the turn.
    """
    if isinstance(record, Conversation):
        try:
            return _conversation(record, tokenizer, template, max_length, last_answer_only)
        except UserError as error:
            raise UserError(f"{record.origin}: {error}") from None
    if isinstance(record, PlainText):
        return [_text(record.text, tokenizer, max_length)]
    return [_task(record, tokenizer, template, max_length)]


def _task(record: Record, tokenizer: Tokenizer, template: Template, max_length: int) -> Example | None:
    ids, n_prompt = template.encode_example(tokenizer, record.instruction, record.input, record.output)
    excess = max(0, len(ids) - max_length)
    if excess >= n_prompt:
        return None
    kinds = [CONTEXT] * (n_prompt - excess) + [ANSWER] * (len(ids) - n_prompt)
    return _example(ids[excess:], kinds, template.variant(bool(record.input)), whole=excess == 0)


def _text(text: str, tokenizer: Tokenizer, max_length: int) -> Example | None:
    begins = tokenizer.add_bos and tokenizer.bos_id is not None
    ids = [int(tokenizer.bos_id or 0)] * begins + tokenizer.encode(text) + [tokenizer.eos_id]
    kinds = [CONTEXT] * begins + [ANSWER] * (len(ids) - begins)
    return _example(ids[:max_length], kinds[:max_length], 0, whole=len(ids) <= max_length)


def _conversation(
    record: Conversation, tokenizer: Tokenizer, template: Template, max_length: int, last_answer_only: bool
) -> list[Example | None]:
    tools, messages = record.tools, trimmed(record.messages)

    def encoded(messages: Sequence[Message], last_only: bool = last_answer_only) -> EncodedConversation:
        return encode_conversation(tokenizer, template, messages, tools, last_only=last_only)

    try:
        return [_cut(messages, encoded, max_length)]
    except RewrittenError:
        ends = [at for at, m in enumerate(messages, start=1) if m.role == "assistant" and m.learned]
        last_only = partial(encoded, last_only=True)
        found = [_cut(messages[:end], last_only, max_length) for end in ends]
    # If prompts are learned too, they are learned in the last example that fits.
    last = max((number for number, one in enumerate(found) if one is not None), default=0)
    return [one if one is None or number == last else _answer_alone(one) for number, one in enumerate(found)]


def _answer_alone(example: Example) -> Example:
    """Return an example in which only the answer may be learned."""
    return replace(example, kinds=np.where(example.kinds == ANSWER, ANSWER, NEVER).astype(np.int8))


def _cut(
    messages: Sequence[Message], encoded: Callable[[Sequence[Message]], EncodedConversation], max_length: int
) -> Example | None:
    """Return a conversation as an example that fits; None if it then has nothing to learn."""
    whole = encoded(messages)
    found = whole if len(whole.ids) <= max_length else _longest_fitting(messages, encoded, max_length)
    if found is None or ANSWER not in found.kinds[1:]:
        return None
    return _example(found.ids, found.kinds, 0, whole=found is whole)


def trimmed(messages: Sequence[Message]) -> Sequence[Message]:
    """Return messages up to the last answer; those after it have no answer."""
    last = max(at for at, message in enumerate(messages) if message.role == "assistant")
    return messages[: last + 1]


def _longest_fitting(
    messages: Sequence[Message],
    encoded: Callable[[Sequence[Message]], EncodedConversation],
    max_length: int,
) -> EncodedConversation | None:
    """Return the longest end of a conversation that fits, with its system prompt; it begins with a user."""
    system = messages[:1] if messages[0].role == "system" else ()
    starts = [at for at, message in enumerate(messages) if message.role == "user" and at > len(system)]
    fitting, low, high = None, 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        found = encoded([*system, *messages[starts[middle] :]])
        if len(found.ids) <= max_length:
            fitting, high = found, middle
        else:
            low = middle + 1
    return fitting


def _example(ids: list[int], kinds: list[int], variant: int, *, whole: bool) -> Example:
    return Example(np.array(ids, np.int32), np.array(kinds, np.int8), variant, whole)
