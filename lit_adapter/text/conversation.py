"""Conversations: messages become token ids, and comparing texts shows which of these belong to an answer.

A chat template is a program that writes the whole conversation. To see where an answer begins and ends in its
text, the messages before the answer are rendered, with the prompt for one, and so are the messages up to it:
the whole text must begin with each of these. This works with any template, without marks in it. An answer
that is rewritten once later turns follow, and may not be learned, is found by what changes in the text when
the answer changes.

The template comes with the base, or is the user's, so it runs in a limited process (`limited`), through which
users' texts pass with a mark in what looks like control tokens (`protection`).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_adapter.errors import UserError
from lit_adapter.grouping import n_common
from lit_adapter.text.chat import common_values, control_pattern
from lit_adapter.text.limited import LimitedError, LimitedProcess
from lit_adapter.text.protection import Protection, unused_mark
from lit_adapter.text.template import Template
from lit_adapter.text.tokenizer import Tokenizer

NEVER, CONTEXT, ANSWER = 0, 1, 2
"""What a token is to the loss: never learned, learned if whole texts are, or part of an answer."""
_RENDERER = LimitedProcess("lit_adapter.text.chat_rendering")


class RewrittenError(UserError):
    """The template writes an answer differently once other turns follow it."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str
    """system, user, assistant or tool."""
    content: str
    learned: bool = True
    """Whether it may be learned: an answer on its own, another message only if whole texts are learned."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else a template may show: tool calls, their ids, reasoning."""

    def to_dict(self) -> dict[str, Any]:
        """Return the message as templates expect it."""
        return {"role": self.role, "content": self.content, **self.more}


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids ``[T]``, and what each is to the loss: `NEVER`, `CONTEXT` or `ANSWER`."""

    ids: list[int]
    kinds: list[int]


def encode_prompt(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Return the ids of a conversation, which an answer is to continue.

    Raises:
        UserError: the template fails, or cannot show what a message holds.
    """
    return _Rendered(tokenizer, template, messages, tools, prompt=True).encode().ids


def encode_conversation(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    last_only: bool = False,
) -> EncodedConversation:
    """Return the ids of a whole conversation, and what each is to the loss.

    An answer begins where a prompt for it ends, and its last token is the control token that ends it; an
    answer without one, at the end of the text, gets EOS. The ids before an answer are those of
    `encode_prompt`.

    ``last_only``: of the answers only the last one is learned.

    Raises:
        UserError: the template fails, or an answer that is to be learned cannot be found in the text; names
            the turn. It is a `RewrittenError` if that is not the last answer.
    """
    return _Rendered(tokenizer, template, messages, tools, last_only=last_only).encode()


