"""Conversations become tokens: what is learned, for any template, and what users write stays text."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import HARD, LLAMA2_CHAT, MAKERS, Kind, byte_level_json
from transformers import PreTrainedTokenizerFast

from lit_adapter.data.encode import encode_records
from lit_adapter.data.examples import encode_examples
from lit_adapter.data.record import Conversation
from lit_adapter.data.records import Records
from lit_adapter.errors import UserError
from lit_adapter.text import chat_templates
from lit_adapter.text.conversation import (
    ANSWER,
    CONTEXT,
    NEVER,
    Message,
    RewrittenError,
    encode_conversation,
    encode_prompt,
)
from lit_adapter.text.load import load_tokenizer
from lit_adapter.text.template import Template, resolve_template
from lit_adapter.text.tokenizer import Tokenizer

MARKED = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}"
        "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + eos_token + '\n' }}"
        "{% elif m.role == 'system' %}{{ '<|system|>\n' + m.content + eos_token + '\n' }}"
        "{% else %}{{ '<|assistant|>\n' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}
"""Templates with marks, in the manner of those that bases bring."""
DROPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHOWS_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def jinja(source: str) -> Template:
    return Template("jinja", "{instruction}", jinja=source)


def said(*contents: str, system: str | None = None) -> list[Message]:
    roles = ["user", "assistant"] * len(contents)
    messages = [Message(role, text) for role, text in zip(roles, contents, strict=False)]
    return [Message("system", system), *messages] if system is not None else messages


def learned(tokenizer: Tokenizer, ids: list[int], kinds: list[int], kind: int = ANSWER) -> list[str]:
    """The texts of the runs of one kind, control tokens spelled."""
    names = {id_: name for name, id_ in tokenizer.control_tokens.items()}
    found, run = [], b""
    for token, own in [*zip(ids, kinds, strict=True), (0, -1)]:
        if own == kind:
            run += names[token].encode() if token in names else tokenizer.piece(token)
        elif run:
            found.append(run.decode())
            run = b""
    return found


SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A tokenizer with the control tokens of all templates: ours, and transformers' of the same file."""
    folder = tmp_path_factory.mktemp("both")
    model = tokenizers.Tokenizer.from_str(byte_level_json())
    model.add_special_tokens(SPECIAL)
    model.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
    return load_tokenizer(folder), theirs


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [*HARD, "<", "<|", "|>", "end|>", "<|im_end", "s>", "Hello", "\n", " x "]
)


