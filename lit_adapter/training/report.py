"""What a run shows of its steps: curves, printed lines, warnings."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from lightning.pytorch import Callback

from lit_adapter.config import TrainerConfig
from lit_adapter.model.prefix import GatedPrefix
from lit_adapter.streams import Say
from lit_adapter.training.loggers import draw_layers
from lit_adapter.training.notices import Notices


class Report(Callback):
    """Draws curves, prints lines where there is no progress bar, and warns.

    With ``redraw`` the resume point's own step is drawn again.
    """

    def __init__(self, options: TrainerConfig, say: Say, notices: Notices, *, redraw: bool) -> None:
        self.every, self.say, self.redraw = options.log_every, say, redraw
        self.lines = options.progress == "lines" or (options.progress == "auto" and not shows_bar(options))
        self.tokens, self.seconds = 0.0, 0.0
        self.tokens_per_s = 0.0
        self.notices = notices

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run's report continues from."""
        return {"tokens_per_s": self.tokens_per_s, "notices": self.notices.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from an earlier report's state."""
        self.tokens_per_s = state_dict["tokens_per_s"]
        self.notices.load(state_dict["notices"])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Draw the resume point's step again if it was removed from the curves."""
        if self.redraw and self._is_point(trainer):
            self._draw(trainer, pl_module, trainer.global_step)

    def _is_point(self, trainer: Any) -> bool:
        step, total = trainer.global_step, trainer.datamodule.total_steps
        return step > 0 and (step % self.every == 0 or step == total)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Count the step's tokens and time; report every ``log_every`` steps."""
        last, step = pl_module.last, trainer.global_step
        self.tokens += last["tokens"]
        self.seconds += pl_module.step_seconds
        self.tokens_per_s = self.tokens / self.seconds
        self.notices.step(last["loss"], last["grad_norm"], step)
        shown = {"loss": last["loss"], "tokens/s": self.tokens_per_s}
        pl_module.log_dict(shown, prog_bar=True, logger=False)
        if not self._is_point(trainer):
            return
        self.tokens, self.seconds = 0.0, 0.0
        self._draw(trainer, pl_module, step)
        if self.lines:
            total = trainer.datamodule.total_steps
            remaining = (total - step) * last["tokens"] / self.tokens_per_s
            self.say(
                f"step {step}/{total}  loss {last['loss']:.4f}  lr {last['lr']:.2e}  "
                f"{self.tokens_per_s:,.0f} tokens/s  {remaining:,.0f} s left"
            )

    def _draw(self, trainer: Any, pl_module: Any, step: int) -> None:
        last = pl_module.last
        values = {
            "loss/train": last["loss"],
            "perplexity/train": _perplexity(last["loss"]),
            "progress/tokens_per_s": self.tokens_per_s,
            "optim/lr": last["lr"],
            "optim/grad_norm": last["grad_norm"],
        }
        if trainer.datamodule.steps_per_epoch is not None:
            values["progress/epoch"] = step / trainer.datamodule.steps_per_epoch
        _log(trainer, values, step)
        if trainer.is_global_zero:
            self._draw_prefixes(trainer, pl_module, step)

    def _draw_prefixes(self, trainer: Any, pl_module: Any, step: int) -> None:
        """Draw the mean strength and prompt norm over all layers, and one picture of layers by heads.

        The strength of every head is kept beside them, for reports; TensorBoard shows no card of it.
        """
        layers = pl_module.model.layers
        prefixes = {
            index: block.self_attn.prefix
            for index, block in enumerate(layers)
            if isinstance(block.self_attn.prefix, GatedPrefix)
        }
        rows = {index: one.strength().detach().abs().mean((-2, -1)).cpu() for index, one in prefixes.items()}
        self.notices.gates({layer: bool(strength.any()) for layer, strength in rows.items()}, step)
        if trainer.logger is None or not rows:
            return
        norms = [float(one.prompt.detach().norm(dim=-1).mean()) for one in prefixes.values()]
        adapted = torch.stack(list(rows.values()))
        by_head = adapted.new_full((len(layers), adapted.shape[1]), math.nan)
        by_head[list(rows)] = adapted
        means = {
            "prefix/strength": float(adapted.mean(1).nanmean()),
            "prefix/prompt_norm": math.fsum(norms) / len(norms),
        }
        _log(trainer, means, step)
        # Strengths that have diverged, or are NaN, must not spoil the picture.
        heat = adapted.nan_to_num(0.0).clamp(max=1e6)
        draw_layers(trainer.logger, heat, by_head, step)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the held-out loss."""
        if trainer.should_stop:
            return
        loss, step = pl_module.val_loss, trainer.global_step
        _log(trainer, {"perplexity/held_out": _perplexity(loss), "loss/held_out": loss}, step)
        self.notices.held_out(loss, step)
        self.say(f"step {step}: held-out loss {loss:.4f}, perplexity {_perplexity(loss):.2f}")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the warnings that need the whole run, and the number of skipped steps."""
        if trainer.global_step >= trainer.datamodule.total_steps:
            self.notices.end(trainer.global_step)
        if pl_module.skipped_steps:
            self.say(f"{pl_module.skipped_steps} of {trainer.global_step} steps were skipped")


def shows_bar(options: TrainerConfig) -> bool:
    """Return whether to show a progress bar: as the settings say, by default on a terminal."""
    return options.progress == "bar" or (options.progress == "auto" and sys.stdout.isatty())


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 50.0)) if math.isfinite(loss) else math.inf


def _log(trainer: Any, values: dict[str, float], step: int) -> None:
    if trainer.logger is not None:
        trainer.logger.log_metrics(values, step=step)
