"""What happens around the training step: checkpoints, best adapter, curves, lines and samples."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lit_adapter.config import TrainerConfig
from lit_adapter.data.records import Records
from lit_adapter.errors import UserError
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.request import NonFiniteLogitsError
from lit_adapter.model.adapter import adapter_state
from lit_adapter.model.prefix import GatedPrefix
from lit_adapter.training.notices import Notices
from lit_adapter.training.processes import agree
from lit_adapter.training.run_folder import RunFolder
from lit_adapter.training.signals import Signals

Say = Callable[[str], None]


class Validation(Callback):
    """Runs the held-out records before the first step, every ``every`` steps and after the last one.

    Lightning's own schedule would validate again wherever training stops, and not where a kill has cut a
    validation off: the checkpoint of its step is there then, and the resumed run begins with it.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def due(self, step: int, total_steps: int) -> bool:
        """Tell whether the held-out loss after ``step`` steps is wanted."""
        return step % self.every == 0 or step == total_steps

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin with what the start, or the checkpoint, left to do."""
        self._run(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Validate after the step's checkpoint."""
        self._run(trainer, pl_module)

    def _run(self, trainer: Any, pl_module: Any) -> None:
        step = trainer.global_step
        done = pl_module.validated_step == step
        if done or trainer.should_stop or not self.due(step, trainer.datamodule.total_steps):
            return
        first_iteration = trainer._logger_connector._first_loop_iter
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        trainer.validating = True
        loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first_iteration


class Checkpoints(Callback):
    """Saves before the first step, every ``every`` steps and at a stop; keeps the newest ``keep``.

    Args:
        folder: of the run.
        record: what identifies the run.
        options: how often, and how many are kept.
        begin: called on the first process before anything else is written.
    """

    def __init__(
        self, folder: RunFolder, record: dict[str, Any], options: TrainerConfig, begin: Callable[[], None]
    ) -> None:
        self.folder, self.record, self.begin = folder, record, begin
        self.every, self.keep = options.save_every, options.keep_checkpoints
        self.saved_step = -1

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict) -> None:
        """Put the run's identity and settings into the checkpoint."""
        checkpoint["lit_adapter"] = self.record

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict) -> None:
        """Let a run that ended go on, where it is given more steps now."""
        # Lightning would take the last batch of the shorter run for the end of this one.
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
        self.saved_step = checkpoint["global_step"]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to write."""
        if trainer.is_global_zero:
            self.begin()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Save the start, so that a run can be resumed from its first moment on."""
        if trainer.global_step == 0:
            self.save(trainer, 0)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the end of an optimizer step: nothing is half done there."""
        step = trainer.global_step
        last = step >= trainer.datamodule.total_steps
        if step % self.every == 0 or last or trainer.should_stop:
            self.save(trainer, step)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Save where a signal has cut the validation short."""
        if trainer.should_stop:
            self.save(trainer, trainer.global_step)

    def save(self, trainer: Any, step: int) -> None:
        """Save, then delete the oldest."""
        if step == self.saved_step:
            return
        if trainer.is_global_zero and trainer.logger is not None:
            trainer.logger.experiment.flush()  # a resumed run draws only what comes after this step
        trainer.save_checkpoint(self.folder.checkpoint_path(step))
        self.saved_step = step
        if trainer.is_global_zero:
            for old in sorted(self.folder.checkpoints.glob("step-*.ckpt"))[: -self.keep]:
                old.unlink(missing_ok=True)