@pytest.mark.parametrize("name", list(MARKED))
def test_the_same_tokens_are_learned_as_by_the_marks_of_transformers(
    both: tuple[Tokenizer, Any], name: str
) -> None:
    ours, theirs = both
    talks = [
        said("Hi", "Hello!", "2 + 2?", "4", system="Be brief."),
        said("Name three colours.", "Red, green, blue.\n\nAnd more."),
        said("caf\u00e9 \u6771\u4eac", "  indented\n", "x", "y", "z", "w"),
    ]
    for talk in talks:
        found = encode_conversation(ours, jinja(MARKED[name]), talk)
        wanted = theirs.apply_chat_template(
            [message.to_dict() for message in talk],
            chat_template=MARKED[name],
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        ids, mask, length = wanted["input_ids"], wanted["assistant_masks"], len(found.ids)
        assert sum(mask) > 0
        assert found.ids == ids[:length]
        assert [kind == ANSWER for kind in found.kinds] == [bool(mark) for mark in mask[:length]]
        assert not any(mask[length:])
        assert theirs.decode(ids[length:]).strip() == ""


@pytest.mark.parametrize("name", list(MAKERS))
def test_any_tokenizer_learns_exactly_the_answers_and_what_ends_them(
    made: dict[str, Kind], name: str
) -> None:
    ours = made[name].ours
    template = resolve_template("auto", ours, conversations=True)
    end = template.end or "</s>"
    found = encode_conversation(ours, template, said("Say it.", "Hello", "Again?", "world"))
    texts = [text.removesuffix(end).strip() for text in learned(ours, found.ids, found.kinds)]
    assert texts == ["Hello", "world"]
    n_ends = sum(
        token == template.end_id(ours) for token, kind in zip(found.ids, found.kinds, strict=True) if kind
    )
    assert n_ends >= 2


@pytest.mark.parametrize("name", list(MAKERS))
def test_what_users_write_never_becomes_a_control_token(made: dict[str, Kind], name: str) -> None:
    ours = made[name].ours
    control = set(ours.control_tokens.values())
    names = ["auto", "alpaca-chat", "alpaca", "Say {instruction}:"]
    templates = [resolve_template(one, ours, conversations=True) for one in names]
    counts = [
        [token for token in encode_conversation(ours, one, said("a", "b", "c", "d")).ids if token in control]
        for one in templates
    ]

    @settings(max_examples=15)
    @given(st.sampled_from(range(len(templates))), st.tuples(*[TEXTS] * 4))
    def check(which: int, texts: tuple[str, ...]) -> None:
        answers = [text if text.strip() else "x" for text in texts[1::2]]
        talk = said(texts[0], answers[0], texts[2], answers[1])
        found = encode_conversation(ours, templates[which], talk)
        assert [token for token in found.ids if token in control] == counts[which]
        for number in (1, 3):
            prompt = encode_prompt(ours, templates[which], talk[:number])
            assert found.ids[: len(prompt)] == prompt

    check()


def test_a_control_token_in_calls_tools_and_reasoning_stays_text(both: tuple[Tokenizer, Any]) -> None:
    ours, _ = both
    evil = "<|im_end|>"
    call = {"type": "function", "function": {"name": evil, "arguments": {evil: [evil, {"deep": evil}]}}}
    more = {"reasoning_content": evil, "tool_calls": [call], evil: evil}
    talk = [Message("user", "x"), Message("assistant", "y", more=more)]
    found = encode_conversation(ours, jinja(SHOWS_REASONING), talk)
    end = ours.control_tokens[evil]
    assert found.ids.count(end) == 2
    (text,) = learned(ours, found.ids, found.kinds)
    arguments = json.dumps(call["function"], ensure_ascii=False)
    assert text == f"<think>{evil}</think>y{arguments}{evil}"


def test_one_turn_is_encoded_as_the_instruction_record_is(made: dict[str, Kind]) -> None:
    for kind in made.values():
        for name in ("chat", "alpaca", "alpaca-newline", "Q: {instruction}\nA:"):
            if name == "chat" and kind.ours.chat_template in (None, LLAMA2_CHAT):
                continue  # LLaMA 2's puts a space between an answer and its end, which a record does not have
            template = resolve_template(name, kind.ours)
            ids, n_prompt = template.encode_example(kind.ours, "Say it.", "", "Hello there")
            found = encode_conversation(kind.ours, template, said("Say it.", "Hello there"))
            assert found.ids == ids, (name, kind.folder)
            assert found.kinds == [CONTEXT] * n_prompt + [ANSWER] * (len(ids) - n_prompt)


def test_marks_and_the_last_answer(both: tuple[Tokenizer, Any]) -> None:
    ours, _ = both
    template = resolve_template("chatml", ours)
    talk = said("a", "first", "b", "second", "c", "third")
    talk[3] = Message("assistant", "second", learned=False)
    found = encode_conversation(ours, template, talk)
    assert learned(ours, found.ids, found.kinds) == ["first<|im_end|>", "third<|im_end|>"]
    assert learned(ours, found.ids, found.kinds, NEVER) == ["second<|im_end|>"]
    last = encode_conversation(ours, template, talk, last_only=True)
    assert last.ids == found.ids
    assert learned(ours, last.ids, last.kinds) == ["third<|im_end|>"]


def test_a_call_that_the_template_does_not_show_is_no_empty_answer(both: tuple[Tokenizer, Any]) -> None:
    ours, _ = both
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    talk = [Message("user", "x"), Message("assistant", "", more={"tool_calls": [call]})]
    hides = SHOWS_REASONING.replace("m.tool_calls or []", "[]")
    with pytest.raises(UserError, match=r"^turn 2: template 'jinja' shows nothing of this answer, which"):
        encode_conversation(ours, jinja(hides), talk)
    found = encode_conversation(ours, jinja(SHOWS_REASONING), talk)
    assert len(learned(ours, found.ids, found.kinds)) == 1


def test_a_template_that_rewrites_earlier_answers_is_known_by_the_turn(
    both: tuple[Tokenizer, Any],
) -> None:
    ours, _ = both
    talk = said("a", "<think>so</think>first", "b", "<think>why</think>second")
    with pytest.raises(
        RewrittenError, match=r"^turn 2: template 'jinja' renders this answer differently once"
    ):
        encode_conversation(ours, jinja(DROPS_THINKING), talk)
    found = encode_conversation(ours, jinja(DROPS_THINKING), talk, last_only=True)
    assert learned(ours, found.ids, found.kinds) == ["<think>why</think>second<|im_end|>"]
    assert "so" not in ours.decode(found.ids)


EMPTY_THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content or '' }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Shows reasoning after the last user's message only, there also an empty one, as reasoning models do."""


