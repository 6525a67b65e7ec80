"""What an evaluation is asked to do. No torch: the command line reads it before it loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_adapter.config import Columns
from lit_adapter.data.tasks import DEFAULT_COLUMNS
from lit_adapter.errors import UserError


@dataclass(frozen=True)
class Evaluation:
    """One evaluation; at least one of ``data``, ``plain`` and ``tasks`` is given.

    Raises:
        UserError: a metric or task is given twice.
    """

    out: Path
    """The folder of the results."""
    adapters: tuple[Path, ...] = ()
    base: Path | None = None
    """By default the base that the first adapter names."""
    data: Path | None = None
    """Held-out records."""
    columns: Columns = DEFAULT_COLUMNS
    limit: int | None = None
    """Use at most this many records, and documents of each task; None for all."""
    metrics: tuple[str, ...] = ()
    """Names, or module:function; none to choose by what the outputs look like."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens; None: about 1.5 times the longest output."""
    stop_early: bool = False
    """End an answer as soon as it can no longer be right."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness: names, or paths of YAML files."""
    few_shot: int | None = None
    """Examples before each question of the tasks; None as each task says."""
    chat_template: bool = False
    """Whether tasks are asked in the base's chat template."""
    plain: Path | None = None
    """A plain text whose perplexity is measured."""
    template: str | None = None
    """Template of a plain base without adapters."""
    device: str | None = None
    dtype: str | None = None
    """By default bf16 if the device multiplies it faster than fp32."""
    batch_size: int = 16
    overwrite: bool = False
    """Discard the answers of another run in ``out``."""

    def __post_init__(self) -> None:
        refuse_twice("metrics", self.metrics)
        refuse_twice("tasks", self.tasks)


def refuse_twice(option: str, given: Sequence[object]) -> None:
    """Refuse an option that names something twice.

    Raises:
        UserError: names it.
    """
    twice = next((one for one in given if given.count(one) > 1), None)
    if twice is not None:
        raise UserError(f"--{option}: {twice} is given twice; leave one out")
