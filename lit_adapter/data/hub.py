"""Records of a Hugging Face Hub data set, such as ``yahma/alpaca-cleaned``.

The repository's own JSON, JSONL, CSV, TSV or Parquet files are downloaded to the Hub's cache and read like
local ones: no code of the data set runs, and error messages name lines.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path, PurePosixPath

from lit_adapter.data.formats import SUFFIXES
from lit_adapter.data.store import Source
from lit_adapter.errors import UserError, nearest
from lit_adapter.hub import asking_hub

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<part>.+))?", re.ASCII)
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.)")
_ABOUT_THE_DATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}


def is_hub_name(source: str | Path) -> bool:
    """Whether ``source`` has the form ``org/name[:file-or-split]`` and is not a local path or data file."""
    found = _NAME.fullmatch(str(source))
    if found is None or Path(source).exists():
        return False
    return PurePosixPath(found["repo"]).suffix.lower() not in SUFFIXES


def hub_files(name: str) -> list[Source]:
    """Download a Hub data set's training file, or the named file or split.

    The name is ``org/name``, ``org/name:split`` or ``org/name:path/of/file.json``.

    Raises:
        UserError: the repository is unknown or not accessible, the network is down, there is no data file
            or more than one candidate.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise UserError(f"'{name}' is not a Hub data set; expected org/name, org/name:split or org/name:file")
    repo, part = found["repo"], found["part"]
    if part and PurePosixPath(part).suffix.lower() in SUFFIXES:
        # A file named in full needs no listing, so a cached one is read without a network.
        files, commit = [part], None
    else:
        listing, commit = _listing(repo)
        files = choose_files(listing, part, repo)
    return [Source(_download(repo, file, commit), f"{repo}:{file}") for file in files]


def choose_files(files: list[str], split: str | None, repo: str) -> list[str]:
    """Return the data files of ``split`` (default: train): one file, or all its shards.

    Raises:
        UserError: there is no candidate, more than one, or a shard is missing.
    """
    data = sorted(file for file in files if _is_data(file))
    if not data:
        raise UserError(f"{repo}: has no {', '.join(SUFFIXES)} file; convert the data set to one of them")
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


def _listing(repo: str) -> tuple[list[str], str | None]:
    from huggingface_hub import HfApi

    info = asking_hub(repo, None, lambda: HfApi().dataset_info(repo), absent="and not a local file")
    return [file.rfilename for file in info.siblings or []], info.sha


def _download(repo: str, file: str, commit: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    ask = partial(hf_hub_download, repo, file, repo_type="dataset", revision=commit)
    return Path(asking_hub(f"{repo}:{file}", commit, ask))