@pytest.mark.parametrize("source", [EMPTY_THINKING, DROPS_THINKING])
@settings(max_examples=20)
@given(
    turns=st.lists(
        st.tuples(*[st.text("abc <>\n|é", min_size=1, max_size=8)] * 2, st.booleans()), min_size=1, max_size=4
    ),
    system=st.none() | st.just("Be brief."),
)
def test_answers_that_are_rewritten_later_are_learned_one_by_one(
    both: tuple[Tokenizer, Any], source: str, turns: list[tuple[str, str, bool]], system: str | None
) -> None:
    ours, theirs = both
    talk = [Message("system", system)] if system else []
    for asked, answer, is_learned in turns:
        more = {} if source == DROPS_THINKING else {"reasoning_content": answer[:2]}
        talk += [
            Message("user", asked),
            Message("assistant", f"<think>{answer}</think>x{answer}y", is_learned, more),
        ]
    ends = [at for at, one in enumerate(talk, start=1) if one.role == "assistant" and one.learned]
    if not ends:
        return
    record = Conversation.of(talk, [], file="x.jsonl", line=3)
    examples = encode_examples(record, ours, jinja(source), 10_000)
    if len(ends) == 1 and ends[0] == len(talk):
        assert len(examples) == 1
    if len(examples) == 1:
        return  # nothing was rewritten
    for end, example in zip(ends, examples, strict=True):
        said_so_far = [one.to_dict() for one in talk[:end]]
        whole, prompt = (
            theirs.apply_chat_template(part, chat_template=source, tokenize=False, add_generation_prompt=asks)
            for part, asks in ((said_so_far, False), (said_so_far[:-1], True))
        )
        assert example is not None
        assert example.whole
        assert whole.startswith(prompt)
        ids = example.ids.tolist()
        assert learned(ours, ids, [ANSWER] * len(ids)) == [whole.removesuffix("\n")]
        (text,) = learned(ours, ids, example.kinds.tolist())
        assert prompt + text == whole.removesuffix("\n")
        expected = theirs(prompt, add_special_tokens=False)["input_ids"]
        assert ids[: example.n_prompt] == expected
        found = set(example.kinds[: example.n_prompt].tolist())
        is_hidden = any(one.role == "assistant" and not one.learned for one in talk[:end])
        assert found == ({CONTEXT, *[NEVER] * is_hidden} if end == ends[-1] else {NEVER})


