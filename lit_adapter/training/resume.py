"""The checkpoint that a run resumes from, and what both must have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_adapter.config import DEFAULT_LR, OptimConfig
from lit_adapter.errors import UserError, counted
from lit_adapter.model.adapter import adapter_shapes
from lit_adapter.streams import Say
from lit_adapter.text.template import Template, resolve_template
from lit_adapter.training.base import Base
from lit_adapter.training.checkpoint import check_contents, read_checkpoint
from lit_adapter.training.differences import differences, shown_value
from lit_adapter.training.plan import Plan
from lit_adapter.training.run_folder import AnotherRunError, RunFolder
from lit_adapter.training.run_identity import BEFORE, RunIdentity, run_identity
from lit_adapter.weights.adapter_file import read_adapter

RATES = ("optim.lr", "optim.base_lr")


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run starts from, or step 0."""

    path: Path | None = None
    step: int = 0
    is_validated: bool = False
    """The held-out loss of that step has been measured."""


def find_resume_point(resume: str | None, folder: RunFolder, plan: Plan, say: Say) -> ResumePoint:
    """Find a checkpoint, check that it is this run's and usable, and list the settings that change.

    ``resume`` is ``last``, a checkpoint file, or None to start at step 0.

    Raises:
        UserError: there is no checkpoint, it is not usable, it is past the planned steps, or it is another
            run's; says what differs.
    """
    if resume is None:
        return ResumePoint()
    if "://" in resume:
        raise UserError(f"--resume {resume}: a URL; give 'last' or a file of this run")

    def check(path: Path, checkpoint: dict[str, Any]) -> None:
        found = differences(_stored(checkpoint), plan.identity, plan.config)
        if found:
            raise AnotherRunError(f"{path}: cannot resume another run: {'; '.join(found)}")
        check_contents(path, checkpoint, adapter_shapes(plan.config.adapter, plan.base.config))

    if resume == "last":
        path, checkpoint = folder.newest_checkpoint(check, say)
    else:
        path, checkpoint = Path(resume), read_checkpoint(Path(resume))
        check(path, checkpoint)
    step = checkpoint["global_step"]
    if step > plan.steps:
        by_steps = plan.config.optim.max_steps is not None
        advice = f"set optim.max_steps to {step} or more" if by_steps else "raise optim.epochs"
        raise UserError(
            f"{path}: has {counted(step, 'step')}, more than the {plan.steps:,} of this run; {advice}"
        )
    for line in _changes(_stored(checkpoint), plan):
        say(f"resuming with {line}")
    return ResumePoint(path, step, checkpoint["measured"]["validated_step"] == step)


def saved_run(resume: str | None, folder: RunFolder) -> RunIdentity:
    """Return what is known of the run that is resumed; nothing if no checkpoint of it can be read."""
    if resume is None:
        return RunIdentity({}, {}, 0)
    for path in reversed(folder.saved()) if resume == "last" else [Path(resume)]:
        with suppress(UserError):  # `find_resume_point` will say what is wrong with it
            return _stored(read_checkpoint(path))
    return RunIdentity({}, {}, 0)


def template_of_run(setting: str, base: Base, saved: RunIdentity, *, conversations: bool) -> Template:
    """Return the template that ``data.template`` names; a resumed run keeps its chat template.

    A chat template may show the date, so rendering it again could give another text. ``conversations``: the
    data holds some, which decides what ``auto`` is.

    Raises:
        UserError: as `resolve_template`.
    """
    kept = saved.identity.get("template")
    same_base = saved.identity.get("tokenizer") == base.identity.tokenizer[:16]  # and its chat template
    is_chat = setting == "chat" or (setting == "auto" and conversations)
    if is_chat and same_base and kept and kept["kind"] == "chat":
        return Template.from_dict(kept)
    template = resolve_template(setting, base.tokenizer, conversations=conversations)
    same = kept is not None and template.jinja is not None and kept.get("jinja") == template.jinja
    return Template.from_dict(kept) if same and kept else template


def _stored(checkpoint: dict[str, Any]) -> RunIdentity:
    """Return what a checkpoint says about its run.

    Without a ``val_every``, which an earlier version left open, it validated after each tenth of the run.
    """
    stored = RunIdentity(**checkpoint["lit_adapter"])
    if stored.changeable.get("trainer.val_every", 0) is None:
        stored.changeable["trainer.val_every"] = max(1, stored.steps // 10)
    return stored


def is_written(adapter: Path, checkpoint: Path | None) -> bool:
    """Tell whether an adapter file holds the same tensors as a checkpoint."""
    if checkpoint is None or not adapter.is_file():
        return False
    try:
        state = read_adapter(adapter)[1]
    except UserError:
        return False  # it will be written again
    saved = read_checkpoint(checkpoint)["state_dict"]
    return state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in state)


def _changes(saved: RunIdentity, plan: Plan) -> Iterator[str]:
    """Yield the settings that change; without those that follow from others, as epochs that were chosen."""
    own = plan.identity
    before, now = _peak_lr(saved), _peak_lr(own)
    if before != now:
        yield f"optim.lr changed from {before:g} to {now:g}"
    settings = run_identity(BEFORE).changeable | saved.changeable
    following = RATES if plan.has_own_epochs else (*RATES, "optim.epochs")
    for key, value in own.changeable.items():
        if key not in following and settings[key] != value:
            yield f"{key} changed from {shown_value(settings[key])} to {shown_value(value)}"
    schedule, warmup = own.identity["optim.schedule"], own.identity["optim.warmup"]
    if saved.steps != own.steps and (schedule != "constant" or 0 < warmup < 1):
        yield (
            f"the {schedule} schedule over {counted(own.steps, 'step')} instead of {saved.steps}: "
            f"unlike a run of {counted(own.steps, 'step')} from the start"
        )


def _peak_lr(run: RunIdentity) -> float:
    """Return a run's peak learning rate, whichever of its settings gives it."""
    lr, base_lr = (run.changeable[key] for key in RATES)
    if lr is None and base_lr is None:
        return DEFAULT_LR[run.identity["adapter.version"]]
    return OptimConfig(lr=lr, base_lr=base_lr, batch_size=run.identity["optim.batch_size"]).peak_lr