class _Rendered:
    """The text of a conversation, and the places of its answers in it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        *,
        prompt: bool = False,
        last_only: bool = False,
    ) -> None:
        self.tokenizer, self.messages, self.prompt = tokenizer, messages, prompt
        self.answers = [at for at, message in enumerate(messages) if message.role == "assistant"]
        self.wanted = set() if prompt else {at for at in self.answers if messages[at].learned}
        if last_only:
            self.wanted &= set(self.answers[-1:])
        given = {"messages": [message.to_dict() for message in messages], "tools": list(tools)}
        self.mark = unused_mark(given)
        protected = Protection(tokenizer, self.mark).of(given)
        request = {
            "template": template.conversation_source(tokenizer),
            "date": template.date,
            "common": common_values(tokenizer) | {"tools": protected["tools"] or None},
            "messages": protected["messages"],
            "prompt": prompt,
            "starts": [start for at in self.answers for start in ((at, True), (at + 1, False))],
        }
        try:
            found = _RENDERER.ask(request)
        except LimitedError as error:
            raise UserError(f"template '{template.kind}': the chat template fails: {error}") from None
        if "failed" in found:
            turn = f"turn {found['failed']}: " if found["failed"] else ""
            raise UserError(f"{turn}template '{template.kind}': the chat template fails: {found['why']}")
        self.text: str = found["text"]
        self.spans = self._spans(found["lengths"], template)
        self.hidden = [] if prompt else self._hidden(found["lengths"], request)
        if self.spans and not prompt and not self.text[self.spans[-1][1] :].strip():
            self.text = self.text[: self.spans[-1][1]]  # white space after the last answer

    def _spans(self, lengths: list[int | None], template: Template) -> list[tuple[int, int, int]]:
        """Return start and end of every answer that was found, and what its tokens are to the loss."""
        spans = []
        for at, start, end in zip(self.answers, lengths[::2], lengths[1::2], strict=True):
            if start is not None and end is not None and start < end:
                if at in self.wanted and self._is_blank(start, end):
                    raise UserError(
                        f"turn {at + 1}: template '{template.kind}' shows nothing of this answer, which "
                        "calls tools; choose another data.template (chatml shows tool calls), or mark "
                        'the turn with "train": false'
                    )
                kind = ANSWER if at in self.wanted else CONTEXT
                kind = kind if self.messages[at].learned else NEVER
                spans.append((start, self._end(start, end), kind))
            elif at in self.wanted:
                is_last = at == self.answers[-1]
                why = _why(template, is_last=is_last, no_prompt=start is None)
                raise (UserError if is_last else RewrittenError)(f"turn {at + 1}: {why}")
        return spans

    def _hidden(self, lengths: list[int | None], request: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Return start and end of every message that may not be learned and has no span.

        Prompts for later answers do not look for them, so the text is not divided there (`_Writer.hide`).
        """
        found = []
        for at, message in enumerate(self.messages):
            if message.learned:
                continue
            number = 2 * bisect_left(self.answers, at)
            start, end = lengths[number : number + 2] if message.role == "assistant" else (None, None)
            if start is not None and end is not None and start < end:
                continue
            place = self._changing(at, request)
            if place is None:
                split = number + 2 * (message.role == "assistant")
                first = max((length for length in lengths[:split] if length is not None), default=0)
                later = (length for length in lengths[split:] if length is not None)
                place = first, next(later, len(self.text))
            elif start is not None and place[0] < place[1]:
                place = min(start, place[0]), place[1]
            found.append(place)
        return found

    def _changing(self, at: int, request: Mapping[str, Any]) -> tuple[int, int] | None:
        """Return the place that changes with a message's content, and the token that ends it.

        None if the template then fails.
        """
        messages = request["messages"]
        own = {} if self.messages[at].role == "assistant" else messages[at]  # a tool's answer has an id
        other = {**own, "role": self.messages[at].role, "content": self.mark}
        talk = {"messages": [*messages[:at], other, *messages[at + 1 :]], "add_generation_prompt": False}
        parts = {key: request[key] for key in ("template", "date", "common")}
        try:
            (changed,) = _RENDERER.ask({**parts, "conversations": [talk]})
        except LimitedError:
            return None
        if changed == self.text:
            return 0, 0
        start = _n_same(self.text, changed)
        end = max(start, len(self.text) - _n_same(self.text[::-1], changed[::-1]))
        following = next(self._controls(end, len(self.text)), None)
        if following is None or self.text[end : following.start()].strip():
            return start, end
        ends_others = any(self.text[:other_end].endswith(following[0]) for _, other_end, _ in self.spans)
        return start, following.end() if ends_others else end

    def _end(self, start: int, end: int) -> int:
        """Return where an answer ends: at its last control token, if only white space follows."""
        last = start
        for found in self._controls(start, end):
            last = found.end()
        return last if last > start and not self.text[last:end].strip() else end

    def _is_blank(self, start: int, end: int) -> bool:
        """Whether a part of the text has nothing but control tokens and white space."""
        pattern = control_pattern(self.tokenizer)
        text = self.text[start:end]
        return not (pattern.sub("", text) if pattern else text).strip()

    def _controls(self, start: int, end: int) -> Iterator[re.Match[str]]:
        pattern = control_pattern(self.tokenizer)
        return pattern.finditer(self.text, start, end) if pattern else iter(())

    def encode(self) -> EncodedConversation:
        """Return the ids and their kinds."""
        tokenizer, control = self.tokenizer, self.tokenizer.control_tokens
        writer, at, kind = _Writer(tokenizer), 0, self._kind_at
        cuts = sorted({edge for start, end, _ in self.spans for edge in (start, end)} | {len(self.text)})
        tokens = [*self._controls(0, len(self.text)), None]
        for found in tokens:
            until = len(self.text) if found is None else found.start()
            for cut in [cut for cut in cuts if at < cut < until] + [until]:
                writer.text(self._plain(at, cut), kind(at))
                for start, end in self.hidden:
                    writer.hide(self._plain(max(at, start), min(cut, end)), self._plain(min(cut, end), cut))
                at = cut
            if found is not None:
                is_hidden = any(start <= at < end for start, end in self.hidden)
                writer.control(control[found[0]], NEVER if is_hidden else kind(at))
                at = found.end()
        ends_bare = self.spans and self.spans[-1][1] == len(self.text) and not writer.after_control
        if ends_bare and not self.prompt:
            writer.control(tokenizer.eos_id, self.spans[-1][2])
        if not writer.ids:
            raise UserError("the prompt is empty, and this base has no BOS to start with; write a text")
        return EncodedConversation(writer.ids, writer.kinds)

    def _plain(self, start: int, end: int) -> str:
        """Return a part of the text as users wrote it."""
        return self.text[start:end].replace(self.mark, "")

    def _kind_at(self, place: int) -> int:
        return next((kind for start, end, kind in self.spans if start <= place < end), CONTEXT)