def test_an_answer_of_several_that_does_not_fit_is_left_out_alone(both: tuple[Tokenizer, Any]) -> None:
    ours, _ = both
    talk = said("a", "short", "b", "long " * 60, "c", "brief")
    record = Conversation.of(talk, [], file="x.jsonl", line=3)
    first, second, third = encode_examples(record, ours, jinja(EMPTY_THINKING), 80)
    assert first is not None
    assert first.whole
    assert second is None
    assert third is not None
    assert not third.whole
    assert "long" not in ours.decode(third.ids.tolist())
    records = Records((record, Conversation.of(talk[:2], [], file="x.jsonl", line=4)), "x.jsonl")
    encoded = encode_records(records, ours, jinja(EMPTY_THINKING), max_length=80)
    assert encoded.source_row.tolist() == [0, 0, 1]
    assert encoded.left_out.tolist() == [0]
    assert (encoded.n_read, encoded.n_divided, encoded.n_cut) == (2, 1, 1)
    assert encoded.choose(np.array([1]), 2).left_out.tolist() == []
    assert encoded.choose(np.array([0]), 2).left_out.tolist() == [0]


def test_a_template_that_shows_no_answer_as_a_prompt_asks_for_it_is_refused_with_the_turn(
    both: tuple[Tokenizer, Any],
) -> None:
    """Not even one by one."""
    ours, _ = both
    asks = DROPS_THINKING.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>bot\n{% endif %}")
    record = Conversation.of(said("a", "b", "c", "d"), [], file="x.jsonl", line=3)
    with pytest.raises(UserError, match=r"^x.jsonl:3: turn 2: template 'jinja' writes this answer elsewhere"):
        encode_examples(record, ours, jinja(asks), 1000)


@pytest.mark.parametrize("template", ["alpaca", "alpaca-newline", "Q: {instruction}\nA:"])
def test_an_end_token_without_a_spelling_cannot_end_answers(
    both: tuple[Tokenizer, Any], template: str
) -> None:
    """As of a base that names its EOS by an id alone, which is that of no special token."""
    ours = copy.copy(both[0])
    ours.control_tokens = {text: i for text, i in ours.control_tokens.items() if i != ours.eos_id}
    record = Conversation.of(said("a", "b", "c", "d"), [], file="x.jsonl", line=3)
    with pytest.raises(UserError, match=f"end token, {ours.eos_id}, is no control token.*mark it as special"):
        encode_examples(record, ours, resolve_template(template, ours), 1000)


def test_a_template_that_fails_names_the_turn(both: tuple[Tokenizer, Any]) -> None:
    ours, _ = both
    source = "{% if messages | length == 3 %}{{ raise_exception('not three') }}{% endif %}x"
    with pytest.raises(UserError, match=r"^turn 3: template 'jinja': the chat template fails: not three"):
        encode_conversation(ours, jinja(source), said("a", "b", "c", "d"))
    with pytest.raises(
        UserError, match=r"turn 2: template 'jinja' does not show this answer; choose another"
    ):
        encode_conversation(ours, jinja("nothing"), said("a", "b"))
    endless = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="the chat template fails: takes more than 1 s"):
        encode_conversation(ours, jinja(endless), said("a", "b"))
    template = resolve_template("chatml", ours)
    assert encode_conversation(ours, template, said("a", "b")).ids  # the process starts again


def test_a_long_conversation_loses_its_first_turns_and_keeps_its_system_prompt(
    both: tuple[Tokenizer, Any],
) -> None:
    ours, _ = both
    template = resolve_template("chatml", ours)
    texts = [f"turn {number} " + "word " * 20 for number in range(12)]
    talk = said(*texts, system="Remember.")
    record = Conversation.of(talk, [], file="x.jsonl", line=3)
    (whole,) = encode_examples(record, ours, template, 10_000)
    assert whole is not None
    assert whole.whole
    for max_length in (len(whole.ids), 900, 600, 300):
        (example,) = encode_examples(record, ours, template, max_length)
        assert example is not None
        assert len(example.ids) <= max_length
        kept = [n for n in range(12) if f"turn {n} " in ours.decode(example.ids.tolist())]
        assert kept == list(range(kept[0], 12))
        assert kept[0] % 2 == 0
        expected = encode_conversation(ours, template, [talk[0], *talk[1 + kept[0] :]])
        assert example.ids.tolist() == expected.ids
        longer = encode_conversation(ours, template, [talk[0], *talk[max(1, kept[0] - 1) :]])
        assert kept[0] == 0 or len(longer.ids) > max_length
    assert encode_examples(record, ours, template, 40) == [None]


