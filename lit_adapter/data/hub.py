"""Records of a Hugging Face Hub data set, such as ``yahma/alpaca-cleaned``.

The repository's own JSON, JSONL, CSV, TSV or Parquet files are downloaded to the Hub's cache and read like
local ones, or streamed (`streaming`): no code of the data set runs, and error messages name lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from lit_adapter.data.formats import SUFFIXES
from lit_adapter.errors import UserError, counted, nearest
from lit_adapter.files.space import free_disk
from lit_adapter.hub import asking_hub
from lit_adapter.streams import Say

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<part>.+))?", re.ASCII)
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.)")
MANY_FILES = 8
"""Files of a data set from which a line says that they can be streamed."""
_ABOUT_THE_DATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}


def is_hub_name(source: str | Path) -> bool:
    """Whether ``source`` is a name that `hub_files` takes, and not a local path or data file."""
    found = _NAME.fullmatch(str(source))
    if found is None or Path(source).exists():
        return False
    return PurePosixPath(found["repo"]).suffix.lower() not in SUFFIXES


def hub_files(name: str, say: Say = lambda line: None) -> list[tuple[Path, str]]:
    """Download a Hub data set's training files, or those of the named split; return paths and names.

    The name is ``org/name``, ``org/name:split``, ``org/name:subset:split`` or ``org/name:path/of/file.json``.
    Subsets and splits are those of the data set's card, or else those that its files are named after. ``say``
    gets a line if there are many files.

    Raises:
        UserError: the repository is unknown or not accessible, the network is down, or there is no data file
            or more than one candidate, or the disk has no room for them.
    """
    repo, files, about = _chosen(name)
    _check_room(repo, files, about, say)
    return [(_download(repo, file, about.commit), f"{repo}:{file}") for file in files]


def hub_addresses(name: str) -> list[tuple[str, str]]:
    """Return where the files of `hub_files` are read on the Hub, without a download, and their names.

    Raises:
        UserError: as `hub_files`.
    """
    repo, files, about = _chosen(name)
    commit = about.commit or _listing(repo).commit  # a run reads one commit, whatever is added meanwhile
    return [(f"hf://datasets/{repo}@{commit}/{file}", f"{repo}:{file}") for file in files]


def _chosen(name: str) -> tuple[str, list[str], Listing]:
    """Return a data set's repository, the files that a name means, and what the Hub says about them."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise UserError(
            f"'{name}' is not a Hub data set; expected org/name, org/name:split, org/name:subset:split "
            "or org/name:file"
        )
    repo, part = found["repo"], found["part"]
    if part and PurePosixPath(part).suffix.lower() in SUFFIXES:
        # A file named in full needs no listing, so a cached one is read without a network.
        return repo, [part], Listing([part], None)
    about = _listing(repo)
    return repo, files_of_card(about, part, repo) or choose_files(about.files, part, repo), about


def _check_room(repo: str, files: Sequence[str], about: Listing, say: Say) -> None:
    """Say that many files can be streamed, and refuse files that do not fit on the disk."""
    from huggingface_hub import constants, try_to_load_from_cache

    if about.commit is None:
        return
    absent = [
        file
        for file in files
        if not isinstance(try_to_load_from_cache(repo, file, revision=about.commit, repo_type="dataset"), str)
    ]
    size, folder = sum(about.sizes.get(file, 0) for file in absent), Path(constants.HF_HUB_CACHE)
    free = free_disk(folder)
    if size > free:
        raise UserError(
            f"{repo}: {counted(len(absent), 'file')} of {size:,} bytes to download, but {free:,} are free in "
            f"{folder}; data.stream true reads them without keeping them"
        )
    if len(absent) > MANY_FILES:
        say(
            f"downloading {len(absent)} files of {repo}, {size:,} bytes; "
            "data.stream true would read them without keeping them"
        )


@dataclass(frozen=True)
class Listing:
    """What the Hub says about a data set."""

    files: list[str]
    commit: str | None
    configs: Any = None
    """``configs`` of its card: subsets with the patterns of their splits' files."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of its files, if known."""


