"""Every private part of Lightning that is touched is there, does what is relied on, and is still needed."""

from __future__ import annotations

import ast
import inspect
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities import rank_zero_only

from lit_adapter.model import torch_internals
from lit_adapter.training import lightning_internals
from lit_adapter.training.lightning_internals import (
    CHECKPOINT_KEYS,
    Bar,
    leave_signals_alone,
    leave_validation,
    let_go_on,
    rank,
    validate_now,
)

ROOT = Path(__file__).parents[1]
OF_OTHERS = {"os._exit", "parser._actions", "self.config._attn_implementation"}
"""Private names of the standard library, and the one by which transformers' models choose their attention."""


def moved(what: str, function: Any) -> str:
    name = f"lightning_internals.{function.__name__}"
    return f"Lightning {lightning.__version__} no longer {what}: see {name}"


class Model(BoringModel):
    """Counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.validated = 0, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.validated += 1
        return super().validation_step(batch, batch_idx)


class On(Callback):
    """Calls a function in one hook."""

    def __init__(self, hook: str, function: Callable[[Trainer], object]) -> None:
        setattr(self, hook, lambda trainer, *_: function(trainer))


def make(tmp_path: Path, *callbacks: Callback, steps: int = 4, **options: Any) -> Trainer:
    fixed: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 3, "check_val_every_n_epoch": 2}
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False
    )
    options = fixed | quiet | {"limit_train_batches": steps, "num_sanity_val_steps": 0} | options
    return Trainer(accelerator="cpu", callbacks=list(callbacks), default_root_dir=tmp_path, **options)


def private_touches(tree: ast.AST, own: set[str]) -> list[str]:
    """Underscore names that are used but not the package's own, and imports of such names or modules."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr) and node.attr not in own:
            found.append(ast.unparse(node))
        if isinstance(node, ast.ImportFrom):
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            if any(re.match("_[a-zA-Z]", name) for name in names):
                found.append(ast.unparse(node))
    return [name for name in found if name not in OF_OTHERS]


def own_names(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            found |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def test_private_parts_of_libraries_are_touched_in_one_module() -> None:
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "lit_adapter").rglob("*.py")}
    for module in (lightning_internals, torch_internals):
        assert private_touches(trees.pop(Path(module.__file__)), set())
    own = set().union(*map(own_names, trees.values()))
    touches = {path.name: private_touches(tree, own) for path, tree in trees.items()}
    assert {name: found for name, found in touches.items() if found} == {}


def test_rank() -> None:
    assert hasattr(rank_zero_only, "rank"), moved("keeps the rank in rank_zero_only.rank", rank)
    assert rank() == 0


def test_validate_now(tmp_path: Path) -> None:
    """Before the first step and after the second; training goes on, and its metrics do."""
    trainer = make(tmp_path, On("on_train_start", validate_now), On("on_train_batch_end", at_step_2))
    for name in ("_logger_connector._first_loop_iter", "fit_loop.epoch_loop.val_loop.restarting"):
        value: Any = trainer
        for part in name.split("."):
            assert hasattr(value, part), moved(f"has Trainer.{name}", validate_now)
            value = getattr(value, part)
    model = Model()
    trainer.fit(model)
    assert (model.trained, model.validated) == (4, 6), moved("validates inside a hook", validate_now)


def at_step_2(trainer: Trainer) -> None:
    if trainer.global_step == 2:
        validate_now(trainer)


def test_leave_validation(tmp_path: Path) -> None:
    def leave(trainer: Trainer) -> None:
        trainer.should_stop = True
        leave_validation()

    model = Model()
    trainer = make(tmp_path, On("on_train_batch_end", at_step_2), On("on_validation_batch_start", leave))
    trainer.fit(model)
    assert (model.trained, model.validated) == (2, 0), moved(
        "ends a validation at StopIteration", leave_validation
    )


@pytest.mark.parametrize("is_needed", [True, False])
def test_let_go_on(tmp_path: Path, is_needed: bool) -> None:
    """A run of two steps goes on to four; without the function it would do nothing."""
    path = tmp_path / "end.ckpt"

    def save(trainer: Trainer) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(path)

    class Resume(Callback):
        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            assert checkpoint.keys() >= CHECKPOINT_KEYS
            progress = checkpoint["loops"]["fit_loop"].get("epoch_loop.batch_progress", {})
            assert "is_last_batch" in progress, moved("saves is_last_batch", let_go_on)
            if is_needed:
                let_go_on(checkpoint)

    make(tmp_path, On("on_train_batch_end", save), steps=2).fit(Model())
    model = Model()
    make(tmp_path, Resume()).fit(model, ckpt_path=path)
    assert model.trained == (2 if is_needed else 0), moved("stops at a shorter run's last batch", let_go_on)


def test_leave_signals_alone(tmp_path: Path) -> None:
    """With it SIGTERM keeps its handler during training; without it Lightning takes the signal."""
    seen = []
    look = On("on_train_batch_end", lambda trainer: seen.append(signal.getsignal(signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    make(tmp_path, look, steps=1).fit(Model())
    trainer = make(tmp_path, look, steps=1)
    leave_signals_alone(trainer)
    trainer.fit(Model())
    taken, kept = seen
    assert taken != before, moved("handles SIGTERM, so that this is not needed", leave_signals_alone)
    assert kept == before, moved("registers handlers by its _SignalConnector", leave_signals_alone)
    called = "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop.advance)
    assert called, moved("broadcasts a flag before a step, in _broadcast_sigterm_tensor", leave_signals_alone)


def test_bar(tmp_path: Path) -> None:
    called = "self._get_train_description(" in inspect.getsource(RichProgressBar.on_train_epoch_start)
    assert called, moved("asks _get_train_description for the bar's title", Bar)
    trainer = make(tmp_path, Bar(), enable_progress_bar=True)
    bar = trainer.progress_bar_callback
    assert isinstance(bar, Bar)
    n_columns = len(RichProgressBar().configure_columns(trainer))
    assert len(bar.configure_columns(trainer)) == n_columns - 1, moved("shows steps per second", Bar)