def _why(template: Template, *, is_last: bool, no_prompt: bool) -> str:
    """Say why an answer cannot be learned, and what would help."""
    name, other = f"template '{template.kind}'", "choose another data.template"
    if no_prompt:
        return f"{name} writes this answer elsewhere than after its prompt; {other}"
    if is_last:
        return f"{name} does not show this answer; {other}"
    return (
        f"{name} renders this answer differently once later turns follow; {other}, or set "
        "data.last_answer_only true"
    )


class _Writer:
    """Ids so far; text between two control tokens is encoded together as far as that keeps earlier ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.kinds: list[int] = []
        self.after_control = False
        self._n_controls = 0
        self._run, self._run_start = "", 0

    def control(self, token: int, kind: int) -> None:
        """Add a control token."""
        if token != self.tokenizer.bos_id:
            self._begin()
        self._add([token], kind)
        self._n_controls += 1
        self._run, self._run_start, self.after_control = "", len(self.ids), True

    def text(self, text: str, kind: int) -> None:
        """Add a text."""
        if not text:
            return
        self._begin()
        joint = self._encoded_run(self._run + text)
        earlier = self.ids[self._run_start :]
        if joint[: len(earlier)] == earlier:
            new = joint[len(earlier) :]
        else:
            new = self.tokenizer.encode(text, continuation=True)
        self._add(new, kind)
        self._run, self.after_control = self._run + text, False

    def hide(self, hidden: str, after: str) -> None:
        """Mark the tokens that hold any part of a text as never learned; ``after`` was written after it."""
        if not hidden:
            return
        ids, before = self.ids[self._run_start :], self._run.removesuffix(hidden + after)
        first = self._run_start + n_common(ids, self._encoded_run(before))
        rest = self.tokenizer.encode(after, continuation=True)
        last = len(self.ids) - n_common(ids[::-1], rest[::-1])
        self.kinds[first:last] = [NEVER] * (last - first)

    def _encoded_run(self, text: str) -> list[int]:
        """Return the ids of a text that follows the last control token."""
        continues = self._n_controls > 0 and not self.tokenizer.space_after_control
        return self.tokenizer.encode(text, continuation=continues)

    def _begin(self) -> None:
        """Put BOS first if the base was trained with it."""
        if not self.ids and self.tokenizer.add_bos and self.tokenizer.bos_id is not None:
            self._add([self.tokenizer.bos_id], CONTEXT)
            self._run_start = 1

    def _add(self, ids: list[int], kind: int) -> None:
        self.ids += ids
        self.kinds += [kind] * len(ids)


def _n_same(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their start, which may be a million."""
    lengths = range(1, min(len(one), len(other)) + 1)
    return bisect_left(lengths, True, key=lambda length: one[:length] != other[:length])
