"""Safe reading of ``torch.save`` files: tensors, plain containers and a Namespace of plain values, no code.

PyTorch's restricted unpickler builds the objects. It may build one additional type, the `argparse.Namespace`
that training scripts keep their options in. What it returns is checked again, since PyTorch allows types
(sparse and quantised tensors, for example) that no adapter needs.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_adapter.errors import UserError
from lit_adapter.files.read import refuse_stand_in
from lit_adapter.weights.shards import load_tensors, refuse_odd_tensor

PLAIN = (str, int, float, bool, type(None))
DEEPEST = 20
"""Levels of containers in a file; an optimizer's state has about five."""


def read_torch_file(path: Path) -> Any:
    """Return what a ``torch.save`` file holds; tensors stay mapped on disk if the file allows it.

    Raises:
        UserError: damaged, or holding anything but tensors, plain containers and a Namespace of plain
            values; no code of the file has run.
    """
    refuse_stand_in(path)
    content = load_tensors(path, "ask for the adapter's tensors alone", [argparse.Namespace])
    _check(content, str(path), "", 0)
    return content


def _check(value: Any, source: str, place: str, depth: int) -> None:
    where = f"{source}: {place or 'its content'}"
    if depth > DEEPEST:
        raise UserError(f"{where} is nested more than {DEEPEST} deep; no adapter is")
    kind = type(value)
    if isinstance(value, Tensor):
        refuse_odd_tensor(value, where)
    elif kind in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in PLAIN:
                raise UserError(f"{where} has a key of type {type(key).__name__}; expected text or a number")
            _check(item, source, f"{place}.{key}" if place else str(key), depth + 1)
    elif kind in (list, tuple):
        for number, item in enumerate(value):
            _check(item, source, f"{place}[{number}]", depth + 1)
    elif kind is argparse.Namespace:
        for key, item in vars(value).items():
            for one in item if type(item) in (list, tuple) else [item]:
                if type(one) not in PLAIN:
                    found = type(one).__name__
                    raise UserError(f"{where}.{key} holds a {found}; expected plain values in a Namespace")
    elif kind not in PLAIN:
        raise UserError(f"{where} is a {kind.__name__}; expected tensors and plain values")
