"""What the adapters of a frontier learn: free text, short tasks, the demo, and few records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_adapter.data import demo
from lit_adapter.data.records import read_records, split
from lit_adapter.errors import UserError
from lit_adapter.evaluation.metrics import exact, json_exact
from lit_adapter.files.write import write_json

SEED = 1337
"""Of every split and every generated record: all runs learn from the same ones."""
TASKS = (
    "chain_sum",
    "letter_counting",
    "spell_backward",
    "number_sorting",
    "word_sorting",
    "count_bits",
    "gcd",
    "leg_counting",
    "simple_equations",
    "calendar_arithmetic",
    "time_intervals",
    "family_relationships",
    "isomorphic_strings",
    "fraction_simplification",
)
"""Kinds of tasks of the package reasoning-gym, all with short answers."""
N_TASKS, N_HELD_OUT_TASKS = 480, 40
"""Records of each kind."""
N_HELD_OUT_TEXT, N_FEW, N_DEMO = 250, 300, 2000


@dataclass(frozen=True)
class Course:
    """Records to learn from and records held out, as options of a run."""

    name: str
    options: tuple[str, ...]
    held_out: Path
    is_right: Callable[[str, str], float] | None = None
    """Compares an answer with the held-out output; None where answers are not either right or wrong."""
    plain: str | None = None
    """A text that has nothing to do with the course: what an adapter forgets shows in its loss on it."""


def write_courses(names: Sequence[str], folder: Path, text: str | None) -> list[Course]:
    """Write the data of courses into ``folder`` and return them.

    Args:
        names: of ``COURSES`` in scripts/measure_learning.py.
        folder: gets two files for each course.
        text: a file of records; the courses "text", "epochs" (three of them) and "few" take theirs from it,
            and the others their plain text, its held-out outputs.

    Raises:
        UserError: a course without its file of records or its package.
    """
    return [_write(name, folder / name, text) for name in names]


def _write(name: str, folder: Path, text: str | None) -> Course:
    folder.mkdir(parents=True, exist_ok=True)
    if name == "demo":
        train, held_out = demo.write(folder, 0, N_DEMO)
        options = ("--optim.batch_size=16", "--optim.epochs=1")
        return Course(name, (*_data(train, held_out), *options), held_out, json_exact, _plain_text(text))
    train, held_out = folder / "train.json", folder / "held_out.json"
    sides = _tasks() if name == "tasks" else _text(text, few=name == "few")
    for path, records in zip((train, held_out), sides, strict=True):
        write_json(path, records)
    steps = () if name == "few" else ("--optim.batch_size=32",)  # otherwise from the number of records
    options = (*steps, f"--optim.epochs={3 if name in ('few', 'epochs') else 1}")
    data = (*_data(train, held_out), *options)
    if name == "tasks":
        return Course(name, data, held_out, exact, _plain_text(text))
    return Course(name, data, held_out)


def _data(train: Path, held_out: Path) -> tuple[str, str]:
    return f"--data.train={train}", f"--data.val={held_out}"


def _text(path: str | None, *, few: bool) -> tuple[list[Any], list[Any]]:
    if path is None:
        raise UserError("the courses text, few and epochs need --text, a file of records")
    train, held_out = split(read_records(path), val_size=N_HELD_OUT_TEXT, seed=SEED)
    sides = (list(train)[: N_FEW if few else None], list(held_out))
    return tuple([_plain(record) for record in side] for side in sides)  # type: ignore[return-value]


def _plain_text(path: str | None) -> str | None:
    if path is None:
        return None
    _, held_out = _text(path, few=False)
    return "\n\n".join(record["output"] for record in held_out)


def _plain(record: Any) -> dict[str, str]:
    return {name: getattr(record, name) for name in ("instruction", "input", "output")}


def _tasks() -> tuple[list[Any], list[Any]]:
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(
            "the course tasks needs the package reasoning-gym; run: pip install -e '.[measure]'"
        ) from None
    train: list[Any] = []
    held_out: list[Any] = []
    for kind in TASKS:
        tasks = reasoning_gym.create_dataset(kind, size=N_TASKS + N_HELD_OUT_TASKS, seed=SEED)
        records = [{"instruction": task["question"], "output": task["answer"]} for task in tasks]
        train += records[:N_TASKS]
        held_out += records[N_TASKS:]
    return train, held_out
