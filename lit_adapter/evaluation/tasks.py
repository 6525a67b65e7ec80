"""Tasks of lm-evaluation-harness, by name or as YAML files, for every model of an evaluation."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError, nearest
from lit_adapter.evaluation.answer_file import AnswerFile
from lit_adapter.evaluation.contestants import Contestant, identity_of
from lit_adapter.evaluation.settings import Evaluation, refuse_twice
from lit_adapter.files.read import file_sha256
from lit_adapter.streams import Say, only_errors_of

NOISY = ("lm_eval", "datasets", "huggingface_hub", "evaluate")
"""Loggers that would print between our own lines."""


class Tasks:
    """The loaded tasks of an evaluation; they are loaded before any model is.

    Raises:
        UserError: the extra is not installed, a task is unknown, given twice or in two groups, its file is
            missing, or its data is not available; names the task.
    """

    def __init__(self, settings: Evaluation, say: Say) -> None:
        self.settings = settings
        self.loaded: list[Any] = []
        if not settings.tasks:
            return
        if find_spec("lm_eval") is None:
            raise UserError("--tasks needs lm-evaluation-harness; pip install -e '.[eval]'")
        for name in settings.tasks:
            if _is_path(name) and not Path(name).is_file():
                raise UserError(f"--tasks: {name}: file not found")
        with _quiet():
            self._load(say)

    def _load(self, say: Say) -> None:
        from lm_eval.tasks import TaskManager

        by_name = [name for name in self.settings.tasks if not _is_path(name)]
        if by_name:
            say("reading the list of lm-evaluation-harness's tasks")
        self._manager = TaskManager(include_defaults=bool(by_name))
        for name in by_name:
            if name not in self._manager.task_index:
                hint = nearest(name, self._manager.all_tasks) or "; give a name of its list or a YAML file"
                raise UserError(f"--tasks: '{name}' is unknown{hint}")
        for name in self.settings.tasks:
            self.loaded += self._one(name)
        refuse_twice("tasks", [task.task_name for task in self.loaded])  # files or groups may share a name

    def _one(self, name: str) -> list[Any]:
        """Load a task, or all of a group."""
        try:
            try:
                return list(self._manager.load([name])["tasks"].values())
            except FileNotFoundError:
                if not _is_path(name):
                    raise
                path = Path(name).absolute()
                with chdir(path.parent):  # data files beside the task
                    return list(self._manager.load([str(path)])["tasks"].values())
        except ConnectionError as error:
            reason = "the network cannot be reached, and its data is not in the cache"
            raise UserError(f"--tasks: {name}: {reason} ({error}); use a local YAML task") from None
        except Exception as error:  # an error in the task's file, its data, or the libraries that read them
            raise UserError(f"--tasks: {name}: cannot be loaded: {type(error).__name__}: {error}") from None

    def run(self, models: Sequence[Contestant], base: Path) -> dict[str, Any]:
        """Return for each task and metric every model's value and standard error.

        Finished tasks are kept in ``tasks.jsonl``, from which the same call continues.

        Raises:
            UserError: that file is of another run; names what differs.
        """
        from lit_adapter.evaluation.harness import HarnessModel

        found: dict[str, Any] = {}
        path, overwrite = self.settings.out / "tasks.jsonl", self.settings.overwrite
        file = AnswerFile(path, self._identity(models, base), overwrite=overwrite, item="task")
        with _quiet():
            for one in models:
                model = HarnessModel(one.model, one.name, self.settings.batch_size)
                for number, task in enumerate(self.loaded):
                    pair = one.name, number
                    if pair not in file.values:
                        file.append([(pair, {"results": self._results(model, task)})])
                    for name, numbers in file.values[pair]["results"].items():
                        for metric, value in numbers.items():
                            found.setdefault(name, {}).setdefault(metric, {})[one.name] = value
        return found

    def _identity(self, models: Sequence[Contestant], base: Path) -> dict[str, Any]:
        """Return everything that the results depend on, by the name that a message gives it."""
        names = self.settings.tasks
        return {
            "tasks": [file_sha256(Path(name)) if _is_path(name) else name for name in names],
            "data of tasks": [_digest(task.eval_docs) for task in self.loaded],
            **identity_of(models, base),
            "few_shot": self.settings.few_shot,
            "limit": self.settings.limit,
            "chat_template": self.settings.chat_template,
            "lm-eval": version("lm-eval"),
        }

    def _results(self, model: Any, task: Any) -> dict[str, dict[str, Any]]:
        from lm_eval import simple_evaluate

        done = simple_evaluate(
            model,
            tasks=[task],
            task_manager=self._manager,
            num_fewshot=self.settings.few_shot,
            limit=self.settings.limit,
            apply_chat_template=self.settings.chat_template,
            log_samples=False,
            bootstrap_iters=1000,
        )
        return {name: _numbers(values) for name, values in done["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Return a task's metrics, the harness's ``acc,none`` as ``acc``, each with its standard error."""
    found = {}
    for key, value in values.items():
        metric, _, rule = key.partition(",")
        if rule and not metric.endswith("_stderr") and isinstance(value, int | float):
            name = metric if rule == "none" else f"{metric} ({rule})"
            found[name] = {"value": float(value), "stderr": _finite(values.get(f"{metric}_stderr,{rule}"))}
    return found


def _digest(docs: Any) -> str:
    """Return a digest of a task's questions."""
    return hashlib.sha256(json.dumps(list(docs), default=str, sort_keys=True).encode()).hexdigest()


def _finite(value: Any) -> float | None:
    """Return a number; None for the harness's "N/A"."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness and what it uses from printing bars and remarks between our lines."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    for library in ("huggingface_hub.utils", "datasets"):
        import_module(library)  # sets its logger's level when it is first imported
    import_module("datasets").disable_progress_bars()  # where tqdm was imported before
    with only_errors_of(*NOISY):
        yield
