"""Reading the keys of a model's configuration file, with errors that name the file and the key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lit_adapter.errors import UserError


@contextmanager
def reading_sizes(source: str) -> Iterator[None]:
    """Name the file in errors about the sizes that are read inside the block.

    Raises:
        UserError: a value of the wrong type, or an impossible one.
    """
    try:
        yield
    except UserError as error:
        raise (error if source in str(error) else UserError(f"{source}: {error}")) from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{source}: a value has the wrong type ({error})") from None


def required(raw: dict[str, Any], key: str, source: str) -> Any:
    """Return the value of a required key.

    Raises:
        UserError: the key is absent or null.
    """
    if raw.get(key) is None:
        raise UserError(f"{source}: key '{key}' is missing")
    return raw[key]


def given(raw: dict[str, Any], key: str, default: Any) -> Any:
    """Return a value, or the default where the key is absent or null."""
    return default if raw.get(key) is None else raw[key]


def divided_head_dim(n_embd: int, n_head: int, key: str) -> int:
    """Return the size of a head, where ``n_head`` heads divide a width; ``key`` names it in messages.

    Raises:
        UserError: they do not.
    """
    if n_head < 1:
        raise UserError(f"there are {n_head} attention heads; expected 1 or more")
    if n_embd % n_head:
        raise UserError(
            f"{key} {n_embd} is not a multiple of the {n_head} attention heads, "
            "and the file does not give head_dim"
        )
    return n_embd // n_head
