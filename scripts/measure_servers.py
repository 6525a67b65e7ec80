"""Time to the first token and tokens/s of running servers with OpenAI's interface, which take turns.

python scripts/measure_servers.py --server ours=http://127.0.0.1:8000/MODEL --server other=http://127.0.0.1:8001/MODEL

MODEL is the server's name for its model. Every round asks each of them with the same new prompts of random
words: one prompt alone, then several at once. Greedy, streamed, through /v1/completions.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from lit_adapter.streams import say

WORDS = ("river", "stone", "summer", "window", "garden", "letter", "morning", "bridge", "paper", "silver")


@dataclass
class Answered:
    """One answer: seconds until its first text and until its end, and its tokens."""

    first: float
    last: float
    n_tokens: int


def ask(server: str, prompt: str, n_new: int) -> Answered:
    """Ask a server, given as its address with the model as the path, for one streamed answer."""
    place = urlsplit(server)
    body = {
        "model": unquote(place.path[1:]),
        "prompt": prompt,
        "max_tokens": n_new,
        "temperature": 0,
        "seed": 0,
    }
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=600)
    started, first, n_chunks, n_tokens = time.perf_counter(), 0.0, 0, 0
    connection.request(
        "POST", "/v1/completions", json.dumps(body | {"stream": True}), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{server}: status {response.status}: {response.read()[:300]!r}")
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if any(choice.get("text") for choice in event["choices"]):
            n_chunks += 1
            first = first or time.perf_counter() - started
        n_tokens = (event.get("usage") or {}).get("completion_tokens", n_tokens)
    connection.close()
    return Answered(first, time.perf_counter() - started, n_tokens or n_chunks)


def rate(server: str, prompts: Sequence[str], n_new: int) -> float:
    """Return the tokens/s of answers to all prompts at once, until the last of them ends."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        started = time.perf_counter()
        answers = list(pool.map(lambda prompt: ask(server, prompt, n_new), prompts))
        return sum(answer.n_tokens for answer in answers) / (time.perf_counter() - started)


def main() -> None:
    """Measure, and print a line for each server."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", action="append", required=True, metavar="NAME=http://HOST:PORT/MODEL")
    parser.add_argument("--words", type=int, default=200, help="of a prompt")
    parser.add_argument("--n_new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--streams", type=int, default=8, help="answers at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1337)
    options = parser.parse_args()
    servers = dict(given.split("=", 1) for given in options.server)
    chance = random.Random(options.seed)

    def prompt() -> str:
        return " ".join(chance.choice(WORDS) for _ in range(options.words))

    for server in servers.values():  # warm
        ask(server, "Hello", 4)
    alone: dict[str, list[Answered]] = {name: [] for name in servers}
    rates: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(options.repeats):
        one, many = prompt(), [prompt() for _ in range(options.streams)]
        for name, server in servers.items():
            alone[name].append(ask(server, one, options.n_new))
            rates[name].append(rate(server, many, options.n_new))
    say(f"prompts of {options.words} words, {options.n_new} new tokens, medians of {options.repeats}")
    for name in servers:
        first = statistics.median(answer.first for answer in alone[name])
        after = statistics.median((a.n_tokens - 1) / (a.last - a.first) for a in alone[name])
        together = statistics.median(rates[name])
        say(
            f"{name}: first token {first * 1e3:,.0f} ms, then {after:.1f} tokens/s; "
            f"{options.streams} at once {together:.1f} tokens/s"
        )


if __name__ == "__main__":
    sys.exit(main())
