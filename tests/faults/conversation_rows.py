"""Faults from 114 on: conversations, their templates, sources and weights, and talking in a terminal."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bench import OK, Bench, Outcome, Row, as_script

from lit_adapter.cli.chat import main as chat_main

FIRST = 114
"""The number of the first of these faults on the page."""
U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
GOOD = {"messages": [U, A]}


def talk(*messages: Any, name: str = "d.jsonl", options: Sequence[object] = ()) -> Callable[[Bench], Outcome]:
    """Fine-tune on a good conversation and then this one."""
    return records([GOOD, {"messages": [*messages]}], name=name, options=options)


def records(
    rows: Sequence[Any], *, name: str = "d.jsonl", options: Sequence[object] = ()
) -> Callable[[Bench], Outcome]:
    content = "".join(json.dumps(row) + "\n" for row in rows)
    return lambda bench: bench.finetune(*options, data=bench.file(name, content))


def template(source: str, *more: object) -> Callable[[Bench], Outcome]:
    """Fine-tune on conversations of four turns with a chat template of one's own."""

    def tried(bench: Bench) -> Outcome:
        path = bench.file("own.jinja", source)
        rows = [{"messages": [U, A, U, {**A, "content": f"answer {n}"}]} for n in range(20)]
        return records(rows, options=["--data.template", path, *more])(bench)

    return tried


def sources(*options: object, names: Sequence[str] = ("a.jsonl",)) -> Callable[[Bench], Outcome]:
    def tried(bench: Bench) -> Outcome:
        for name in ("a.jsonl", "b.jsonl"):
            bench.file(name, f"{json.dumps(OK)}\n" * 20)
        paths = [str(bench.folder / name) for name in names]
        return bench.finetune(*options, data=json.dumps(paths) if len(paths) > 1 else paths[0])

    return tried


def terminal(*lines: str, options: Sequence[object] = ()) -> Callable[[Bench], Outcome]:
    """Pipe lines into ``scripts/chat.py``."""

    def tried(bench: Bench) -> Outcome:
        bench.before = bench.snapshot()
        given, before = io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())), sys.stdin
        sys.stdin = given
        fixed = ["--adapter", bench.adapter, "--base", bench.base, "--device", "cpu", "--dtype", "float32"]
        try:
            return as_script(chat_main, [*fixed, "--max_new_tokens", 5, *options])
        finally:
            sys.stdin = before

    return tried


SPIN = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FILL = "{{ 'x' * 400000000 }}"
ELSEWHERE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'bot: ' if messages | length < 2 else 'assistant: ' }}{% endif %}"
)
ONLY_USERS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"