def test_named_templates_need_their_control_tokens(
    made: dict[str, Kind], both: tuple[Tokenizer, Any]
) -> None:
    with pytest.raises(
        UserError, match=r"template 'llama3': this tokenizer has no control token '<\|start_header"
    ):
        resolve_template("llama3", made["json-bytes"].ours)
    assert resolve_template("auto", made["sentencepiece"].ours, conversations=True).kind == "alpaca-chat"
    assert resolve_template("auto", both[0], conversations=True).kind == "chatml"
    assert resolve_template("auto", both[0]).kind == "alpaca"
    for name in chat_templates.SOURCES:
        found = encode_conversation(both[0], resolve_template(name, both[0]), said("a", "b", "c", "d"))
        texts = [text.split("<|")[0].strip() for text in learned(both[0], found.ids, found.kinds)]
        assert texts == ["b", "d"], name


def test_a_template_keeps_its_jinja_and_its_day(both: tuple[Tokenizer, Any], tmp_path: Any) -> None:
    ours, _ = both
    path = tmp_path / "own.jinja"
    path.write_text("{{ strftime_now('%Y-%m-%d') }}" + chat_templates.CHATML + "\n")
    template = resolve_template(str(path), ours)
    kept = Template.from_dict(json.loads(json.dumps(template.to_dict() | {"date": "2020-02-29"})))
    found = encode_conversation(ours, kept, said("a", "b"))
    assert ours.decode(found.ids).startswith("2020-02-29")
    assert "jinja" not in resolve_template("alpaca", ours).to_dict()
    assert Template.from_dict(resolve_template("alpaca", ours).to_dict()) == resolve_template("alpaca", ours)


def test_a_forked_process_renders_for_itself(both: tuple[Tokenizer, Any]) -> None:
    ours, _ = both
    template, talk = resolve_template("chatml", ours), said("a", "b", "c", "d")
    expected = encode_conversation(ours, template, talk)
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                same = [encode_conversation(ours, template, talk) == expected for _ in range(20)]
                status = 0 if all(same) else 2
            finally:
                os._exit(status)
        children.append(child)
    assert all(encode_conversation(ours, template, talk) == expected for _ in range(20))
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


def with_secret(*more: str) -> list[Message]:
    """A conversation whose first answer may not be learned."""
    talk = said("q1", "SECRET", "q2", "a2", *more)
    talk[1] = Message("assistant", "SECRET", learned=False)
    return talk


@pytest.mark.parametrize("source", [EMPTY_THINKING, EMPTY_THINKING.replace("<|im_end|>", "")])
@pytest.mark.parametrize("secret", ["SECRET", "  two\n\nlines ", "<|im_end|>", "q1", "caf\u00e9 \u6771"])
def test_an_answer_that_is_rewritten_and_may_not_be_learned_never_is(
    both: tuple[Tokenizer, Any], source: str, secret: str
) -> None:
    ours, _ = both
    talk = with_secret()
    talk[1] = Message("assistant", secret, learned=False)
    found = encode_conversation(ours, jinja(source), talk)
    (hidden,) = learned(ours, found.ids, found.kinds, NEVER)
    assert secret in hidden
    assert "q2" not in hidden
    assert "q1" not in hidden.replace(secret, "")
    prompt = encode_prompt(ours, jinja(source), talk[:3])
    assert found.ids[: len(prompt)] == prompt
    assert learned(ours, found.ids, found.kinds)[-1].startswith("<think>\n\n</think>\n\na2")


def test_its_tokens_are_those_that_are_not_learned_where_nothing_is_rewritten(
    both: tuple[Tokenizer, Any],
) -> None:
    ours, _ = both
    for template in (resolve_template("chatml", ours), jinja(EMPTY_THINKING)):
        found = encode_conversation(ours, template, with_secret())
        assert learned(ours, found.ids, found.kinds, NEVER) == ["SECRET<|im_end|>"]


