"""The embedded demo data: free-text requests and the strict JSON commands to turn them into.

There are six kinds of command, each with many wordings. Training and held-out records share only the
wordings: the checksum of a word, number or time decides which side it belongs to, whatever the seed.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_adapter.data.demo_words import WORDS
from lit_adapter.errors import UserError
from lit_adapter.files.write import write_json

INSTRUCTION = "Turn the request into a JSON command."
N_TRAIN = 2000
N_VAL = 200

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Kind:
    """One kind of command: its slots, and the wordings of its requests."""

    action: str
    slots: dict[str, str]
    """Pattern of pool names by slot name; a pattern that is only a pool of numbers gives a number."""
    orders: tuple[str, ...]
    """Imperatives, put into `ORDER_FRAMES`; none starts with a slot, as the first letter is capitalized."""
    statements: tuple[str, ...]
    """Whole sentences."""


POOLS: dict[str, Sequence[str] | Sequence[int]] = {
    **{pool: words.split() for pool, words in WORDS.items()},
    "time": [f"{hour}:{minute:02d}" for hour in range(5, 24) for minute in range(0, 60, 5)],
    "people": range(2, 91),
    "quantity": range(2, 61),
    "degrees": range(5, 35),
}
"""Words, times and numbers, each of which is used either in training or in held-out records."""

GLUE = {"owner": ("the", "your", "my", "our"), "verb": ("is", "was", "is not")}
"""Function words inside a longer value, used on both sides."""

KINDS = (
    Kind(
        "set_alarm",
        {"time": "{time}", "label": "{subject} {event}"},
        (
            "set an alarm for {time} called {label}",
            "wake me at {time} for the {label}",
            "add an alarm labelled {label} at {time}",
            "create a {time} alarm with the name {label}",
            "remind me of the {label} at {time}",
            "schedule an alarm at {time} named {label}",
            "make sure I am up at {time} for the {label}",
            "give me a {label} alarm at {time}",
            "start beeping at {time} because of the {label}",
        ),
        (
            "I have the {label} and need an alarm at {time}.",
            "The {label} is soon, so wake me at {time}.",
            "There should be an alarm at {time} called {label}.",
        ),
    ),
    Kind(
        "send_message",
        {"to": "{first_name}", "text": "{owner} {adjective} {noun} {verb} {state}"},
        (
            "tell {to} that {text}",
            "send {to} a message: {text}",
            "text {to} that {text}",
            "let {to} know that {text}",
            "message {to} saying {text}",
            "write to {to} that {text}",
            "inform {to} that {text}",
            "pass on to {to} that {text}",
            "send a note to {to} saying that {text}",
            "mention to {to} that {text}",
        ),
        (
            "I want {to} to know that {text}.",
            "{to} should hear from me that {text}.",
            "Somebody has to tell {to} that {text}.",
        ),
    ),
    Kind(
        "play_music",
        {"title": "{title_adjective} {title_word}", "artist": "{first_name} {last_name}"},
        (
            "play {title} by {artist}",
            "put on {title} by {artist}",
            "start {title} from {artist}",
            "play the track {title} by {artist}",
            "queue {title} by {artist}",
            "find {title} by {artist} and play it",
            "let me hear {artist} with {title}",
            "play something by {artist}, namely {title}",
            "turn on {title} by the singer {artist}",
        ),
        (
            "I would love to hear {title} by {artist}.",
            "I am in the mood for {title} by {artist}.",
            "How about some {artist}, the track {title}?",
        ),
    ),
    Kind(
        "book_room",
        {"room": "{room_name} {room_kind}", "people": "{people}"},
        (
            "book the {room} for {people} people",
            "reserve the {room} for {people} guests",
            "get us the {room}, we are {people}",
            "hold the {room} for a group of {people}",
            "find {people} seats in the {room}",
            "arrange the {room} for a team of {people}",
            "make a booking of the {room} for {people} persons",
            "put {people} of us into the {room}",
            "have the {room} kept for {people} guests",
        ),
        (
            "We need the {room} for {people} people.",
            "There will be {people} of us, so book the {room}.",
            "A group of {people} would like the {room}.",
        ),
    ),
    Kind(
        "add_item",
        {"item": "{adjective} {noun}s", "quantity": "{quantity}"},
        (
            "add {quantity} {item} to the shopping list",
            "put {quantity} {item} on my list",
            "note down {quantity} {item}",
            "remember to buy {quantity} {item}",
            "get {quantity} {item}",
            "write {quantity} {item} on the list",
            "include {quantity} {item} in the next order",
            "pick up {quantity} {item} for me",
            "have {quantity} {item} on the shopping list",
        ),
        (
            "We are out of {item}, so buy {quantity}.",
            "We need {quantity} {item}.",
            "I have run out of {item}, {quantity} would do.",
        ),
    ),
    Kind(
        "set_temperature",
        {"room": "{home_place} {home_room}", "degrees": "{degrees}"},
        (
            "set the {room} to {degrees} degrees",
            "heat the {room} to {degrees} degrees",
            "make it {degrees} degrees in the {room}",
            "turn the heating in the {room} to {degrees}",
            "bring the {room} to {degrees} degrees",
            "change the temperature in the {room} to {degrees}",
            "keep the {room} at {degrees} degrees",
            "adjust the {room} thermostat to {degrees}",
        ),
        (
            "I want {degrees} degrees in the {room}.",
            "The {room} should be at {degrees} degrees.",
            "It ought to be {degrees} degrees in the {room}.",
            "Could it be {degrees} degrees in the {room}?",
        ),
    ),
)

ORDER_FRAMES = (
    "{}.",
    "{}",
    "{}, please.",
    "Please {}.",
    "Could you {}?",
    "Can you {}, please?",
    "Would you {}?",
    "Hey, {}.",
    "Hi, could you please {}?",
    "I need you to {}.",
    "Go ahead and {}.",
    "{}, thanks.",
)
STATEMENT_FRAMES = ("{}", "Hi! {}", "Hello. {}", "{} Thanks.")


class _Decks:
    """Random draws that use every choice of a pool before they repeat one."""

    def __init__(self, seed: int, held_out: bool) -> None:
        # Only Random.random() gives the same numbers on every Python version.
        self._random = random.Random(2 * seed + held_out).random
        self._held_out = held_out
        self._decks: dict[str, list[Any]] = {}

    def draw(self, name: str, choices: Sequence[Any]) -> Any:
        if not self._decks.get(name):
            self._decks[name] = self.shuffled(choices)
        return self._decks[name].pop()

    def word(self, pool: str) -> Any:
        if pool in GLUE:
            return self.draw(pool, GLUE[pool])
        # One word, time or number in six is held out.
        side = [w for w in POOLS[pool] if (zlib.crc32(str(w).lower().encode()) % 6 == 0) is self._held_out]
        return self.draw(pool, side)

    def shuffled(self, choices: Sequence[Any]) -> list[Any]:
        return sorted(choices, key=lambda _: self._random())


def _fill(pattern: str, decks: _Decks) -> str | int:
    """Fill one slot: ``{adjective} {noun}`` gives a string, ``{people}`` alone a number."""
    alone = _FIELD.fullmatch(pattern)
    return decks.word(alone[1]) if alone else _FIELD.sub(lambda field: decks.word(field[1]), pattern)


def _request(kind: Kind, slots: dict[str, str | int], decks: _Decks) -> str:
    wording = decks.draw(kind.action, kind.orders + kind.statements)
    if wording in kind.statements:
        return decks.draw("statement frames", STATEMENT_FRAMES).format(wording.format(**slots))
    frame = decks.draw("order frames", ORDER_FRAMES)
    request = frame.format(wording.format(**slots))
    return request[0].upper() + request[1:]


def _records(count: int, decks: _Decks) -> list[dict[str, str]]:
    """Return ``count`` different records, equally many of each kind of command, shuffled."""
    found: dict[str, str] = {}
    attempts = 0
    while len(found) < count:
        kind = KINDS[len(found) % len(KINDS)]
        slots = {slot: _fill(pattern, decks) for slot, pattern in kind.slots.items()}
        output = json.dumps({"action": kind.action, **slots}, separators=(",", ":"))
        found.setdefault(_request(kind, slots, decks), output)
        attempts += 1
        if attempts > 10 * count:
            raise UserError(f"demo: the words do not suffice for {count} different records; ask for fewer")
    return [
        {"instruction": INSTRUCTION, "input": request, "output": found[request]}
        for request in decks.shuffled(list(found))
    ]


def generate(
    seed: int, n_train: int = N_TRAIN, n_val: int = N_VAL
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return (training, held-out) records with the keys instruction, input and output.

    They share no slot value, for any two seeds. The same arguments give the same records on every Python
    version.

    Raises:
        UserError: a count is below 1, or higher than the words allow.
    """
    if n_train < 1 or n_val < 1:
        raise UserError(f"demo: n_train is {n_train} and n_val is {n_val}; expected at least 1 each")
    return _records(n_train, _Decks(seed, held_out=False)), _records(n_val, _Decks(seed, held_out=True))


def write(folder: Path, seed: int, n_train: int = N_TRAIN, n_val: int = N_VAL) -> tuple[Path, Path]:
    """Write ``train.json`` and ``val.json`` into ``folder``; return their paths."""
    paths = Path(folder) / "train.json", Path(folder) / "val.json"
    for path, records in zip(paths, generate(seed, n_train, n_val), strict=True):
        write_json(path, records)
    return paths
