"""The JSON files next to a vocabulary: BOS, EOS, stop ids and the chat template."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError
from lit_adapter.files.read import read_object, read_text
from lit_adapter.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Description:
    """Settings of a tokenizer from the files next to its vocabulary; None for those that are not given."""

    bos: str | None = None
    eos: str | None = None
    add_bos: bool | None = None
    legacy: bool = True
    """Whether transformers' sentencepiece tokenizers add a space after control tokens."""
    chat_template: str | None = None
    bos_id: int | None = None
    """From ``generation_config.json`` or else ``config.json``."""
    stop_ids: tuple[int, ...] = ()
    """From both files; the first is EOS where ``eos`` is None."""
    added: dict[str, int] = field(default_factory=dict)
    """Ids of tokens that other files add to a sentencepiece model."""
    special: frozenset[str] = frozenset()
    """The added tokens that are marked special."""


def read_description(folder: Path) -> Description:
    """Read the JSON files next to a tokenizer.

    Raises:
        UserError: a file is not a JSON object, or a value has an unexpected type.
    """
    main = _optional(folder / "tokenizer_config.json")
    special = _optional(folder / "special_tokens_map.json")
    models = [(folder / name, _optional(folder / name)) for name in ("generation_config.json", "config.json")]
    bos_ids = [id_ for path, raw in models for id_ in _ids(path, raw, "bos_token_id")]
    stop_ids = [id_ for path, raw in models for id_ in _ids(path, raw, "eos_token_id")]
    add_bos = main.get("add_bos_token")
    if not isinstance(add_bos, bool | None):
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: add_bos_token is {add_bos!r}; expected true or false"
        )
    added, special_added = _added(folder, main)
    return Description(
        bos=_spelling(main, "bos_token") or _spelling(special, "bos_token"),
        eos=_spelling(main, "eos_token") or _spelling(special, "eos_token"),
        add_bos=add_bos,
        legacy=main.get("legacy") is not False,
        chat_template=_chat_template(folder, main),
        bos_id=bos_ids[0] if bos_ids else None,
        stop_ids=tuple(dict.fromkeys(stop_ids)),
        added=added,
        special=special_added,
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _ids(path: Path, raw: dict[str, Any], key: str) -> list[int]:
    """Return the token ids of a key that holds a number, a list of numbers, or nothing."""
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    # Some files write -1 for none.
    if not all(isinstance(id_, int) and not isinstance(id_, bool) and id_ >= -1 for id_ in ids):
        raise UserError(f"{path}: {key} is {value!r}; expected a token id or a list of them")
    return [id_ for id_ in ids if id_ >= 0]


def _spelling(raw: dict[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _chat_template(folder: Path, main: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    found = _optional(folder / "chat_template.json").get("chat_template", main.get("chat_template"))
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and found else None


def _added(folder: Path, main: dict[str, Any]) -> tuple[dict[str, int], frozenset[str]]:
    listed = _optional(folder / "added_tokens.json")
    added = {content: id_ for content, id_ in listed.items() if isinstance(id_, int)}
    special = set()
    decoder = main.get("added_tokens_decoder")
    for id_, token in decoder.items() if isinstance(decoder, dict) else ():
        if str(id_).isdigit() and isinstance(token, dict) and isinstance(token.get("content"), str):
            added[token["content"]] = int(id_)
            if token.get("special"):
                special.add(token["content"])
    return added, frozenset(special)


def describe(
    tokenizer: Tokenizer,
    about: Description,
    *,
    bos_id: int | None,
    eos_id: int | None,
    add_bos: bool,
    source: object,
) -> None:
    """Give a tokenizer that knows its control tokens its BOS, EOS, stop ids and chat template.

    ``about`` takes precedence over what the vocabulary itself, the file ``source``, says: its BOS and EOS,
    and whether it puts BOS before a text.

    Raises:
        UserError: ``about`` names a token that the vocabulary lacks, or there is no EOS.
    """
    for spelling in (about.bos, about.eos):
        if spelling and spelling not in tokenizer.control_tokens:
            raise UserError(f"{source}: token '{spelling}' of tokenizer_config.json is not in the vocabulary")
    eos = tokenizer.control_tokens[about.eos] if about.eos else eos_id
    bos = tokenizer.control_tokens[about.bos] if about.bos else bos_id
    eos = next(iter(about.stop_ids), None) if eos is None else eos
    if eos is None:
        raise UserError(f"{source}: no EOS token; name it in tokenizer_config.json as eos_token")
    tokenizer.eos_id = eos
    tokenizer.bos_id = bos if bos is not None else about.bos_id
    wanted = about.add_bos if about.add_bos is not None else add_bos
    tokenizer.add_bos = wanted and tokenizer.bos_id is not None
    tokenizer.stop_ids = frozenset({eos, *about.stop_ids})
    tokenizer.chat_template = about.chat_template
