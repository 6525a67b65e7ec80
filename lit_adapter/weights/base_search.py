"""Finds the base of an adapter: the same folders in the same order for everything that takes an adapter.

1. beside the adapter's run: the base that its ``config.yaml`` records, then ``checkpoints/NAME``; both in the
   folder of the adapter file and in every folder above it, the nearest first
2. ``$LIT_ADAPTER_HOME/checkpoints/NAME``
3. ``checkpoints/NAME`` in the working directory
4. ``checkpoints/NAME`` in the checkout that this package runs from

The first folder with the fingerprints that the adapter records is used, even if others have its name too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lit_adapter.errors import UserError, option
from lit_adapter.files.read import read_text
from lit_adapter.weights.base_folder import FINGERPRINT, read_fingerprint

if TYPE_CHECKING:
    from lit_adapter.weights.adapter_file import BaseIdentity

HOME = "LIT_ADAPTER_HOME"
"""Environment variable: a folder whose ``checkpoints`` are found from everywhere."""
CHECKOUT = Path(__file__).resolve().parents[2]
MAX_CONFIG_BYTES = 100_000


def find_base(wanted: BaseIdentity, adapter: Path) -> Path:
    """Return the folder of the base that the file ``adapter`` names.

    Raises:
        UserError: it is in none of the places above; lists them.
    """
    found = base_at_hand(wanted, adapter)
    if found is not None:
        return found
    home = os.environ.get(HOME)
    places = [f"{adapter.resolve().parent} and the folders above it", home or f"${HOME} (not set)"]
    places += ["the working directory", *([str(CHECKOUT)] if _is_checkout() else [])]
    raise UserError(
        f"base '{wanted.name}': no converted base checkpoints/{wanted.name} in {', '.join(places)}; "
        f"convert it there, or give its folder with {option('base')}"
    )


def base_at_hand(wanted: BaseIdentity, adapter: Path) -> Path | None:
    """Return the folder of the base that the file ``adapter`` names, or None if it is not found.

    The first one with the fingerprints of ``wanted``; if none has them, the first one of that name, so that
    the caller can say how it differs (`check_base`).
    """
    folders = filter(_is_base, _places(wanted.name, adapter.resolve().parent))
    first = next(folders, None)
    if first is None:
        return None
    found = next((folder for folder in chain([first], folders) if has_fingerprints(folder, wanted)), first)
    here = Path.cwd()
    return found.relative_to(here) if found.is_relative_to(here) else found


def has_fingerprints(folder: Path, wanted: BaseIdentity) -> bool:
    """Tell whether a converted base has the weights and the tokenizer of ``wanted``, by its fingerprint."""
    with suppress(UserError):
        fingerprint = read_fingerprint(folder)
        return (fingerprint["weights"], fingerprint["tokenizer"]) == (wanted.weights, wanted.tokenizer)
    return False


def _is_base(folder: Path) -> bool:
    """Tell whether a converted base is there; a folder that cannot be read has none."""
    with suppress(OSError, ValueError):
        return (folder / FINGERPRINT).is_file()
    return False


def _places(name: str, run: Path) -> Iterator[Path]:
    above, recorded = (run, *run.parents), _recorded_base(run / "config.yaml")
    if recorded is not None:
        # A relative path was relative to the folder where the run was started, which is not recorded.
        yield from (folder for parent in above if _real_name(folder := parent / recorded) == name)
    yield from (parent / "checkpoints" / name for parent in above)
    home = os.environ.get(HOME)
    if home:
        yield Path(os.path.expanduser(home)) / "checkpoints" / name
    yield Path("checkpoints") / name
    if _is_checkout():
        yield CHECKOUT / "checkpoints" / name


def _recorded_base(config: Path) -> Path | None:
    """Return the base that a run's configuration names; None without a readable configuration."""
    with suppress(UserError, OSError, yaml.YAMLError, RuntimeError):  # RuntimeError: no home of that user
        if config.is_file() and config.stat().st_size <= MAX_CONFIG_BYTES:
            nodes = _top_nodes(read_text(config))
            for key, value in zip(nodes, nodes, strict=False):
                if isinstance(key, yaml.ScalarEvent) and key.value == "base":
                    return Path(value.value).expanduser() if isinstance(value, yaml.ScalarEvent) else None
    return None


def _top_nodes(text: str) -> Iterator[yaml.NodeEvent]:
    """Yield keys and values of a YAML mapping in turn, without the values that an attacker could nest."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth == 1 and isinstance(event, yaml.NodeEvent):
            yield event
        depth += isinstance(event, yaml.CollectionStartEvent)


def _real_name(folder: Path) -> str | None:
    """Return a folder's name after resolving links, or None if it cannot be read."""
    with suppress(OSError, ValueError, RuntimeError):  # a null character; links in a circle
        return folder.resolve().name
    return None


def _is_checkout() -> bool:
    """Tell whether this package runs from a checkout, as after ``pip install -e``."""
    return (CHECKOUT / "pyproject.toml").is_file()