@pytest.mark.parametrize("name", ["chatml", "alpaca-chat", "mistral", "needs a name"])
def test_a_marked_turn_of_a_user_or_system_prompt_is_never_learned(
    both: tuple[Tokenizer, Any], name: str
) -> None:
    """What answers are learned stays the same."""
    ours, _ = both
    needs = "{% for m in messages %}{% if m.role == 'user' %}{% set _ = '' + m.name %}{% endif %}{% endfor %}"
    template = jinja(
        needs + chat_templates.CHATML if name == "needs a name" else chat_templates.SOURCES[name]
    )
    plain = [replace(one, more={"name": "n"}) for one in said("q1", "a1", "q2", "a2", system="BE BRIEF")]
    talk = [replace(one, learned=one.content not in ("BE BRIEF", "q2")) for one in plain]
    usual, found = (encode_conversation(ours, template, one) for one in (plain, talk))
    assert found.ids == usual.ids
    assert learned(ours, found.ids, found.kinds) == learned(ours, usual.ids, usual.kinds)
    hidden = "".join(learned(ours, found.ids, found.kinds, NEVER))
    assert "BE BRIEF" in hidden
    assert "q2" in hidden
    assert "q1" not in hidden


def test_what_an_answer_that_may_not_be_learned_calls_is_not_learned_either(
    both: tuple[Tokenizer, Any],
) -> None:
    ours, _ = both
    source = EMPTY_THINKING.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
    )
    talk = with_secret()
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 5}}}
    talk[1] = Message("assistant", "", learned=False, more={"tool_calls": [call]})
    found = encode_conversation(ours, jinja(source), talk)
    assert learned(ours, found.ids, found.kinds, NEVER) == [json.dumps(call) + "<|im_end|>"]


def test_where_a_rewritten_answer_cannot_be_found_all_up_to_the_next_one_is_not_learned(
    both: tuple[Tokenizer, Any],
) -> None:
    """This template fails without the reasoning that every answer has."""
    ours, _ = both
    needs = "{% for m in messages %}{% if m.role == 'assistant' %}{% set _ = '' + m.reasoning_content %}"
    talk = [replace(one, more={"reasoning_content": "r"}) for one in with_secret()]
    found = encode_conversation(ours, jinja(needs + "{% endif %}{% endfor %}" + EMPTY_THINKING), talk)
    (hidden,) = learned(ours, found.ids, found.kinds, NEVER)
    assert hidden.startswith("SECRET<|im_end|>")
    assert learned(ours, found.ids, found.kinds) == ["<think>\nr\n</think>\n\na2<|im_end|>"]


def test_it_is_not_learned_in_a_conversation_that_is_split(both: tuple[Tokenizer, Any]) -> None:
    ours, _ = both
    record = Conversation.of(with_secret("q3", "a3"), [], file="x.jsonl", line=3)
    examples = encode_examples(record, ours, jinja(EMPTY_THINKING), 10_000)
    assert len(examples) == 2
    for example in examples:
        assert example is not None
        ids, kinds = example.ids.tolist(), example.kinds.tolist()
        assert "SECRET" in ours.decode(ids)
        assert "SECRET" not in "".join(learned(ours, ids, kinds) + learned(ours, ids, kinds, CONTEXT))
    assert "q2" in "".join(learned(ours, ids, kinds, CONTEXT))


def test_the_last_example_that_fits_keeps_the_context(both: tuple[Tokenizer, Any]) -> None:
    ours, _ = both
    talk = said("a", "first", "b", "second", "c", "long " * 90)
    record = Conversation.of(talk, [], file="x.jsonl", line=3)
    first, second, third = encode_examples(record, ours, jinja(EMPTY_THINKING), 80)
    assert first is not None
    assert second is not None
    assert third is None
    assert CONTEXT not in first.kinds
    assert NEVER not in second.kinds
