"""Faults from 193 on: records that are streamed, and conversations in the cells of a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from bench import OK, Bench, Outcome, Row

LINES = f"{json.dumps(OK)}\n" * 20
U, A = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Hello"}]


def streamed(
    *options: object, name: str = "d.jsonl", content: str | bytes = LINES
) -> Callable[[Bench], Outcome]:
    """Fine-tune on a stream; what an option says twice is what it says last."""
    fixed = ("--data.stream", "true", "--data.val_size", 0, "--optim.max_steps", 3)
    return lambda bench: bench.finetune(*fixed, *options, data=bench.file(name, content))


def asked(prompt: Any, completion: Any, name: str = "d.jsonl") -> Callable[[Bench], Outcome]:
    row = json.dumps({"prompt": prompt, "completion": completion})
    return lambda bench: bench.finetune(data=bench.file(name, f"{row}\n" * 20))


ROWS = [
    Row(
        193, "weights", streamed("--data.weights", "[1]"), r"data\.stream true and data\.weights exclude each"
    ),
    Row(
        193,
        "duplicates",
        streamed("--data.drop_duplicates", "true"),
        r"data\.stream true and data\.drop_duplicates exclude each other: the second needs all records",
    ),
    Row(
        194,
        "no length",
        streamed("--optim.max_steps", "null", "--optim.batch_size", "null"),
        r"data\.stream true needs optim\.max_steps and optim\.batch_size: the length of a stream",
    ),
    Row(
        195,
        "split",
        streamed("--data.val_size", "0.1"),
        r"data\.stream true cannot split off data\.val_size, .* data\.val, or set data\.val_size 0",
    ),
    Row(196, "CSV", streamed(name="d.csv"), r"d\.csv: data\.stream reads JSON Lines and Parquet"),
    Row(196, "blank", streamed(content="\n\n"), r"d\.jsonl: has no record; leave the file out"),
    Row(
        196, "damaged", streamed(name="d.parquet", content="PAR1"), r"d\.parquet: cannot be streamed \(\w+: "
    ),
    Row(196, "other bytes", streamed(content=b"\xff\n"), r"d\.jsonl: not UTF-8: .*; save the file as UTF-8"),
    Row(
        200,
        "short rows",
        streamed("--optim.row_tokens", 100, "--data.max_length", 200),
        r"optim\.row_tokens is 100, but a record of a stream may take 199 tokens of a row; raise it, or low",
    ),
    Row(202, "text as an answer", asked(U, "Hello"), r"d\.jsonl:1: 'completion' is a text that is not JSON"),
    Row(202, "messages as an answer", asked("Hi", A), r"d\.jsonl:1: 'prompt' is a text that is not JSON"),
    Row(
        202,
        "another language",
        asked(str(U), str(A)),
        r"d\.jsonl:1: 'prompt' is a text that is not JSON: Expecting property name enclosed in double quotes",
    ),
]
