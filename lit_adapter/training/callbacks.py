"""What happens around the training step: checkpoints, best adapter, curves, lines and samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lit_adapter.generation.engine import AdaptedLlama
from lit_adapter.model.adapter import GatedPrefix, adapter_state
from lit_adapter.training.run_folder import RunFolder

Say = Callable[[str], None]


class Checkpoints(Callback):
    """Saves every ``every`` optimizer steps and where training stops; keeps the newest ``keep``."""

    def __init__(self, folder: RunFolder, record: dict[str, Any], *, every: int, keep: int) -> None:
        self.folder, self.record, self.every, self.keep = folder, record, every, keep
        self.saved_step = -1

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict) -> None:
        """Put the run's identity and settings into the checkpoint."""
        checkpoint["lit_adapter"] = self.record

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict) -> None:
        """Let a run that ended go on, where it is given more steps now."""
        # Lightning would take the last batch of the shorter run for the end of this one.
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the end of an optimizer step: nothing is half done there."""
        step = trainer.global_step
        last = step >= trainer.datamodule.total_steps
        if step % self.every == 0 or last or trainer.should_stop:
            self.save(trainer, step)

    def save(self, trainer: Any, step: int) -> None:
        """Save, then delete the oldest."""
        if step == self.saved_step:
            return
        trainer.save_checkpoint(self.folder.checkpoint_path(step))
        self.saved_step = step
        if trainer.is_global_zero:
            for old in sorted(self.folder.checkpoints.glob("step-*.ckpt"))[: -self.keep]:
                old.unlink(missing_ok=True)


class BestAdapter(Callback):
    """Writes the adapter whenever the held-out loss is lower than ever; its record survives a resume."""

    def __init__(self, write: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
        self.write = write
        self.loss = math.inf

    def state_dict(self) -> dict[str, Any]:
        """Return the lowest loss so far, as text: JSON has no infinity."""
        return {"loss": repr(self.loss)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the lowest loss of the resumed run."""
        self.loss = float(state_dict["loss"])

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Compare, and write on the first process."""
        loss = float(trainer.callback_metrics["val/loss"])
        if trainer.global_step == 0 or not loss < self.loss:
            return
        self.loss = loss
        if trainer.is_global_zero:
            self.write(adapter_state(pl_module.model), {"steps": trainer.global_step, "val_loss": loss})


class Report(Callback):
    """Curves for TensorBoard, lines for terminals without a progress bar, and words of warning."""

    def __init__(self, *, every: int, lines: bool, say: Say) -> None:
        self.every, self.lines, self.say = every, lines, say
        self.tokens, self.since = 0.0, 0.0
        self.tokens_per_s = 0.0
        self.first_loss: float | None = None
        self.first_val: float | None = None
        self.warned: set[str] = set()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self.tokens, self.since = 0.0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the step, and report every few."""
        last, step = pl_module.last, trainer.global_step
        self.tokens += last["tokens"]
        self._warn_of_bad_numbers(last, step)
        shown = {"loss": last["loss"], "tokens/s": self.tokens_per_s}
        pl_module.log_dict(shown, prog_bar=True, logger=False)
        if step % self.every and step != trainer.datamodule.total_steps:
            return
        now = time.perf_counter()
        self.tokens_per_s = self.tokens / (now - self.since)
        self.tokens, self.since = 0.0, now
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
        if has_prefix and trainer.is_global_zero and trainer.logger is not None:
            self._gates(trainer, pl_module, step)

    def _gates(self, trainer: Any, pl_module: Any, step: int) -> None:
        """Write every layer's gates and prompt norm, and one picture of layers by heads."""
        rows, values = [], {}
        for index, block in enumerate(pl_module.model.layers):
            prefix = block.self_attn.prefix
            if isinstance(prefix, GatedPrefix):
                strength = prefix.strength().detach().abs().mean(-1).flatten().cpu()
                rows.append(strength)
                values[f"gates/layer_{index:02d}"] = float(strength.mean())
                values[f"prompts/layer_{index:02d}"] = float(prefix.prompt.detach().norm(dim=-1).mean())
        heat = torch.stack(rows).nan_to_num(0.0).clamp(max=1e6)  # a picture, also of a run gone wrong
        _log(trainer, values, step)
        picture = heat / heat.max().clamp(min=1e-8)
        picture = picture.repeat_interleave(12, 0).repeat_interleave(12, 1)[None]
        writer = trainer.logger.experiment
        writer.add_image("gates/layers_by_heads", picture, step)
        writer.add_histogram("gates/strength", heat, step)

    def _warn_of_bad_numbers(self, last: dict[str, float], step: int) -> None:
        if not math.isfinite(last["loss"] + last["grad_norm"]):
            self.say(
                f"step {step} skipped: loss {last['loss']} or gradient norm {last['grad_norm']} is not finite"
            )
        elif self.first_loss is None:
            self.first_loss = last["loss"]
        elif last["loss"] > 100 * self.first_loss:
            self._once(
                "spike", f"step {step}: the loss jumped to {last['loss']:.3g}; a lower optim.lr may help"
            )

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the held-out loss."""
        loss, step = float(trainer.callback_metrics["val/loss"]), trainer.global_step
        _log(trainer, {"val/perplexity": _perplexity(loss), "val/loss": loss}, step)
        if self.first_val is None:
            self.first_val = loss
        elif abs(loss - self.first_val) < 1e-4 * self.first_val and step >= 20:
            self._once("flat", "the held-out loss is where it started; a higher optim.lr may help")
        self.say(f"step {step}: held-out loss {loss:.4f}, perplexity {_perplexity(loss):.2f}")
        # Validation is not training time.
        self.tokens, self.since = 0.0, time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """See whether the gates have opened at all."""
        state = pl_module.state_dict()
        gates = [value for name, value in state.items() if name.endswith(".gate")]
        if gates and trainer.global_step > 1 and not any(bool(gate.any()) for gate in gates):
            self._once("gates", "every gate is still 0, so the adapter does nothing; raise optim.lr above 0")

    def _once(self, key: str, text: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            self.say(f"warning: {text}")


class Samples(Callback):
    """Answers a few held-out records at each validation and writes them to TensorBoard as text."""

    def __init__(
        self, assistant: AdaptedLlama, tasks: list[tuple[str, str, str]], max_new_tokens: int
    ) -> None:
        self.assistant, self.tasks, self.max_new_tokens = assistant, tasks, max_new_tokens

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Generate on the first process; the others go on to wait in the next step.

        On a base that is cut over the processes all of them generate, the same tokens.
        """
        together = isinstance(trainer.strategy, ModelParallelStrategy)
        if not self.tasks or not (trainer.is_global_zero or together) or trainer.logger is None:
            return
        pairs = [(instruction, input) for instruction, input, _ in self.tasks]
        answers = self.assistant.generate_batch(pairs, max_new_tokens=self.max_new_tokens)
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


def tasks_of(records: Any, count: int) -> list[tuple[str, str, str]]:
    """Return instruction, input and output of the first ``count`` records."""
    if records is None:
        return []
    return [(record.instruction, record.input, record.output) for record in records[:count]]


class Bar(RichProgressBar):
    """Lightning's bar without what means nothing here: a version, and an epoch that is the whole run."""

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """Return loss and tokens/s, to the digits a person reads."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return {name: f"{value:,.0f}" if name == "tokens/s" else value for name, value in shown.items()}

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"