ROWS = [
    Row(FIRST, "no messages", talk(), r"d\.jsonl:2: 'messages' is empty; write messages"),
    Row(
        FIRST, "no list", records([{"messages": 5}]), r"d\.jsonl:1: 'messages' is the number 5; expected a l"
    ),
    Row(FIRST, "text", records([{"messages": "hi"}]), r"d\.jsonl:1: 'messages' is a text that is not JSON"),
    Row(FIRST, "a number in it", talk(U, 5), r"d\.jsonl:2: turn 2: is the number 5; expected an object"),
    Row(FIRST + 1, "two answers", talk(U, A, A), r"d\.jsonl:2: turn 3: two assistant turns in a row; join"),
    Row(
        FIRST + 2,
        "unknown role",
        talk(U, {**A, "role": "asistant"}),
        r":2: turn 2: .*did you mean 'assistant'",
    ),
    Row(
        FIRST + 2, "odd role", talk(U, {**A, "role": 7}), r":2: turn 2: the role is 7; expected system, user"
    ),
    Row(FIRST + 2, "no role", talk({"content": "x"}), r":2: turn 1: has no role \(found: 'content'\)"),
    Row(FIRST + 3, "no answer", talk(U), r"d\.jsonl:2: no assistant turn, so there is nothing to learn; add"),
    Row(
        FIRST + 3,
        "all unmarked",
        records([{"messages": [U, {**A, "train": False}]}]),
        r"d\.jsonl: no usable rec",
    ),
    Row(
        FIRST + 4,
        "result first",
        talk(U, {"role": "tool", "content": "3"}, A),
        r":2: turn 2: a tool's result wi",
    ),
    Row(
        FIRST + 4,
        "another call's result",
        talk(U, CALLED, {"role": "tool", "tool_call_id": "c2", "content": "3"}, A),
        r"d\.jsonl:2: turn 3: a tool's result for call 'c2', which was not made before it",
    ),
    Row(
        FIRST + 4,
        "call without a name",
        talk(U, {**CALLED, "tool_calls": [{"function": {}}]}),
        r"d\.jsonl:2: turn 2: a tool call has no function with a name",
    ),
    Row(
        FIRST + 4,
        "arguments",
        talk(U, {**CALLED, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
        r"d\.jsonl:2: turn 2: 'arguments' is a text that is not JSON",
    ),
    Row(
        FIRST + 5,
        "null content",
        talk(U, {**A, "content": None}),
        r":2: turn 2: has no content, or null; write",
    ),
    Row(
        FIRST + 5,
        "a picture",
        talk({**U, "content": [{"type": "image_url"}]}, A),
        r"turn 1: .*type 'image_url'; ",
    ),
    Row(
        FIRST + 5,
        "half a character",
        talk({**U, "content": "\ud800"}, A),
        r":2: turn 1: 'content' has half of a",
    ),
    Row(FIRST + 5, "odd mark", talk(U, {**A, "weight": 0.5}), r":2: turn 2: weight is 0\.5; expected 0 or 1"),
    Row(
        FIRST + 6,
        "ten megabytes",
        talk(U, {**A, "content": "word " * 2_000_000}),
        r"d\.jsonl:2: turn 2: the conversation has 10,\d\d\d,\d\d\d characters, most of them here; ",
    ),
    Row(
        FIRST + 7,
        "formats mixed",
        records([GOOD, OK]),
        r"d\.jsonl:2: a record of format alpaca in a file of format messages \(its records have 'me",
    ),
    Row(
        FIRST + 7,
        "another format asked for",
        records([GOOD], options=["--data.format", "text"]),
        r"d\.jsonl:1: a record of format messages in a file of format text \(as data\.format says\)",
    ),
    Row(
        FIRST + 8,
        "endless template",
        template(SPIN),
        r"template 'jinja': the chat template fails: takes more than",
    ),
    Row(
        FIRST + 8,
        "filling template",
        template(FILL),
        r"template 'jinja': the chat template fails: (needs|gives) m",
    ),
    Row(FIRST + 8, "broken template", template("{% for %}"), r"template 'jinja': the chat template fails: "),
    Row(
        FIRST + 9,
        "an answer elsewhere",
        template(ELSEWHERE),
        r"d\.jsonl:\d+: turn 2: template 'jinja' writes this answer elsewhere than after its prompt",
    ),
    Row(
        FIRST + 9,
        "no answers",
        template(ONLY_USERS),
        r"template 'jinja' shows no answer; use alpaca or a text of",
    ),
    Row(
        FIRST + 10,
        "weights of sum 0",
        sources("--data.weights", "[0, 0]", names=("a.jsonl", "b.jsonl")),
        r"data\.weights is \[0\.0, 0\.0\], with the sum 0; expected numbers of 0 or more, not all of them 0",
    ),
    Row(
        FIRST + 10,
        "too few weights",
        sources("--data.weights", "[1]", names=("a.jsonl", "b.jsonl")),
        r"data\.weights has 1 numbers, but data\.train names 2; give one each",
    ),
    Row(
        FIRST + 11,
        "no match",
        sources(names=("*.csv",)),
        r"\*\.csv: no file matches this pattern; check folder and",
    ),
    Row(
        FIRST + 12,
        "contradiction",
        sources("--data.last_answer_only", "true", "--data.mask_prompt", "false"),
        r"data\.last_answer_only true and data\.mask_prompt false exclude each other; set one",
    ),
    Row(FIRST + 13, "unknown command", terminal("/rest"), r"unknown command '/rest'; did you mean '/reset'"),
    Row(FIRST + 13, "nothing to undo", terminal("/undo"), r"there is nothing to take back"),
    Row(FIRST + 13, "no adapter", terminal("/adapter nope"), r"nope: no such adapter file"),
    Row(FIRST + 13, "nothing to save", terminal("/save x.jsonl"), r"there is no message to save yet"),
    Row(
        FIRST + 13, "not UTF-8", lambda b: piped(b, b"\xff\n"), r"standard input:1: not UTF-8 text \(byte 0\)"
    ),
    Row(
        FIRST + 14,
        "full",
        terminal("word " * 600),
        r"the conversation fills the base's context; /reset starts",
    ),
]


def piped(bench: Bench, content: bytes) -> Outcome:
    bench.before = bench.snapshot()
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(content))
    try:
        fixed = ["--adapter", bench.adapter, "--base", bench.base, "--device", "cpu", "--dtype", "float32"]
        return as_script(chat_main, fixed)
    finally:
        sys.stdin = before
