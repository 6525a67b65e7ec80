"""Checks a configuration file before jsonargparse reads it, which names no line and misses some mistakes."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from lit_adapter.config import Config
from lit_adapter.errors import UserError, nearest
from lit_adapter.files.read import read_text

_EXAMPLE = "as in configs/quickstart.yaml"


def check_config_file(path: Path) -> None:
    """Refuse invalid YAML, keys that are unknown or repeated, and values that YAML would silently change.

    Raises:
        UserError: the first mistake, with file and line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        loader = yaml.SafeLoader(read_text(path))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: expected keys and values, {_EXAMPLE}")
        loader.construct_object(node, deep=True)
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    _check_section(node, Config, path, "")


def _check_section(node: yaml.MappingNode, section: Any, path: Path, prefix: str) -> None:
    known = get_type_hints(section)
    seen = set()
    for key_node, value in node.value:
        key, place = key_node.value, f"{path}:{key_node.start_mark.line + 1}"
        if key_node.tag.endswith(":bool") and key in known:
            raise UserError(f"{place}: YAML reads the key {key} as a truth value; write '{key}' in quotes")
        if "." in key and key in _all_keys(Config):
            raise UserError(f"{place}: key '{key}' has a dot; write sections within sections, {_EXAMPLE}")
        if key not in known:
            hint = nearest(key, [*known, *_all_keys(Config)])  # this section's keys first
            raise UserError(f"{place}: unknown key '{prefix}{key}'{hint}")
        if key in seen:
            raise UserError(f"{place}: key '{prefix}{key}' is given twice; keep one")
        seen.add(key)
        if not is_dataclass(known[key]):
            _check_value(value, f"{place}: '{prefix}{key}'", known[key])
        elif isinstance(value, yaml.MappingNode):
            _check_section(value, known[key], path, f"{prefix}{key}.")
        else:
            names = ", ".join(get_type_hints(known[key]))
            raise UserError(f"{place}: '{prefix}{key}' must hold keys such as {names}")


def _all_keys(section: Any, prefix: str = "") -> list[str]:
    found = []
    for name, kind in get_type_hints(section).items():
        found += _all_keys(kind, f"{prefix}{name}.") if is_dataclass(kind) else [f"{prefix}{name}"]
    return found


def _check_value(node: yaml.Node, place: str, kind: Any) -> None:
    """Refuse what jsonargparse accepts silently: null, odd spellings of numbers, null characters.

    Values of a wrong type are left to jsonargparse.
    """
    for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        tag = item.tag.rpartition(":")[2]
        if tag == "null" and type(None) not in get_args(kind):
            raise UserError(f"{place} has no value; give one, or leave the key out for its default")
        if "\0" in item.value:
            raise UserError(f"{place} holds a null character; give plain text")
        # YAML 1.1 reads 010 as octal and 1:30 in base 60.
        octal = tag == "int" and re.match(r"[-+]?0_*\d", item.value)
        if octal or (tag in ("int", "float") and ":" in item.value):
            value = yaml.safe_load(item.value)
            raise UserError(f"{place} is {item.value}, which YAML reads as {value}; write the number out")
