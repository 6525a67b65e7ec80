"""Progress bars on standard error, if it is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich import progress

Progress = Callable[[int, int], None] | None
"""Called with (bytes done, bytes in total); None where nobody watches."""


@contextlib.contextmanager
def byte_progress(title: str) -> Iterator[Progress]:
    """Yield what draws the bar; None without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import DownloadColumn

    with _bar(DownloadColumn()) as bar:
        task = bar.add_task(title, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


@contextlib.contextmanager
def count_progress(title: str, total: int | None = None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a callback that is called with the number of items just finished, out of ``total`` if known."""
    if not sys.stderr.isatty():
        yield lambda number: None
        return
    from rich.progress import MofNCompleteColumn

    with _bar(MofNCompleteColumn()) as bar:
        task = bar.add_task(title, completed=done, total=total)
        yield lambda number: bar.advance(task)


def _bar(amount: progress.ProgressColumn) -> progress.Progress:
    from rich import progress
    from rich.console import Console

    title, left = progress.TextColumn("{task.description}"), progress.TimeRemainingColumn()
    return progress.Progress(title, progress.BarColumn(), amount, left, console=Console(stderr=True))
