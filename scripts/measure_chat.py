"""Time to the first token of each turn of a conversation, continued and computed afresh.

python scripts/measure_chat.py --base checkpoints/smollm2-135m
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import lit_adapter
from lit_adapter.streams import say

ASKED = (
    "Hello! I would like to learn about volcanoes. What are they, and where are they found?",
    "Why do some of them erupt so much more violently than others do?",
    "Which were the largest eruptions of the last two hundred years, and what did they change?",
    "Could one warn the people who live near a volcano early enough, and how would that work?",
    "Thank you. Please sum up in two sentences what we have talked about so far.",
)


def first_token(pieces: Iterator[str]) -> tuple[float, str]:
    """Return the seconds until the first piece of text, and the whole text."""
    start = time.perf_counter()
    first = next(pieces, "")
    seconds = time.perf_counter() - start
    return seconds, first + "".join(pieces)


def talk(model: lit_adapter.AdaptedLlama, n_new: int, *, afresh: bool) -> list[tuple[int, float, str]]:
    """Return for each turn the number of tokens before it, seconds to the first one, and the answer."""
    messages: list[dict[str, Any]] = []
    found = []
    for asked in ASKED:
        messages.append({"role": "user", "content": asked})
        n_before = model.model.config.context_length - model.room_for_chat(messages)
        if afresh:
            model.forget()
        seconds, answer = first_token(model.stream_chat(messages, max_new_tokens=n_new))
        messages.append({"role": "assistant", "content": answer})
        found.append((n_before, seconds, answer))
    return found


def main() -> None:
    """Measure both ways in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="checkpoints/smollm2-135m")
    parser.add_argument("--adapter")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--n_new", type=int, default=120, help="longest answer, in tokens")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    template = None if options.adapter else "auto"
    model = lit_adapter.load(
        options.adapter, options.base, device=options.device, dtype=options.dtype, template=template
    )
    talk(model, 2, afresh=True)  # warm
    runs: dict[bool, list[Any]] = {False: [], True: []}
    for _ in range(options.repeats):
        for way, found in runs.items():
            model.forget()
            found.append(talk(model, options.n_new, afresh=way))
    said = [[answer for *_, answer in run] for found in runs.values() for run in found]
    same = all(one == said[0] for one in said)
    say(f"{model!r}\nthe same answers both ways: {same}\n\nturn  tokens  going on  afresh")
    for turn in range(len(ASKED)):
        kept, fresh = (min(run[turn][1] for run in runs[way]) for way in (False, True))
        n_before = runs[False][0][turn][0]
        say(f"{turn + 1:4}  {n_before:6}  {kept:6.3f} s  {fresh:6.3f} s  ({fresh / kept:.1f} times)")


if __name__ == "__main__":
    sys.exit(main())
