"""The adapters that are served: loaded and unloaded while requests run, which keep theirs."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError, nearest, one_line, shorten
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.serving.errors import ApiError
from lit_adapter.serving.names import NAME, check_characters, check_name
from lit_adapter.weights.adapter_search import ADAPTER

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"


State = tuple[int, int, int]
"""What shows that a file's content has changed: its inode, its size, and when it was changed."""


def state_of(path: Path) -> State:
    """Return the state of a file now."""
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Served:
    """A model that requests can name."""

    name: str
    model: AdaptedLlama
    created: int
    path: Path | None = None
    """None for the plain base."""
    state: State | None = None


def adapter_files(folder: Path) -> dict[str, Path]:
    """Return a folder's adapter files by name, but for hidden ones; other entries are left out."""
    found: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            if entry.is_dir() and (path / ADAPTER).is_file():
                found[entry.name] = path / ADAPTER
            elif entry.name.endswith(SUFFIX) and entry.is_file():
                found[entry.name.removesuffix(SUFFIX)] = path
    return found


class Adapters:
    """The base and every loaded adapter, by name.

    Args:
        base: the plain base.
        folder: of more adapters, ``NAME.safetensors`` or ``NAME/adapter.safetensors``. A file that appears is
            loaded, one that changes is reloaded, and one that is removed is unloaded.
    """

    def __init__(self, base: AdaptedLlama, folder: Path | None) -> None:
        self.base = Served(check_characters(base.base_name), base, int(time.time()))
        self.folder = folder
        self._served: dict[str, Served] = {}
        self._seen: dict[str, State] = {}  # of the files in the folder, loaded or not
        self._failed: dict[str, State] = {}
        self._unloaded: dict[str, State] = {}  # by a request; they stay out until their files change
        self._changing = threading.Lock()

    def __iter__(self) -> Iterator[Served]:
        """Iterate over the base and the adapters by name."""
        yield self.base
        yield from (served for _, served in sorted(self._served.items()))

    def __len__(self) -> int:
        """Return the number of adapters."""
        return len(self._served)

    def find(self, name: str) -> Served:
        """Return the model that is served under a name.

        Raises:
            ApiError: there is none (404).
        """
        found = self.base if name == self.base.name else self._served.get(name)
        if found is None:
            hint = nearest(name, [served.name for served in self]) or "; see /v1/models"
            raise ApiError(
                404, f"the model {shorten(name)} does not exist{hint}", param="model", code="model_not_found"
            )
        return found

    def load(self, name: str, path: Path) -> Served:
        """Serve an adapter's file under a name, replacing the adapter that has it.

        Raises:
            UserError: the file is missing, damaged, or of another base; the name is the base's, or invalid.
        """
        if check_name(name) == self.base.name:
            raise UserError(f"adapter name {shorten(name)} is the base's; give the adapter another")
        with self._changing:
            state = state_of(path) if path.exists() else None
            model = self.base.model.with_adapter(path)
            model.spare_device()
            served = self._served[name] = Served(name, model, int(time.time()), path, state)
            self._failed.pop(name, None)
            self._unloaded.pop(name, None)
        return served

    def unload(self, name: str) -> None:
        """Stop serving an adapter; requests in progress finish with it.

        Raises:
            ApiError: it is not loaded (404), or it is the base (400).
        """
        if name == self.base.name:
            raise ApiError(400, "the base cannot be unloaded", param="name", code="base_model")
        with self._changing:
            served = self.find(name)
            del self._served[name]
            if served.state is not None:
                self._unloaded[name] = served.state

    def load_from_folder(self, name: str) -> Served:
        """Serve the adapter that the folder has under a name, newly read.

        The name is looked for among the folder's own entries; it never becomes part of a path.

        Raises:
            ApiError: there is no folder (400), no such entry (404), or the file is refused (400).
        """
        if self.folder is None:
            raise ApiError(400, "this server was started without --adapters FOLDER", code="no_folder")
        path = self.listed().get(name)
        if path is None:
            known = ", ".join(sorted(filter(NAME.fullmatch, self.listed()))[:10]) or "nothing"
            raise ApiError(
                404,
                f"the folder of adapters has no {shorten(name)}; it has {known}",
                param="name",
                code="adapter_not_found",
            )
        try:
            return self.load(name, path)
        except UserError as error:
            told = str(error).replace(str(path), path.name)
            raise ApiError(400, told, param="name", code="adapter_refused") from None

    def listed(self) -> Mapping[str, Path]:
        """Return the folder's adapter files by name; `load` refuses some names."""
        return {} if self.folder is None else adapter_files(self.folder)

    def scan(self, *, patient: bool = True) -> None:
        """Load and unload what has changed in the folder.

        A new or changed file is loaded once it has stayed the same since the last scan; at once if not
        ``patient``. A refused file is logged, and tried again when it has changed.
        """
        try:
            listed = self.listed()
            states = {name: state_of(path) for name, path in listed.items()}
        except OSError as error:
            logger.warning("folder of adapters %s: %s", self.folder, error.strerror)
            return
        for name, state in states.items():
            known = self._served.get(name)
            settled = not patient or self._seen.get(name) == state
            done = state in (known.state if known else None, self._failed.get(name), self._unloaded.get(name))
            if settled and not done:
                self._follow(name, listed[name], state)
        for name, served in list(self._served.items()):
            path = served.path
            if path is not None and self._is_in_folder(path) and name not in states:
                self._served.pop(name, None)
                logger.info("adapter %s: its file is gone; unloaded", name)
        self._seen = states

    def _is_in_folder(self, path: Path) -> bool:
        return self.folder is not None and self.folder in (path.parent, path.parent.parent)

    def _follow(self, name: str, path: Path, state: State) -> None:
        """Load one file of the folder, or log why not."""
        try:
            self.load(name, path)
            logger.info("adapter %s: loaded", name)
        except Exception as error:  # also for lack of memory: the others are followed all the same
            self._failed[name] = state
            is_refusal = isinstance(error, UserError | OSError)
            logger.warning("adapter %s: refused: %s", one_line(name), error, exc_info=not is_refusal)

    def described(self, served: Served) -> dict[str, Any]:
        """Return OpenAI's object of a model, with the base that it belongs to."""
        is_base = served is self.base
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "lit-adapter",
            "root": self.base.name,
            "parent": None if is_base else self.base.name,
            "template": served.model.template.kind,
        }