class BestAdapter(Callback):
    """Writes the adapter whenever the held-out loss is lower than ever; its record survives a resume.

    Args:
        path: of the file; where it is gone, the best is sought anew.
        write: gets the path, the adapter, and how far the run has come.
    """

    def __init__(self, path: Path, write: Callable[[Path, dict[str, Tensor], dict[str, Any]], None]) -> None:
        self.path, self.write = path, write
        self.loss = math.inf

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget a record whose adapter is not there."""
        if not self.path.is_file():
            self.loss = math.inf

    def state_dict(self) -> dict[str, Any]:
        """Return the lowest loss so far, as text: JSON has no infinity."""
        return {"loss": repr(self.loss)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the lowest loss of the resumed run."""
        self.loss = float(state_dict["loss"])

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Compare, and write on the first process."""
        loss = pl_module.val_loss
        if trainer.should_stop or trainer.global_step == 0 or not loss < self.loss:
            return
        self.loss = loss
        if trainer.is_global_zero:
            self.write(
                self.path, adapter_state(pl_module.model), {"steps": trainer.global_step, "val_loss": loss}
            )


class Report(Callback):
    """Curves for TensorBoard, lines for terminals without a progress bar, and words of warning.

    Args:
        options: how often, and whether with a line each time.
        say: gets a line of text.
        lr: the peak learning rate.
        redraw: the checkpoint's own step has been taken off the curves with what comes after it.
    """

    def __init__(self, options: TrainerConfig, say: Say, *, lr: float, redraw: bool) -> None:
        self.every, self.say, self.redraw = options.log_every, say, redraw
        self.lines = options.progress == "lines" or (options.progress == "auto" and not shows_bar(options))
        self.tokens, self.seconds, self.since = 0.0, 0.0, 0.0
        self.tokens_per_s = 0.0
        self.notices = Notices(say, lr)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run's report continues."""
        return {"tokens_per_s": self.tokens_per_s, "notices": self.notices.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an earlier report."""
        self.tokens_per_s = state_dict["tokens_per_s"]
        self.notices.load(state_dict["notices"])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Draw again what had to be taken off the curves."""
        if self.redraw and self._is_point(trainer):
            self._curves(trainer, pl_module, trainer.global_step)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock: it counts steps, and no validation, sample or checkpoint between them."""
        self.since = time.perf_counter()

    def _is_point(self, trainer: Any) -> bool:
        step, total = trainer.global_step, trainer.datamodule.total_steps
        return step > 0 and (step % self.every == 0 or step == total)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the step, and report every few."""
        last, step = pl_module.last, trainer.global_step
        self.tokens += last["tokens"]
        self.seconds += time.perf_counter() - self.since
        self.tokens_per_s = self.tokens / self.seconds
        self.notices.step(last["loss"], last["grad_norm"], step)
        shown = {"loss": last["loss"], "tokens/s": self.tokens_per_s}
        pl_module.log_dict(shown, prog_bar=True, logger=False)
        if not self._is_point(trainer):
            return
        self.tokens, self.seconds = 0.0, 0.0
        self._curves(trainer, pl_module, step)
        if self.lines:
            total = trainer.datamodule.total_steps
            remaining = (total - step) * last["tokens"] / self.tokens_per_s
            self.say(
                f"step {step}/{total}  loss {last['loss']:.4f}  lr {last['lr']:.2e}  "
                f"{self.tokens_per_s:,.0f} tokens/s  {remaining:,.0f} s left"
            )

    def _curves(self, trainer: Any, pl_module: Any, step: int) -> None:
        last = pl_module.last
        values = {
            "train/loss": last["loss"],
            "train/perplexity": _perplexity(last["loss"]),
            "train/tokens_per_s": self.tokens_per_s,
            "train/epoch": step / trainer.datamodule.training_steps().steps_per_epoch,
            "optim/lr": last["lr"],
            "optim/grad_norm": last["grad_norm"],
        }
        _log(trainer, values, step)
        has_prefix = any(block.self_attn.prefix is not None for block in pl_module.model.layers)
        if has_prefix and trainer.is_global_zero:
            self._gates(trainer, pl_module, step)

    def _gates(self, trainer: Any, pl_module: Any, step: int) -> None:
        """Write every layer's gates and prompt norm, and one picture of layers by heads."""
        rows, values = {}, {}
        for index, block in enumerate(pl_module.model.layers):
            prefix = block.self_attn.prefix
            if isinstance(prefix, GatedPrefix):
                strength = prefix.strength().detach().abs().mean(-1).flatten().cpu()
                rows[index] = strength
                values[f"gates/layer_{index:02d}"] = float(strength.mean())
                values[f"prompts/layer_{index:02d}"] = float(prefix.prompt.detach().norm(dim=-1).mean())
        self.notices.gates({layer: bool(strength.any()) for layer, strength in rows.items()}, step)
        if trainer.logger is None:
            return
        heat = (
            torch.stack(list(rows.values())).nan_to_num(0.0).clamp(max=1e6)
        )  # a picture, also of a run gone wrong
        _log(trainer, values, step)
        picture = heat / heat.max().clamp(min=1e-8)
        picture = picture.repeat_interleave(12, 0).repeat_interleave(12, 1)[None]
        writer = trainer.logger.experiment
        writer.add_image("gates/layers_by_heads", picture, step)
        writer.add_histogram("gates/strength", heat, step)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the held-out loss."""
        if trainer.should_stop:
            return
        loss, step = pl_module.val_loss, trainer.global_step
        _log(trainer, {"val/perplexity": _perplexity(loss), "val/loss": loss}, step)
        self.notices.held_out(loss, step)
        self.say(f"step {step}: held-out loss {loss:.4f}, perplexity {_perplexity(loss):.2f}")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Look back."""
        if trainer.global_step >= trainer.datamodule.total_steps:
            self.notices.end(trainer.global_step)
        if pl_module.skipped_steps:
            self.say(f"{pl_module.skipped_steps} of {trainer.global_step} steps were skipped")


class Samples(Callback):
    """Answers a few held-out records at each validation and writes them to TensorBoard as text."""

    def __init__(
        self, assistant: AdaptedLlama, records: Records | None, options: TrainerConfig, signals: Signals
    ) -> None:
        self.assistant, self.signals, self.max_new_tokens = assistant, signals, options.sample_tokens
        room = assistant.model.config.context_length - options.sample_tokens
        if options.samples and room < 1:
            raise UserError(
                f"trainer.sample_tokens is {options.sample_tokens}, but the base's context is "
                f"{assistant.model.config.context_length}; lower it"
            )
        encode, tokenizer = assistant.template.encode_prompt, assistant.tokenizer
        fitting = (
            record  # one that was cut to length for the loss may be longer than the context
            for record in records or ()
            if len(encode(tokenizer, record.instruction, record.input)) <= room
        )
        chosen = islice(fitting, options.samples)
        self.tasks = [(record.instruction, record.input, record.output) for record in chosen]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Generate on the first process, until a signal comes; the others go on to wait in the next step.

        On a base that is cut over the processes all of them generate, the same tokens.
        """
        together = isinstance(trainer.strategy, ModelParallelStrategy)
        if not self.tasks or not (trainer.is_global_zero or together):
            return
        if trainer.logger is None or trainer.should_stop:
            return

        def stopped() -> bool:
            if together:
                agree(trainer, pl_module.device, self.signals)
            return bool(self.signals.agreed if together else self.signals.received)

        pairs = [(instruction, input) for instruction, input, _ in self.tasks]
        try:
            answers = self.assistant.generate_batch(
                pairs, max_new_tokens=self.max_new_tokens, stopped=stopped
            )
        except (
            NonFiniteLogitsError
        ):  # the steps whose loss is none are counted, and end the run where they must
            answers = ["(none: the model's logits are not numbers)"] * len(pairs)
        if stopped():
            return
        for number, ((instruction, input, wanted), answer) in enumerate(
            zip(self.tasks, answers, strict=True)
        ):
            parts = (
                ("Instruction", instruction),
                ("Input", input),
                ("Answer", answer),
                ("Reference", wanted),
            )
            text = "\n\n".join(f"**{title}**\n\n{_quoted(body)}" for title, body in parts if body)
            trainer.logger.experiment.add_text(f"samples/{number}", text, trainer.global_step)


def _quoted(text: str) -> str:
    """Indent a text so that Markdown shows it as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 50.0)) if math.isfinite(loss) else math.inf


def _log(trainer: Any, values: dict[str, float], step: int) -> None:
    if trainer.logger is not None:
        trainer.logger.log_metrics(values, step=step)


def shows_bar(options: TrainerConfig) -> bool:
    """Tell whether a progress bar is wanted: where nothing else is said, on a terminal."""
    return options.progress == "bar" or (options.progress == "auto" and sys.stdout.isatty())


class Bar(RichProgressBar):
    """Lightning's bar without what means nothing here: a version, and an epoch that is the whole run."""

    def configure_columns(self, trainer: Any) -> list[Any]:
        """Leave out steps per second: 0.00 where a step takes a minute."""
        return [c for c in super().configure_columns(trainer) if not isinstance(c, ProcessingSpeedColumn)]

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """Return loss and tokens/s, to the digits a person reads."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return {name: f"{value:,.0f}" if name == "tokens/s" else value for name, value in shown.items()}

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"
