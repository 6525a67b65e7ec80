"""Token ids from Python callers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lit_adapter import arguments
from lit_adapter.errors import UserError, WrongTypeError
from lit_adapter.model.config import LlamaConfig


def as_prompts(given: Any, config: LlamaConfig) -> list[list[int]]:
    """Return the token ids of texts as lists.

    Raises:
        WrongTypeError: not a list of lists of whole numbers.
        UserError: an id that is not in the vocabulary; it would end the requests that are read beside it.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise WrongTypeError(f"prompts is of type {type(given).__name__}; expected a list of token id lists")
    return [_ids_of(f"prompts[{number}]", ids, config) for number, ids in enumerate(given)]


def _ids_of(name: str, given: Any, config: LlamaConfig) -> list[int]:
    given = given.tolist() if callable(getattr(given, "tolist", None)) else given  # of a tensor or an array
    arguments.of_kind(name, given, (list, tuple), "a list of token ids")
    ids = [arguments.whole_number(f"an element of {name}", id_) for id_ in given]
    odd = next((id_ for id_ in ids if not 0 <= id_ < config.vocab_size), None)
    if odd is not None:
        raise UserError(f"{name} holds {odd}; expected token ids from 0 to {config.vocab_size - 1}")
    return ids


def check_ids(ids: Any, config: LlamaConfig) -> None:
    """Refuse token ids that the model cannot read, before they are an index out of range on a GPU."""
    arguments.of_kind("ids", ids, Tensor, "a tensor of token ids [B, T]")
    if ids.is_meta or ids.is_nested or ids.layout != torch.strided:
        raise WrongTypeError("ids is a sparse, nested or meta tensor; expected a dense one, [B, T]")
    if ids.dtype not in (torch.int64, torch.int32):
        raise WrongTypeError(f"ids is of dtype {ids.dtype}; expected token ids in torch.int64")
    if ids.ndim != 2 or 0 in ids.shape:
        raise UserError(f"ids has shape {list(ids.shape)}; expected [B, T], each 1 or more")
    if ids.shape[1] > config.context_length:
        raise UserError(
            f"ids has {ids.shape[1]} positions, but the base's context is {config.context_length}; shorten it"
        )
    least, most = (int(end) for end in ids.aminmax())
    if least < 0 or most >= config.vocab_size:
        odd = least if least < 0 else most
        raise UserError(f"ids holds {odd}; expected token ids from 0 to {config.vocab_size - 1}")
