"""How a run differs from the one that is resumed, in the user's terms: files, settings and numbers."""

from __future__ import annotations

from typing import Any

from lit_adapter.config import Config
from lit_adapter.data.sources import as_names, title
from lit_adapter.errors import counted, shorten
from lit_adapter.files.paths import without_home
from lit_adapter.grouping import n_common
from lit_adapter.training.run_identity import BEFORE, RunIdentity, run_identity

ADDED = ("base.", "data.val_records", "data.file", "data.n_file", "data.n_val_records")
"""Prefixes of what the oldest checkpoints do not store."""
_COUNTED = ("records", "val_records", "file")
RECORDS = (*(f"data.{what}" for what in _COUNTED), *(f"data.n_{what}" for what in _COUNTED))
FILES, CONTENTS = "data.streamed", "data.file_contents"
"""Of a stream: the number of its files, with a checksum of names and sizes; and a checksum of contents."""
EXCERPT = 40
"""Characters of a template that a message shows."""


def differences(saved: RunIdentity, own: RunIdentity, config: Config) -> list[str]:
    """Return how a run, which ``config`` describes, differs from the one that is resumed.

    ``own`` and ``saved`` are the identities of the two.
    """
    known = run_identity(BEFORE).identity | saved.identity
    now = own.identity
    keys = [
        key
        for key, value in now.items()
        if known.get(key) != value and (key in known or not key.startswith(ADDED))
    ]
    found = [*_of_records(set(keys), known, now, config), *_of_stream(set(keys), known, now, config)]
    for key in keys:
        if key == "base":
            found.append(_of_base("its weights are not those", config.base, saved))
        elif key == "tokenizer":
            found.append(_of_base("its tokenizer is not that", config.base, saved))
        elif key == "template":
            found.append(_of_template(known[key], now[key]))
        elif key == "init_from" and known.get(key) and now[key]:
            found.append(f"init_from {config.init_from}: is not the file that the run started from")
        elif key == "init_from":
            before = "a file" if known.get(key) else "unset"
            found.append(f"init_from was {before}, now {config.init_from or 'unset'}")
        elif key not in (*RECORDS, FILES, CONTENTS):
            found.append(f"{key} was {shown_value(known.get(key))}, now {shown_value(now[key])}")
    return found


def shown_value(value: object) -> str:
    """Return a setting's value for a message."""
    return "unset" if value is None else repr(value)


def _of_records(keys: set[str], known: dict[str, Any], now: dict[str, Any], config: Config) -> list[str]:
    """Return which records differ, and how many there were and are."""
    train, val = f"data.train {title(as_names(config.data.train))}", title(as_names(config.data.val))
    found = []
    if "data.file" in keys:
        found.append(f"{train}: its records have changed ({_numbers('data.n_file', known, now)})")
    elif "data.records" in keys and "data.file" not in known:  # it may be the file or the split
        numbers = _numbers("data.n_records", known, now)
        found.append(f"{train}: other records are trained on ({numbers}), or other ones held out")
    split_follows = bool(found) or "seed" in keys
    split = keys & {"data.records", "data.val_records"} and not split_follows
    if split or (val and "data.val_records" in keys):
        where = f"data.val {val}" if val else "data.val, data.val_size"
        found.append(f"{where}: other records are held out ({_numbers('data.n_val_records', known, now)})")
    if "data.n_records" in keys and not found and not split_follows:
        found.append(f"{train}: {_numbers('data.n_records', known, now)} fit data.max_length")
    return found


def _of_stream(keys: set[str], known: dict[str, Any], now: dict[str, Any], config: Config) -> list[str]:
    """Return which files of a stream differ, and how many there were and are."""
    train = f"data.train {title(as_names(config.data.train))}"
    if FILES in keys and FILES in known:
        before, after = (str(side[FILES]).partition(",")[0] for side in (known, now))
        return [f"{train}: its files have changed ({before} then, {after} now)"]
    return [f"{train}: the content of its files has changed"] if CONTENTS in keys else []


def _numbers(key: str, known: dict[str, Any], now: dict[str, Any]) -> str:
    if key not in known:
        return f"{counted(now[key], 'record')} now"
    return f"{counted(known[key], 'record')} then, {now[key]:,} now"


def _of_base(what: str, base: str, saved: RunIdentity) -> str:
    before = saved.changeable.get("base")
    of = "" if before == without_home(base) else f" of {before}"
    return f"base {base}: {what}{of} with which the run began"


def _of_template(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the first part that differs, from where it does."""
    key = next(key for key in {**now, **before} if before.get(key) != now.get(key))
    texts = [str(side.get(key)) for side in (before, now)]
    same = n_common(*texts) if key.startswith("text") else 0
    shown = [shorten(text[same:], EXCERPT) for text in texts]
    where = f" from character {same + 1} on" if same else ""
    return f"data.template: its {key}{where} was {shown[0]}, now {shown[1]}"