def files_of_card(about: Listing, part: str | None, repo: str) -> list[str]:
    """Return the files that the card of a data set names for a subset and split; none if it says nothing.

    Raises:
        UserError: it names subsets, and none or several are meant.
    """
    subsets = {
        str(item.get("config_name")): item.get("data_files")
        for item in about.configs or ()
        if isinstance(item, dict) and item.get("data_files")
    }
    if not subsets:
        return []
    first, _, second = (part or "").partition(":")
    if first in subsets:
        subset, split = first, second or "train"
    elif len(subsets) == 1 or "default" in subsets:
        subset = "default" if "default" in subsets else next(iter(subsets))
        split = second or first or "train"
    else:
        raise UserError(f"{repo}: name a subset as {repo}:SUBSET: {', '.join([*subsets][:12])}")
    patterns = _patterns(subsets[subset], split)
    data = sorted(file for file in about.files if PurePosixPath(file).suffix.lower() in SUFFIXES)
    files = [file for file in data if any(fnmatchcase(file, pattern) for pattern in patterns)]
    if not files:
        raise UserError(
            f"{repo}: no data file of split '{split}' in subset '{subset}'; {_choice(repo, data)}"
        )
    return files


def _patterns(data_files: Any, split: str) -> list[str]:
    """Return the patterns of a split's files, as a card gives them: a text, texts, or splits with paths."""
    items = data_files if isinstance(data_files, list) else [data_files]
    found: list[Any] = []
    for item in items:
        if isinstance(item, str) and split == "train":
            found.append(item)
        elif isinstance(item, dict) and item.get("split", "train") == split:
            path = item.get("path")
            found += path if isinstance(path, list) else [path]
    return [pattern for pattern in found if isinstance(pattern, str)]


def choose_files(files: list[str], part: str | None, repo: str) -> list[str]:
    """Return the data files of a split (default: train), or ``subset:split``: one file, or all its shards.

    Raises:
        UserError: there is no candidate, more than one, or a shard is missing.
    """
    data = sorted(file for file in files if _is_data(file))
    if not data:
        raise UserError(f"{repo}: has no {', '.join(SUFFIXES)} file; convert the data set to one of them")
    subset, _, split = (part or "").rpartition(":")
    if subset:
        data = [file for file in data if subset in re.split(r"[/_.-]", file) or f"{subset}/" in file]
    if not data:
        raise UserError(f"{repo}: no data file of subset '{subset}'; {_choice(repo, files)}")
    chosen = data
    if split or len(data) > 1:
        wanted = re.compile(rf"(^|[/_.-]){re.escape(split or 'train')}([/_.-]|$)", re.IGNORECASE)
        chosen = [file for file in data if wanted.search(file)]
    if split and not chosen:
        hint = nearest(split, data)
        raise UserError(f"{repo}: no data file of split '{split}'{hint}; {_choice(repo, data)}")
    if len({_SHARD.sub("", file) for file in chosen}) != 1:
        raise UserError(f"{repo}: {len(data)} data files; {_choice(repo, data)}")
    shards = [_SHARD.search(file) for file in chosen]
    expected = int(shards[0][2]) if shards[0] else 1
    if len(chosen) != expected:
        raise UserError(
            f"{repo}: {len(chosen)} of {expected} shards of {chosen[0]}; the data set is incomplete"
        )
    return chosen


def _is_data(file: str) -> bool:
    path = PurePosixPath(file)
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in SUFFIXES and path.name not in _ABOUT_THE_DATA and not hidden


def _choice(repo: str, files: list[str]) -> str:
    more = f" and {len(files) - 12} more" if len(files) > 12 else ""
    return f"name one as {repo}:FILE: {', '.join(files[:12])}{more}"


def _listing(repo: str) -> Listing:
    from huggingface_hub import HfApi

    info = asking_hub(
        repo, None, lambda: HfApi().dataset_info(repo, files_metadata=True), absent="and not a local file"
    )
    card = info.card_data
    configs = card.get("configs") if card is not None else None
    files = info.siblings or []
    sizes = {file.rfilename: file.size for file in files if file.size}
    return Listing([file.rfilename for file in files], info.sha, configs, sizes)


def _download(repo: str, file: str, commit: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    ask = partial(hf_hub_download, repo, file, repo_type="dataset", revision=commit)
    return Path(asking_hub(f"{repo}:{file}", commit, ask))
